"""The writer csv: tables of image files."""

import csv
import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pictures import CLASSES, listed, make_folder

from fastkd import console
from fastkd.data import indexing
from fastkd.data.writer_api import load_writer, stratified_split
from fastkd.errors import InputError
from fastkd.pipeline import write


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures") / "root")


def rows_of(root: Path, base: Path) -> list[list[str]]:
    return [[os.path.relpath(path, base), name, split] for split, name, path in listed(root)]


def save(file: Path, rows, columns=("image", "label", "split"), **form) -> Path:
    stream = io.StringIO()
    csv.writer(stream, **form).writerows([columns, *rows])
    file.write_text(stream.getvalue(), encoding="utf-8", errors="surrogateescape")
    return file


@pytest.fixture
def table(pictures, tmp_path) -> Path:
    return save(tmp_path / "pets.csv", rows_of(pictures, tmp_path))


def read(file: Path, **options):
    writer = load_writer("csv")
    return writer.read(writer.options({"file": str(file), **options}))


def refused(file: Path, text: str, **options) -> None:
    with pytest.raises(InputError, match=text):
        read(file, **options)


def test_the_key_is_that_of_the_folder(pictures, table, tmp_path):
    folder = write("image_folder", tmp_path / "a", {"root": str(pictures), "workers": 1})[0]
    artifact = write("csv", tmp_path / "b", {"file": str(table), "workers": 2})[0]
    assert artifact.key == folder.key
    assert artifact.facts["counts"] == {"train": 256, "val": 64}
    assert artifact.facts["source"]["files"] == 321


