"""The writer webdataset: tar shards, read by offsets."""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pictures import CLASSES, listed, make_folder

from fastkd import console
from fastkd.data import indexing
from fastkd.data.shards import expand
from fastkd.data.writer_api import load_writer, stratified_split
from fastkd.errors import InputError
from fastkd.pipeline import write


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures") / "root")


def add(archive: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def pack(file: Path, rows, label: str = "cls", form: int = tarfile.PAX_FORMAT) -> Path:
    """Write a shard of (key, suffix, image, class name)."""
    with tarfile.open(file, "w", format=form) as archive:
        for key, suffix, image, name in rows:
            text = json.dumps({"label": name, "number": CLASSES.index(name), "id": key}) if label == "json" else name
            add(archive, f"{key}.{suffix}", image)
            add(archive, f"{key}.{label}", text.encode())
    return file


def rows_of(root: Path, split: str):
    return [(p.stem, p.suffix[1:], p.read_bytes(), name) for s, name, p in listed(root) if s == split]


def make_shards(root: Path, folder: Path, count: int = 4, **form) -> dict[str, str]:
    """Write the images in order; return the options."""
    train = rows_of(root, "train")
    size = len(train) // count
    for n in range(count):
        pack(folder / f"train-{n:03}.tar", train[n * size : (n + 1) * size], **form)
    pack(folder / "val-0.tar", rows_of(root, "val"), **form)
    return {"train": str(folder / f"train-{{000..{count - 1:03}}}.tar"), "val": str(folder / "val-0.tar")}


def read(**options):
    writer = load_writer("webdataset")
    return writer.read(writer.options(options))


def refused(text: str, **options) -> None:
    with pytest.raises(InputError, match=text):
        read(**options)


@pytest.fixture
def shards(pictures, tmp_path) -> dict[str, str]:
    return make_shards(pictures, tmp_path)


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_the_key_is_that_of_the_folder(pictures, tmp_path, label, form):
    folder = write("image_folder", tmp_path / "a", {"root": str(pictures), "workers": 1})[0]
    options = make_shards(pictures, tmp_path, label=label, form=form)
    artifact = write("webdataset", tmp_path / "b", options | {"workers": 2, "label": label})[0]
    assert artifact.key == folder.key
    assert artifact.facts["counts"] == {"train": 256, "val": 64}
    assert artifact.facts["source"]["files"] == 5


def test_val_is_cut_from_train(pictures, shards):
    splits, _ = read(train=shards["train"], val_ratio=0.25)
    rows = rows_of(pictures, "train")
    both = stratified_split([CLASSES.index(name) for *_, name in rows], 0.25, 0)
    for split, indices in zip(("train", "val"), both, strict=True):
        assert [splits[split][i][0] for i in range(len(indices))] == [rows[i][2] for i in indices]
    refused(
        "give the shards of val with val=, or cut val from those of train with val_ratio=0.1$", train=shards["train"]
    )
    refused("with val_ratio=0.1; not both", **shards, val_ratio=0.1)


def test_numbers_with_a_file_of_class_names(pictures, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    rows = {s: [(*row[:3], str(CLASSES.index(row[3]))) for row in rows_of(pictures, s)] for s in ("train", "val")}
    options = {split: str(pack(tmp_path / f"{split}.tar", rows[split])) for split in rows}
    _, classes = read(**options)
    assert classes == ["0", "1", "2", "3"]
    splits, classes = read(**options, classes=str(tmp_path / "names.txt"))
    assert classes == list(CLASSES)
    assert splits["train"].labels.tolist() == np.repeat(range(4), 64).tolist()
    refused(r"labels that are no class: 3; expected one of the 3", **options, classes=str(_lines(tmp_path, "a\nb\nc")))


def _lines(folder: Path, text: str) -> Path:
    (folder / "few.txt").write_text(text)
    return folder / "few.txt"


def test_patterns(tmp_path):
    for n in (8, 9, 10, 11):
        (tmp_path / f"a-{n}.tar").touch()
        (tmp_path / f"b-{n:04}.tar").touch()
    names = lambda pattern: [path.name for path in expand(tmp_path / pattern)]  # noqa: E731
    assert names("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]
    assert names("b-{0008..0010}.tar") == ["b-0008.tar", "b-0009.tar", "b-0010.tar"]
    assert names("{a-8,b-0011}.tar") == ["a-8.tar", "b-0011.tar"]
    assert names("{b,a}-00{08..09}.tar".replace("a}", "b}")) == ["b-0008.tar", "b-0009.tar"] * 2
    assert names("b-*.tar") == ["b-0008.tar", "b-0009.tar", "b-0010.tar", "b-0011.tar"]
    with pytest.raises(InputError, match=r"2 of 4 shards are missing: .*b-0012.tar, .*b-0013.tar"):
        names("b-{0010..0013}.tar")
    with pytest.raises(InputError, match=r"1 of 1 shards are missing: .*c-\*.tar"):
        names("c-*.tar")
    with pytest.raises(InputError, match="stands for more than 1,000,000 shards"):
        names("b-{0000000..9999999999}.tar")


def test_a_sample_is_read_at_its_place_and_named(shards, tmp_path, pictures):
    splits, _ = read(**shards)
    train, rows = splits["train"], rows_of(pictures, "train")
    for i in (255, 0, 64, 130):
        assert train[i] == (rows[i][2], CLASSES.index(rows[i][3]))
        assert train.describe(i) == f"{tmp_path}/train-{i // 64:03}.tar: {rows[i][0]}.{rows[i][1]}"


def test_indexing_reports_its_progress(tmp_path, monkeypatch):
    """In MB of all shards."""
    reports = []
    monkeypatch.setattr(indexing, "_REPORT_EVERY_S", 0)
    for name in ("train-0", "train-1", "val"):
        pack(tmp_path / f"{name}.tar", [(f"{n:04}", "jpg", bytes(20_000), str(n % 2)) for n in range(100)])
    with indexing.indexing_reported(lambda *report: reports.append(report)):
        read(train=str(tmp_path / "train-{0..1}.tar"), val=str(tmp_path / "val.tar"))
    total = sum(file.stat().st_size for file in tmp_path.glob("*.tar")) // 1_000_000
    assert {(label, whole, info, unit) for label, _, whole, info, unit in reports} == {("index", total, "", "MB")}
    done = [report[1] for report in reports]
    assert done == sorted(done)
    assert set(range(total)) <= set(done)


def test_memory_is_an_index(tmp_path):
    def peak(count: int) -> int:
        rows = ((f"sample-with-a-long-name-{n:040}", "jpg", bytes(700), f"class {n % 9}") for n in range(count))
        file = str(pack(tmp_path / "x.tar", rows))
        tracemalloc.start()
        try:
            read(train=file, val_ratio=0.5)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(500), peak(5_500)
    assert (many - few) / 5_000 < 150  # bytes an image: 32 of the index, and copies while it is divided


# Faults


def test_names_folders_and_members_of_other_kinds(pictures, tmp_path):
    image = rows_of(pictures, "train")[0][2]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for n, name in enumerate(("./a/0001", "b/0001", "b/0002", os.fsdecode(b"caf\xe9"), "x" * 180, "c/0003.v2")):
            add(archive, f"{name}.JPG", image)
            add(archive, f"{name}.cls", f" {n % 2}\n".encode())
            add(archive, f"{name}.txt", b"caption")
        add(archive, "._0001.jpg", b"of macOS")
        add(archive, "__MACOSX/0001.jpg", b"of macOS")
        add(archive, "dataset_info.json", b"{}")
        add(archive, "folder", b"", type=tarfile.DIRTYPE)
    splits, classes = read(train=str(tmp_path / "x.tar"), val_ratio=0.5)
    assert classes == ["0", "1"]
    assert len(splits["train"]) + len(splits["val"]) == 5
    names = {split.describe(i).rpartition("/")[2] for split in splits.values() for i in range(len(split))}
    assert any(name.endswith("caf\\xe9.JPG") for name in names)
    assert any("x" * 180 in name for name in names)
    (text,) = [text for text in console.warnings_since(0) if "left out members" in text]
    for part in ("5 .txt", "2 hidden files", "1 .v2.jpg", "1 .v2.cls", "1 .v2.txt", "and 1 more"):  # .json
        assert part in text


def test_members_that_are_refused_by_name(pictures, tmp_path):
    image = rows_of(pictures, "train")[0][2]

    def refuse(text: str, *members, **options) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            add(archive, "0.jpg", image)
            add(archive, "0.cls", b"0")
            for name, data, fields in members:
                add(archive, name, data, **fields)
        refused(rf"x.tar: {text}", train=str(tmp_path / "x.tar"), val_ratio=0.5, **options)

    link = {"type": tarfile.SYMTYPE, "linkname": "0.jpg"}
    refuse("1.jpg is a link to 0.jpg; pack the files themselves", ("1.jpg", b"", link), ("1.cls", b"1", {}))
    refuse("1.jpg is a link to", ("1.jpg", b"", link | {"type": tarfile.LNKTYPE}), ("1.cls", b"1", {}))
    refuse("1.jpg is not a plain file", ("1.jpg", b"", {"type": tarfile.FIFOTYPE}), ("1.cls", b"1", {}))
    refuse("holds 1.jpg twice", ("1.jpg", image, {}), ("1.jpg", image, {}), ("1.cls", b"1", {}))
    refuse("1.jpg: the sample has several images: jpg, png; choose one with image=",
           ("1.jpg", image, {}), ("1.png", image, {}), ("1.cls", b"1", {}))  # fmt: skip
    refuse("1.jpg: the sample has no .cls with its label", ("1.jpg", image, {}), ("2.cls", b"1", {}))
    refuse("1.jpg: its label is not UTF-8", ("1.jpg", image, {}), ("1.cls", b"\xe9", {}))
    refuse("1.jpg: its label is empty", ("1.jpg", image, {}), ("1.cls", b" \n", {}))
    for data, text in (
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "has no key 'label', but list"),
        (b'{"class": 1}', "has no key 'label', but the keys class; name it with label_key="),
        (b'{"label": 1.5}', r"is '1.5' \(float\); expected a class name or a number"),
        (b'{"label": true}', r"is 'True' \(bool\)"),
        (b'{"label": null}', r"is 'None' \(NoneType\)"),
    ):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            add(archive, "0.jpg", image)
            add(archive, "0.json", data)
        refused(f"x.tar: 0.jpg: its label {text}", train=str(tmp_path / "x.tar"), val_ratio=0.5, label="json")


def test_damaged_shards_are_named(shards, tmp_path):
    file = tmp_path / "train-002.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as archive:
        borders = [member.offset for member in archive]

    def refuse(content: bytes, text: str) -> None:
        file.write_bytes(content)
        refused(f"train-002.tar: {text}", **shards)

    refuse(b"", "damaged, or no uncompressed tar .*empty")
    refuse(b"no tar" * 200, "damaged, or no uncompressed tar")
    refuse(__import__("gzip").compress(whole), r"damaged, or no uncompressed tar .*decompress .tar.gz")
    refuse(whole[: borders[9]], "damaged at byte .* the end of the archive was expected")
    refuse(whole[: borders[9] + 100], "damaged")
    refuse(whole[: borders[9] + 600], "damaged")
    refuse(whole[: borders[9]] + b"x" * 512 + whole[borders[9] + 512 :], f"damaged at byte {borders[9]:,}")
    refuse(whole + whole, "damaged at byte .*appended to one another")
    file.unlink()
    refused(r"1 of 4 shards are missing: .*train-002.tar", **shards)
    file.mkdir()
    refused(r"1 of 4 shards are missing: .*train-002.tar", **shards)
    file.rmdir()
    os.symlink("train-001.tar", file)
    refused(r"train-002.tar and .*train-001.tar are the same shard", **shards)


def test_all_damaged_shards_are_named_at_once(pictures, tmp_path):
    """Of train and of val, up to five."""
    options = make_shards(pictures, tmp_path, count=8)
    for name in ("train-001", "train-006", "val-0"):
        (tmp_path / f"{name}.tar").write_bytes(b"no tar" * 200)
    refused(r"(?s)^3 shards cannot be used:.*/train-001.tar: damaged.*/train-006.tar: .*/val-0.tar: [^\n]*$", **options)
    for path in tmp_path.glob("train-*.tar"):
        path.write_bytes(b"")
    refused(r"(?s)^9 shards cannot be used:.*/train-004.tar: [^\n]*\n  and 4 more$", **options)


def test_a_shard_that_is_cut_while_it_is_written(shards, tmp_path):
    splits, _ = read(**shards)
    with (tmp_path / "train-003.tar").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(OSError, match="the shard was cut while it was read"):
        splits["train"][255]
    assert splits["train"].describe(255).startswith(f"{tmp_path}/train-003.tar: member at byte")


def test_unreadable_images_are_listed_in_one_pass_or_skipped(pictures, tmp_path):
    rows = rows_of(pictures, "train")
    for n in (3, 70, 200):
        rows[n] = (*rows[n][:2], rows[n][2][:40], rows[n][3])
    options = {
        "train": str(pack(tmp_path / "x.tar", rows)),
        "val": str(pack(tmp_path / "y.tar", rows_of(pictures, "val"))),
    }
    with pytest.raises(InputError, match="3 of 320 images cannot be read") as caught:
        write("webdataset", tmp_path / "out", options | {"workers": 1})
    assert f"train sample 70 ({tmp_path}/x.tar: {rows[70][0]}." in str(caught.value)
    facts = write("webdataset", tmp_path / "out", options | {"workers": 1, "on_error": "skip"})[0].facts
    assert [one["index"] for one in facts["skipped"]] == [3, 70, 200]


def test_a_source_that_changed_is_refused(pictures, shards, tmp_path):
    options = shards | {"workers": 1}
    key = write("webdataset", tmp_path / "out", options)[0].key
    assert not write("webdataset", tmp_path / "out", options)[1]
    rows = rows_of(pictures, "val")
    pack(tmp_path / "val-0.tar", rows[1:])
    with pytest.raises(InputError, match=r"its source changed since it was written: .*val-0.tar"):
        write("webdataset", tmp_path / "out", options)
    again = write("webdataset", tmp_path / "out", options, force=True)[0].key
    assert again != key
    (tmp_path / "train-001.tar").unlink()
    with pytest.raises(InputError, match=r"5 files of .* now 4 files"):
        write("webdataset", tmp_path / "out", options)
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    assert write("webdataset", tmp_path / "out", options)[0].key == again
    assert any("its source is gone" in text for text in console.warnings_since(0))
