"""Copying samples between .beton files."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from fastkd.data import beton_writer, extract, ffcv_format
from fastkd.data.extract import Table, read_table
from fastkd.errors import ArtifactError, FastkdError, InputError

pytestmark = pytest.mark.timeout(60)


def write(noise, directory, **options) -> Path:
    """Write noise; return its train.beton, of 60 samples unless `n` says otherwise."""
    beton_writer.write_here((noise, options, str(directory)), lambda report: None)
    return directory / "train.beton"


def samples(file: Path) -> dict[int, tuple]:
    """Read a file with FFCV's Reader: sample_id → (mode, height, width, label, bytes)."""
    from ffcv.reader import Reader

    reader = Reader(str(file))
    assert file.stat().st_size == int(reader.header["alloc_table_ptr"]) + reader.alloc_table.nbytes
    assert sorted(reader.alloc_table["sample_id"]) == list(range(reader.num_samples))  # positions, whatever the ids
    raw = file.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    found = {}
    for image, label, sample_id in reader.metadata:
        ptr = int(image["data_ptr"])
        data = raw[ptr : ptr + sizes[ptr]]
        assert ptr // reader.page_size == (ptr + len(data) - 1) // reader.page_size, "crosses a page's border"
        found[int(sample_id)] = *(int(image[k]) for k in ("mode", "height", "width")), int(label), data
    return found


def content(found: dict[int, tuple]) -> str:
    digest = xxhash.xxh3_128()
    for sample_id, (mode, height, width, label, data) in sorted(found.items()):
        one = xxhash.xxh3_128(bytes([mode]) + np.array([height, width], "<u2").tobytes() + data)
        digest.update(np.array([sample_id, label], "<i8").tobytes() + one.digest())
    return digest.hexdigest()


@pytest.fixture
def some() -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(60)[:23]).astype(np.int64)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("mode", ["raw", "jpg", "smart"])
def test_samples_are_copied_byte_for_byte(noise, tmp_path, some, mode, workers):
    parent = write(noise, tmp_path, mode=mode, workers=workers, smart_threshold_bytes=700)
    table, out, reports = read_table(parent), tmp_path / "out.beton", []
    done = extract.extract(table, table.positions(some), out, lambda *report: reports.append(report))
    whole = samples(parent)
    assert samples(out) == {i: whole[i] for i in some.tolist()}
    assert read_table(out).sample_ids.tolist() == some.tolist()
    assert done.content_hash == content(samples(out))
    assert done.image_bytes == sum(len(whole[i][4]) for i in some)
    assert done.max_height == max(whole[i][1] for i in some)
    assert done.max_width == max(whole[i][2] for i in some)
    assert reports[-1] == (23, 23)


def test_all_samples_have_the_hash_of_the_whole(noise, tmp_path):
    written = beton_writer.write_here((noise, {}, str(tmp_path)), lambda report: None)
    table = read_table(tmp_path / "train.beton")
    done = extract.extract(table, np.arange(60), tmp_path / "out.beton")
    assert done.content_hash == written.splits["train"].content_hash


def test_of_a_copy_samples_are_found_by_their_ids(noise, tmp_path, some):
    parent = write(noise, tmp_path)
    table = read_table(parent)
    extract.extract(table, table.positions(some), tmp_path / "first.beton")
    first = read_table(tmp_path / "first.beton")
    assert first.positions(some[[3, 7]]).tolist() == [3, 7]
    extract.extract(first, first.positions(some[::2]), tmp_path / "second.beton")
    whole = samples(parent)
    assert samples(tmp_path / "second.beton") == {i: whole[i] for i in some[::2].tolist()}


@pytest.mark.parametrize("ids", [[60], [-1], [0, 5, 99, 100]])
def test_ids_that_are_not_there(noise, tmp_path, ids):
    table = read_table(write(noise, tmp_path))
    missing = [i for i in ids if not 0 <= i < 60]
    text = rf"train.beton: lacks {len(missing)} of the {len(ids)} samples asked for; the first has the id {missing[0]}"
    with pytest.raises(InputError, match=text):
        table.positions(np.array(ids))


def test_images_larger_than_a_page(noise, tmp_path, some, monkeypatch):
    parent = write(noise, tmp_path)
    monkeypatch.setattr(ffcv_format, "PAGE_BYTES", 1 << 10)  # images have 8×8×3 = 192 to 24×24×3 = 1728 bytes
    table = read_table(parent)
    extract.extract(table, table.positions(some), tmp_path / "out.beton")
    whole = samples(parent)
    assert samples(tmp_path / "out.beton") == {i: whole[i] for i in some.tolist()}  # looks at borders of pages
    assert np.fromfile(tmp_path / "out.beton", ffcv_format.HEADER, 1)["page_size"] == 2048


def test_the_page_is_that_of_the_largest_kept(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(ffcv_format, "PAGE_BYTES", 1 << 10)
    parent = write(noise, tmp_path, workers=2)
    table = read_table(parent)
    small = np.flatnonzero(table.sizes <= 1024)
    extract.extract(table, small, tmp_path / "out.beton")
    assert np.fromfile(parent, ffcv_format.HEADER, 1)["page_size"] == 2048
    assert np.fromfile(tmp_path / "out.beton", ffcv_format.HEADER, 1)["page_size"] == 1024
    assert len(samples(tmp_path / "out.beton")) == len(small)


@pytest.mark.parametrize("os_cache", [False, True])
def test_ffcv_loads_images_larger_than_8_mib(noise, tmp_path, os_cache):
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader

    table = read_table(write(noise, tmp_path, n=4, sides=(1700, 1700), workers=1))
    out = tmp_path / "out.beton"
    extract.extract(table, np.array([1, 3]), out)
    assert np.fromfile(out, ffcv_format.HEADER, 1)["page_size"] == 16 << 20
    whole = samples(tmp_path / "train.beton")
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None, "sample_id": [IntDecoder()]}
    loader = Loader(str(out), 1, 1, os_cache=os_cache, indices=np.arange(2), pipelines=pipelines)
    seen = []
    for images, ids in loader:
        seen.append(int(ids[0, 0]))
        assert images[0].tobytes() == whole[seen[-1]][4]
    assert seen == [1, 3]