@pytest.mark.parametrize("form", ["bom", "crlf", "tabs", "quotes", "other names", "blank lines", "absolute"])
def test_forms_of_a_table(pictures, table, tmp_path, form):
    rows, options = rows_of(pictures, tmp_path), {}
    file = tmp_path / "other.csv"
    match form:
        case "bom":
            file.write_text("\ufeff" + table.read_text(), encoding="utf-8")
        case "crlf":
            file.write_bytes(table.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        case "tabs":
            save(file, rows, delimiter="\t")
            options = {"delimiter": "\t"}
        case "quotes":  # a field with line breaks before the image
            save(file, [['a\nb,"c"\n', *row] for row in rows], ("note", "image", "label", "split"))
        case "other names":
            save(file, [[*row[::-1], "x"] for row in rows], (" subset ", "breed", "file", "more"))
            options = {"image": "file", "label": "breed", "split": "subset"}
        case "blank lines":
            file.write_text(table.read_text().replace("\n", "\n\n"))
        case "absolute":
            save(file, [[str(tmp_path / path), name, split.upper()] for path, name, split in rows])
    (expected, _), (found, classes) = read(table), read(file, **options)
    assert classes == list(CLASSES)
    for split in ("train", "val"):
        assert len(found[split]) == len(expected[split])
        for i in (0, 1, 100, -1):
            i %= len(found[split])
            assert found[split][i] == expected[split][i]
            assert os.path.samefile(found[split].describe(i), expected[split].describe(i))


def test_indexing_reports_its_progress(tmp_path, monkeypatch):
    """In MB of the table; nothing is said of an index that takes less than half a second."""
    reports = []
    rows = ([f"{'x' * 90}-{n}.jpg", n % 7, "train" if n % 5 else "val"] for n in range(40_000))
    file = save(tmp_path / "long.csv", rows)
    with indexing.indexing_reported(lambda *report: reports.append(report)):
        monkeypatch.setattr(indexing, "_REPORT_EVERY_S", 60)
        read(file)
        assert not reports
        monkeypatch.setattr(indexing, "_REPORT_EVERY_S", 0)
        read(file)
    total = file.stat().st_size // 1_000_000
    assert {(label, whole, info, unit) for label, _, whole, info, unit in reports} == {("index", total, "", "MB")}
    done = [report[1] for report in reports]
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(done)
    read(file)
    assert len(done) == len(reports)  # outside of a write


def test_val_is_cut_where_there_is_no_column(pictures, tmp_path):
    rows = [row[:2] for row in rows_of(pictures, tmp_path)]
    file = save(tmp_path / "pets.csv", rows, ("image", "label"))
    splits, _ = read(file, val_ratio=0.25)
    labels = [CLASSES.index(name) for _, name in rows]
    for split, indices in zip(("train", "val"), stratified_split(labels, 0.25, 0), strict=True):
        assert [os.path.relpath(splits[split].path(i), tmp_path) for i in range(len(indices))] == [
            rows[i][0] for i in indices
        ]
    refused(
        file, r"has no column 'split'; its columns are image, label. Name it with split=, or cut val .*val_ratio=0.1"
    )


def test_numbers_are_ordered_as_numbers(pictures, tmp_path):
    rows = [[path, str(2 + 4 * CLASSES.index(name)), split] for path, name, split in rows_of(pictures, tmp_path)]
    splits, classes = read(save(tmp_path / "pets.csv", rows))
    assert classes == ["2", "6", "10", "14"]
    assert splits["train"].labels.tolist() == np.repeat(range(4), 64).tolist()
    assert any("the labels are numbers, but not 0…3: 2, 6, 10, 14" in text for text in console.warnings_since(0))


def test_a_file_of_class_names(pictures, table, tmp_path):
    (tmp_path / "names.txt").write_text("fox\nemu\ndog\ncat\n")
    by_name, classes = read(table, classes=str(tmp_path / "names.txt"))
    assert classes == ["fox", "emu", "dog", "cat"]
    assert by_name["train"].labels.tolist() == np.repeat([3, 2, 1, 0], 64).tolist()
    rows = [[path, str(classes.index(name)), split] for path, name, split in rows_of(pictures, tmp_path)]
    by_number, again = read(save(tmp_path / "n.csv", rows), classes=str(tmp_path / "names.txt"))
    assert again == classes
    assert by_number["train"].labels.tolist() == by_name["train"].labels.tolist()
    (tmp_path / "names.txt").write_text("fox\nemu\ndog\n")
    refused(table, r"labels that are no class: cat; expected one of the 3 class names .* or a number in 0…2",
            classes=str(tmp_path / "names.txt"))  # fmt: skip
    for text, message in (("a\n\nb", "line 2 is empty"), ("a\nb\na", "stand there twice: a"), (None, "cannot be read")):
        (tmp_path / "names.txt").unlink(missing_ok=True)
        if text:
            (tmp_path / "names.txt").write_text(text)
        refused(table, message, classes=str(tmp_path / "names.txt"))


def test_rows_of_other_splits_are_left_out_and_counted(table):
    table.write_text(table.read_text().replace(",val", ",test", 10).replace(",val", ",", 5))
    splits, _ = read(table)
    assert {name: len(split) for name, split in splits.items()} == {"train": 256, "val": 49}
    assert any("left out rows of other splits: 10 of 'test', 5 of ''" in text for text in console.warnings_since(0))
    table.write_text(table.read_text().replace(",val", ",test"))
    refused(table, r"no rows of val in the column 'split'; other splits: test, . Expected train and val")
    refused(table, r"has the column 'split', so val need not be cut; leave out val_ratio", val_ratio=0.1)


@pytest.mark.parametrize("what", ["read", "snapshot"])
def test_memory_does_not_hold_the_table(tmp_path, what):
    file, name, writer = tmp_path / "long.csv", "folder/with/a/long/name/{:060}.jpg", load_writer("csv")
    options = writer.options({"file": str(file)})

    def peak(count: int) -> int:
        save(file, ([name.format(n), f"class {n % 50}", "val" if n % 9 else "train"] for n in range(count)))
        tracemalloc.start()
        try:
            getattr(writer, what)(options)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2_000), peak(22_000)
    path = len(os.fsencode(tmp_path / name.format(0))) if what == "snapshot" else 0  # it sorts all paths
    assert (many - few) / 20_000 < path + 60  # bytes a row, of 100 in the file; read copies arrays to divide them


# Faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column image, label; its first line names"),
        ("path,label\nx.jpg,cat\n", "has no column image; its first line names path, label. Name the columns with"),
        ("image;label\nx.jpg;cat\n", "has no column image, label.*delimiter="),
        ("image,label,split\n", "holds no rows"),
        ("image,label,split\nx.jpg,cat,train\nx.jpg,,train\n,cat,val\ny.jpg,cat\n", r"3 rows .*: row 3, 4, 5"),
        ("image,label,split\nx\0.jpg,cat,train\n", "1 rows without an image"),
        ('image,label,split\n"x.jpg" y,cat,train\n', "damaged, or with another delimiter"),
        ('image,label,split\n"x.jpg,cat,train\n', "damaged, or with another delimiter"),
        ("image,label,split\nx.jpg,cat,train\ny.jpg,dog,train\nz.jpg,Cat,val\n", r"the classes \['Cat'\] are not in"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    refused(tmp_path / "x.csv", message)


def test_tables_that_cannot_be_read(tmp_path):
    refused(tmp_path / "x.csv", r"x.csv: cannot be read \(No such file or directory\); file= names the table")
    refused(tmp_path, r"cannot be read \(Is a directory\)")
    (tmp_path / "x.csv").write_text("image,label\nx.jpg,cat\n", encoding="utf-16")
    refused(tmp_path / "x.csv", "has no column image, label")


def test_unreadable_images_are_listed_in_one_pass_or_skipped(pictures, table, tmp_path):
    os.symlink("nowhere", tmp_path / "link.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    names = ["link.jpg", "pipe.jpg", "text.jpg", "gone.jpg", "folder.jpg", "with\nbreak.jpg"]
    rows = [[name, "cat", "train"] for name in names] + rows_of(pictures, tmp_path)
    save(table, rows)
    options = {"file": str(table), "workers": 1}
    with pytest.raises(InputError, match=r"^6 of 326 images cannot be read") as caught:
        write("csv", tmp_path / "out", options)
    for name, reason in zip(
        names, ("No such file", "not a file", "corrupt", "No such file", "not a file", "No such"), strict=True
    ):
        (line,) = [line for line in str(caught.value).splitlines() if f"/{name}):".replace("\n", "\\n") in line]
        assert reason in line
    facts = write("csv", tmp_path / "out", options | {"on_error": "skip"})[0].facts
    assert len(facts["skipped"]) == 6
    assert facts["counts"]["train"] == 256


def test_names_that_are_not_utf8(pictures, tmp_path):
    image = next((pictures / "train/cat").iterdir()).read_bytes()
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(image)
    rows = [[os.fsdecode(b"caf\xe9.jpg"), "cat", "train"], *rows_of(pictures, tmp_path)]
    splits, _ = read(save(tmp_path / "x.csv", rows))
    assert splits["train"][0][0] == image
    assert splits["train"].describe(0).endswith("caf\\xe9.jpg")
    rows[1][1] = os.fsdecode(b"caf\xe9")
    with pytest.raises(InputError, match="not valid Unicode"):
        write("csv", tmp_path / "out", {"file": str(save(tmp_path / "x.csv", rows)), "workers": 1})


def test_links_are_followed_and_copies_are_told(pictures, tmp_path):
    rows = rows_of(pictures, tmp_path)
    os.symlink(tmp_path / rows[0][0], tmp_path / "again.jpg")
    rows.append(["again.jpg", "dog", "train"])
    artifact, _ = write("csv", tmp_path / "out", {"file": str(save(tmp_path / "x.csv", rows)), "workers": 1})
    assert artifact.facts["found"]["two_labels"] == {"train": 2}


def test_a_source_that_changed_is_refused(pictures, tmp_path):
    root = make_folder(tmp_path / "root")
    table = save(tmp_path / "pets.csv", rows_of(root, tmp_path))
    options = {"file": str(table), "workers": 1}
    write("csv", tmp_path / "out", options)
    assert not write("csv", tmp_path / "out", options)[1]
    next((root / "train/cat").iterdir()).unlink()
    with pytest.raises(InputError, match=r"its source changed .*321 files of .* now 320 files"):
        write("csv", tmp_path / "out", options)
    artifact, _ = write("csv", tmp_path / "out", options | {"on_error": "skip"}, force=True)
    table.write_text(table.read_text().replace(",dog,", ",cat,", 1))
    with pytest.raises(InputError, match=r"its source changed .*pets.csv"):
        write("csv", tmp_path / "out", options | {"on_error": "skip"})
    table.unlink()
    assert write("csv", tmp_path / "out", options | {"on_error": "skip"})[0].key == artifact.key
    assert any("its source is gone" in text for text in console.warnings_since(0))
