import numpy as np
import pytest

from fastkd.artifacts import file_digest
from fastkd.errors import FastkdError
from fastkd.stages.resumable import RowFile, full_disk_explained, need_space


def test_rows_make_a_plain_npy_file(tmp_path):
    rows = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    with RowFile(tmp_path / "a.npy", "<f2", 10, 3) as file:
        for start in range(0, 10, 4):
            file.append(rows[start : start + 4])
        assert file.done == 10
    found = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, rows.astype(np.float16))


def test_a_file_is_gone_on_with_after_rows_that_stay(tmp_path):
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    with RowFile(tmp_path / "a.npy", "<f4", 10, 3) as file:
        file.append(rows[:4])
        digest = file.digest
        file.append(rows[5:9])  # written, but not known to be safe
        file.sync()
    with RowFile(tmp_path / "a.npy", "<f4", 10, 3, done=4) as file:
        assert file.digest == digest
        file.append(rows[4:])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_the_stamp_of_a_file_is_its_checksum(tmp_path, order):
    rows = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    path = tmp_path / "a.npy"
    with RowFile(path, "<f2", 11, 3) as file:
        for at in order:  # out of order, as other processes would write
            file.put(3 * at, rows[3 * at : 3 * at + 3])
        file.done = 11
        stamp = file.stamp
    assert (stamp.xxh3_128, stamp.size) == (file_digest(path), path.stat().st_size)


def test_rows_written_in_order_are_not_read_back_for_the_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr("os.pread", lambda *args: pytest.fail("the file was read"))
    with RowFile(tmp_path / "a.npy", "<f4", 10, 3) as file:
        file.append(np.ones((4, 3)))
        file.append(np.zeros((6, 3)))
        assert file.stamp.xxh3_128 == file_digest(tmp_path / "a.npy")


def test_an_unfinished_file_has_no_stamp(tmp_path):
    with RowFile(tmp_path / "a.npy", "<f4", 10, 3) as file:
        file.append(np.ones((4, 3)))
        with pytest.raises(FastkdError, match="4 of 10 rows written"):
            _ = file.stamp


def test_beginning_anew_leaves_what_has_the_same_inode_alone(tmp_path):
    with RowFile(tmp_path / "a.npy", "<f4", 2, 3) as file:
        file.append(np.ones((2, 3)))
    (tmp_path / "b.npy").hardlink_to(tmp_path / "a.npy")
    with RowFile(tmp_path / "b.npy", "<f4", 2, 3) as file:
        file.append(np.zeros((2, 3)))
    assert np.load(tmp_path / "a.npy").all()


def test_a_shortened_file_does_not_have_the_digest_it_had(tmp_path):
    with RowFile(tmp_path / "a.npy", "<f4", 10, 3) as file:
        file.append(np.ones((10, 3)))
        digest = file.digest
    with (tmp_path / "a.npy").open("r+b") as stream:
        stream.truncate(150)
    with RowFile(tmp_path / "a.npy", "<f4", 10, 3, done=10) as file:
        assert file.digest != digest


def test_space_is_asked_for_beforehand(tmp_path):
    need_space(tmp_path, 1, "nothing")
    with pytest.raises(FastkdError, match=r"labelling needs 1,000,000,000,000\.0 MB, but .* are free: free some, or"):
        need_space(tmp_path, 10**18, "labelling")


def test_only_a_full_disk_is_explained_as_one(tmp_path):
    with (
        pytest.raises(FastkdError, match=r"no space left .*; all is lost"),
        full_disk_explained(tmp_path, "all is lost"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), full_disk_explained(tmp_path, ""):
        raise PermissionError(13, "Permission denied")