def test_reading_goes_through_the_file_once_in_its_order(noise, tmp_path, some, monkeypatch):
    table = read_table(write(noise, tmp_path, workers=3))
    starts = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, start: starts.append(start) or real(fd, size, start))
    extract.extract(table, table.positions(some), tmp_path / "out.beton")
    assert starts == sorted(starts)
    assert len(starts) == len(some)


def test_the_kernel_may_give_fewer_bytes(noise, tmp_path, some, monkeypatch):
    parent = write(noise, tmp_path)
    table, whole, real = read_table(parent), samples(parent), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, start: real(fd, min(size, 100), start))
    extract.extract(table, table.positions(some), tmp_path / "out.beton")
    assert samples(tmp_path / "out.beton") == {i: whole[i] for i in some.tolist()}


def test_bytes_needed_is_what_the_disk_gives(noise, tmp_path):
    table = read_table(write(noise, tmp_path))
    out = tmp_path / "out.beton"
    extract.extract(table, np.arange(60), out)
    end = int(np.fromfile(out, ffcv_format.HEADER, 1)["alloc_table_ptr"][0])
    holes = end - ffcv_format.data_start(60) - int(table.sizes.sum())
    assert table.bytes_needed(np.arange(60)) == out.stat().st_size - holes


# What may go wrong


def test_file_that_was_cut_meanwhile(noise, tmp_path):
    parent = write(noise, tmp_path)
    table = read_table(parent)
    os.truncate(parent, int(table.metadata["f0"]["data_ptr"].max()) + 1)
    with pytest.raises(ArtifactError, match=r"train.beton: ends before byte \d+; it was truncated while it was read"):
        extract.extract(table, np.arange(60), tmp_path / "out.beton")


def test_disk_that_does_not_give_back(noise, tmp_path, monkeypatch):
    table = read_table(write(noise, tmp_path))

    def broken(descriptor, size, start):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(ArtifactError, match=r"train.beton: cannot be read \(Input/output error\)"):
        extract.extract(table, np.arange(60), tmp_path / "out.beton")


@pytest.mark.parametrize(
    ("number", "text"), [(errno.ENOSPC, r"no space left .*out needs about \d"), (errno.EIO, "cannot be written")]
)
def test_disk_that_does_not_take(noise, tmp_path, monkeypatch, number, text):
    table = read_table(write(noise, tmp_path))

    def broken(descriptor, data, offset):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(FastkdError, match=text):
        extract.extract(table, np.arange(60), tmp_path / "out.beton")


def test_disk_that_forgets(noise, tmp_path, monkeypatch):
    table = read_table(write(noise, tmp_path))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: real(fd, bytes(len(data)), start))
    with pytest.raises(FastkdError, match="reads back otherwise than it was written"):
        extract.extract(table, np.arange(60), tmp_path / "out.beton")


def header(file: Path, **values) -> None:
    found = np.fromfile(file, ffcv_format.HEADER, 1)
    for key, value in values.items():
        found[key] = value
    with file.open("r+b") as stream:
        stream.write(found.tobytes())


def poke(file: Path, at: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


FIRST_PTR = ffcv_format.data_start(0) + ffcv_format.IMAGE.fields["data_ptr"][1]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: f.unlink(), r"cannot be read \(No such file"),
        (lambda f: f.write_bytes(b"short"), "is no .beton file: 5 bytes"),
        (lambda f: header(f, version=3), "is no .beton file of format 2 with 3 fields"),
        (lambda f: header(f, num_fields=2), "is no .beton file of format 2 with 3 fields"),
        (lambda f: header(f, num_samples=0), "its tables of 0 samples do not fit"),
        (lambda f: header(f, num_samples=61), "its tables of 61 samples do not fit"),
        (lambda f: header(f, num_samples=1 << 60), r"its tables of \d+ samples do not fit"),
        (lambda f: header(f, alloc_table_ptr=10), "its tables of 60 samples do not fit"),
        (lambda f: os.truncate(f, f.stat().st_size - 1), "its tables of 60 samples do not fit"),
        (lambda f: poke(f, ffcv_format.HEADER.itemsize + 1, b"imagf"), r"holds the fields \(\('imagf', 2\)"),
        (lambda f: poke(f, FIRST_PTR, bytes(8)), "its tables point outside of it"),
        (lambda f: poke(f, FIRST_PTR, b"\xff" * 8), "its tables point outside of it"),
        (lambda f: poke(f, f.stat().st_size - 8, b"\xff" * 8), "its tables point outside of it"),
        (lambda f: poke(f, f.stat().st_size - 8, bytes(8)), "its tables point outside of it"),
    ],
)
def test_damaged_tables(noise, tmp_path, damage, text):
    file = write(noise, tmp_path)
    assert isinstance(read_table(file), Table)
    damage(file)
    with pytest.raises(ArtifactError, match=text):
        read_table(file)
