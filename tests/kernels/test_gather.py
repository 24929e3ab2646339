import numpy as np
import pytest

from fastkd.kernels import gather_rows


def source(dtype: str, count: int = 300, width: int = 7) -> np.ndarray:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        values = rng.standard_normal((count, width)).astype(dtype)
        values[0, :4] = [np.inf, -np.inf, np.nan, -0.0]
        return values
    return rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), (count, width)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "uint16", "float32", "int32"])
@pytest.mark.parametrize("mapped", [False, True])
def test_rows_are_those_that_numpy_picks_bit_for_bit(dtype, mapped, tmp_path):
    array = source(dtype)
    if mapped:
        np.save(tmp_path / "rows.npy", array)
        array = np.load(tmp_path / "rows.npy", mmap_mode="r")
        assert not array.flags.writeable
    for rows in (np.random.default_rng(1).integers(0, 300, 64), np.array([299, 0, 0, 5]), np.empty(0, np.int64)):
        out = np.empty((len(rows), 7), dtype)
        gather_rows(array, rows, out)
        assert out.tobytes() == array[rows].tobytes()  # NaN and −0.0 too


def test_nothing_but_the_rows_of_the_buffer_is_written():
    array, buffer = source("float16"), np.full((9, 7), 3, np.float16)
    gather_rows(array, np.arange(4), buffer[:4])
    assert np.array_equal(buffer[1:4], array[1:4])
    assert np.all(buffer[4:] == 3)


def test_one_number_a_row():
    array = source("uint16", width=1)
    out = np.empty((300, 1), np.uint16)
    gather_rows(array, np.arange(300)[::-1].copy(), out)
    assert np.array_equal(out, array[::-1])
