"""The writer hf_dataset: with a stand-in for the library `datasets`, and with the library where it is installed."""

import importlib.util
import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pictures import CLASSES, listed, make_folder

from fastkd import console
from fastkd.data import indexing
from fastkd.data.beton_writer import write_here
from fastkd.data.writer_api import load_writer, stratified_split
from fastkd.errors import InputError
from fastkd.pipeline import write

STAND_IN = '''
"""The part of the library `datasets` that the writer uses."""
import json
from pathlib import Path

class Image:
    dtype = "PIL.Image.Image"
    def __init__(self, decode=True):
        self.decode = decode

class Value:
    def __init__(self, dtype):
        self.dtype = dtype
    def __repr__(self):
        return f"Value({self.dtype!r})"

class ClassLabel:
    def __init__(self, names):
        self.names = names

class Dataset:
    def __init__(self, columns, features):
        self.columns, self.features = columns, features
    def __len__(self):
        return len(next(iter(self.columns.values())))
    def __getitem__(self, index):
        assert type(index) is int
        for name, feature in self.features.items():
            assert not (isinstance(feature, Image) and feature.decode), "images are not to be decoded"
        return {name: values[index] for name, values in self.columns.items()}
    def select_columns(self, names):
        return Dataset({n: self.columns[n] for n in names}, {n: self.features[n] for n in names})
    def cast_column(self, name, feature):
        return Dataset(self.columns, self.features | {name: feature})
    def iter(self, batch_size):
        for start in range(0, len(self), batch_size):
            yield {name: values[start : start + batch_size] for name, values in self.columns.items()}

class DatasetDict(dict):
    pass

def table(spec):
    kinds = {"image": Image(), "bytes": Value("binary"), "text": Value("string"), "number": Value("int64")}
    features = {n: kinds[k] if isinstance(k, str) else ClassLabel(k) for n, k in spec["features"].items()}
    columns = {n: [spec["rows"][i][n] for i in range(len(spec["rows"]))] for n in features}
    for name, kind in spec["features"].items():
        if kind in ("image", "bytes"):
            read = [Path(p).read_bytes() if p else None for p in columns[name]]
            columns[name] = [{"bytes": b, "path": p} for b, p in zip(read, columns[name])] if kind == "image" else read
    return Dataset(columns, features)

def load_from_disk(folder):
    spec = json.loads((Path(folder) / "spec.json").read_text())
    return table(spec["only"]) if "only" in spec else DatasetDict({s: table(one) for s, one in spec.items()})

def load_dataset(name, config=None, revision=None):
    if name != "owner/pets":
        raise FileNotFoundError(f"{name} is not on the hub")
    return load_from_disk(Path(__file__).parent / "hub" / f"{config}-{revision}")
'''


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures") / "root")


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """Put a stand-in for the library in place, in this process and those that it starts."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "datasets.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    yield folder
    sys.modules.pop("datasets", None)


def save(folder: Path, **splits) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(splits))
    return str(folder)


def table(root: Path, split: str, label=list(CLASSES), image="image") -> dict:  # noqa: B006
    rows = []
    for which, name, path in listed(root):
        if which == split:
            rows.append({"image": str(path), "label": CLASSES.index(name) if label != "text" else name})
    return {"features": {"image": image, "label": label}, "rows": rows}


def read(**options):
    writer = load_writer("hf_dataset")
    return writer.read(writer.options(options))


def refused(text: str, **options) -> None:
    with pytest.raises(InputError, match=text):
        read(**options)


@pytest.fixture
def saved(library, pictures, tmp_path) -> str:
    return save(tmp_path / "pets", train=table(pictures, "train"), validation=table(pictures, "val"))


def test_the_key_is_that_of_the_folder(pictures, saved, tmp_path):
    folder = write("image_folder", tmp_path / "a", {"root": str(pictures), "workers": 1})[0]
    artifact = write("hf_dataset", tmp_path / "b", {"path": saved, "workers": 2})[0]
    assert artifact.key == folder.key
    assert artifact.facts["source"]["files"] == 1


@pytest.mark.parametrize("label", ["text", "number", list(CLASSES)])
@pytest.mark.parametrize("image", ["image", "bytes"])
def test_kinds_of_columns(library, pictures, tmp_path, label, image):
    path = save(tmp_path / "x", **{s: table(pictures, s, label, image) for s in ("train", "val")})
    splits, classes = read(path=path)
    assert classes == ([str(n) for n in range(4)] if label == "number" else list(CLASSES))
    assert splits["train"].labels.tolist() == np.repeat(range(4), 64).tolist()
    files = [p for s, _, p in listed(pictures) if s == "train"]
    assert all(splits["train"][i] == (files[i].read_bytes(), i // 64) for i in range(0, 256, 17))


def test_a_file_that_only_its_path_names_is_read(saved, pictures):
    train = read(path=saved)[0]["train"]
    first = train.table.columns["image"][0]
    data, first["bytes"] = first["bytes"], None
    assert train[0][0] == data
    assert train.describe(0) == f"row 0, {first['path']}"
    first["path"] = None
    with pytest.raises(OSError, match="there is no image in this row"):
        train[0]
    assert train.describe(0) == "row 0"


def test_a_data_set_of_the_hub(library, pictures, tmp_path):
    save(library / "hub" / "small-v2", train=table(pictures, "train"), test=table(pictures, "val"))
    options = {"path": "owner/pets", "config": "small", "revision": "v2", "val_split": "test", "workers": 1}
    assert len(read(**options)[0]["val"]) == 64
    assert "source" not in write("hf_dataset", tmp_path / "out", options)[0].facts
    refused(r"owner/dogs: cannot be opened \(owner/dogs is not on the hub\); path= names a folder", path="owner/dogs")


def test_val_is_cut_from_train(library, pictures, tmp_path):
    path = save(tmp_path / "x", only=table(pictures, "train"))
    splits, _ = read(path=path, val_ratio=0.25)
    both = stratified_split(np.repeat(range(4), 64), 0.25, 0)
    files = [p for s, _, p in listed(pictures) if s == "train"]
    for split, indices in zip(("train", "val"), both, strict=True):
        assert [splits[split][i] for i in (0, -1)] == [(files[indices[i]].read_bytes(), [0, 3][i]) for i in (0, -1)]
        assert len(splits[split]) == len(indices)
    refused(r"has the splits train; name one with val_split=, or cut val from train with val_ratio=0.1", path=path)


def test_splits_and_columns_that_are_not_there(saved, pictures, tmp_path):
    refused(r"has the splits train, validation; name one with train_split=$", path=saved, train_split="training")
    refused(r"has the splits train, validation; name one with val_split=, or cut", path=saved, val_split="test")
    refused(r"train_split and val_split are both 'train'", path=saved, val_split="train")
    refused(r"has the split 'validation', so val need not be cut from train", path=saved, val_ratio=0.1)
    refused(r"has no column img; its columns are image, label. Name them with image=", path=saved, image="img")
    refused(r"the column label is .*expected Image, or bytes", path=saved, image="label")
    other = save(tmp_path / "o", train=table(pictures, "train"), val=table(pictures, "val", ["a", "b", "c", "d"]))
    refused(r"train and val have other class names: cat, dog, emu, fox; a, b, c, d", path=other)


@pytest.mark.parametrize(
    ("label", "value"),
    [(list(CLASSES), -1), (list(CLASSES), 4), (list(CLASSES), None), ("number", None), ("text", " ")],
)
def test_labels_that_are_none(library, pictures, tmp_path, label, value):
    train = table(pictures, "train", label)
    train["rows"][5]["label"] = value
    path = save(tmp_path / "x", train=train, val=table(pictures, "val", label))
    refused(rf"row 5: the label is {value!r}; expected a class name or its number", path=path)


def test_indexing_reports_its_progress(saved, monkeypatch):
    """In rows of both splits; writing passes it on."""
    reports = []
    monkeypatch.setattr(indexing, "_REPORT_EVERY_S", 0)
    with indexing.indexing_reported(lambda *report: reports.append(report)):
        read(path=saved)
    assert reports == [("index", 256, 320, "", "rows"), ("index", 320, 320, "", "rows")]


def test_writing_passes_the_progress_of_indexing_on(saved, tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr(indexing, "_REPORT_EVERY_S", 0)
    (tmp_path / "out").mkdir()
    write_here(("hf_dataset", {"path": saved, "workers": 1}, str(tmp_path / "out")), reports.append)
    assert reports[:2] == [("index", 256, 320, "", "rows"), ("index", 320, 320, "", "rows")]
    listed: list[tuple] = []
    write("hf_dataset", tmp_path / "data", {"path": saved, "workers": 1}, progress=lambda *r: listed.append(r))
    assert ("list", 0, 2, "", "files") in listed  # of the folder and its file


def test_sources_that_cannot_be_opened(library, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(r"empty: cannot be opened \(.*No such file", path=str(tmp_path / "empty"))
    nothing = {"features": {"image": "image", "label": "text"}, "rows": []}
    path = save(tmp_path / "x", train=nothing, val=nothing)
    refused(r"a split holds no rows", path=path)


def test_unreadable_images_are_listed_in_one_pass_or_skipped(library, pictures, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    train = table(pictures, "train")
    train["rows"][3]["image"], train["rows"][9]["image"] = str(bad), ""
    options = {"path": save(tmp_path / "x", train=train, val=table(pictures, "val")), "workers": 1}
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="2 of 320 images cannot be read") as caught:
        write_here(("hf_dataset", options, str(tmp_path / "out")), lambda report: None)
    assert f"train sample 3 (row 3, {bad}): corrupt image" in str(caught.value)
    assert "train sample 9 (row 9): corrupt image: there is no image in this row" in str(caught.value)
    facts = write("hf_dataset", tmp_path / "skipped", options | {"on_error": "skip"})[0].facts
    assert [one["index"] for one in facts["skipped"]] == [3, 9]


def test_a_source_that_changed_is_refused(saved, pictures, tmp_path):
    options = {"path": saved, "workers": 1}
    write("hf_dataset", tmp_path / "out", options)
    assert not write("hf_dataset", tmp_path / "out", options)[1]
    save(Path(saved), train=table(pictures, "train"), validation=table(pictures, "train"))
    with pytest.raises(InputError, match=r"its source changed since it was written"):
        write("hf_dataset", tmp_path / "out", options)
    Path(saved, "spec.json").unlink()
    Path(saved).rmdir()
    assert not write("hf_dataset", tmp_path / "out", options)[1]
    assert any("its source is gone" in text for text in console.warnings_since(0))


def test_splits_that_are_links_are_part_of_the_source(saved, tmp_path):
    """Each real folder once: a link may lead to a folder above it."""
    real, writer = tmp_path / "real", load_writer("hf_dataset")
    (real / "deeper").mkdir(parents=True)
    (real / "deeper" / "data.arrow").write_bytes(b"1")
    for name, target in (("train", real), ("val", real), ("loop", saved)):
        Path(saved, name).symlink_to(target)

    options = writer.options({"path": saved})
    before = writer.snapshot(options)
    assert before.files == 2
    (real / "deeper" / "data.arrow").write_bytes(b"22")
    assert writer.snapshot(options).difference(before.recorded())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(saved):
    Path(saved, "train").mkdir(mode=0)
    writer = load_writer("hf_dataset")
    with pytest.raises(InputError, match=r"train: cannot be read \(Permission denied\); fix its permissions"):
        writer.snapshot(writer.options({"path": saved}))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"the writer hf_dataset needs datasets, not installed: pip install datasets$", path="x")


# With the library itself


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the library datasets")
def test_memory_is_an_index(tmp_path):
    import datasets

    def peak(count: int) -> int:
        features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("int64")})
        columns = {"image": [bytes(700)] * count, "label": [n % 7 for n in range(count)]}
        folder = tmp_path / f"{count}"
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
        tracemalloc.start()
        try:
            read(path=str(folder), val_ratio=0.5)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # imports
    few, many = peak(11_000), peak(31_000)  # more than a batch
    assert (many - few) / 20_000 < 100  # bytes a row, of 700 of an image


real = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the library datasets")


@real
@pytest.mark.parametrize("one_table", [False, True])
def test_what_the_library_saves(pictures, tmp_path, monkeypatch, one_table):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = datasets.ClassLabel(names=list(CLASSES))
    features = datasets.Features({"image": datasets.Image(), "label": names})

    def made(split):
        rows = [(str(path), CLASSES.index(name)) for which, name, path in listed(pictures) if which == split]
        columns = {"image": [path for path, _ in rows], "label": [label for _, label in rows]}
        return datasets.Dataset.from_dict(columns, features=features)

    if one_table:
        made("train").save_to_disk(tmp_path / "pets")
        splits, classes = read(path=str(tmp_path / "pets"), val_ratio=0.25)
        assert classes == list(CLASSES)
        assert {name: len(split) for name, split in splits.items()} == {"train": 192, "val": 64}
        assert splits["val"][0][0] in {p.read_bytes() for s, _, p in listed(pictures) if s == "train"}
        return
    datasets.DatasetDict({"train": made("train"), "validation": made("val")}).save_to_disk(tmp_path / "pets")
    folder = write("image_folder", tmp_path / "a", {"root": str(pictures), "workers": 1})[0]
    artifact = write("hf_dataset", tmp_path / "b", {"path": str(tmp_path / "pets"), "workers": 2})[0]
    assert artifact.key == folder.key
    assert artifact.facts["source"]["files"] > 4
    file = next((tmp_path / "pets" / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cannot be opened"):
        read(path=str(tmp_path / "pets"))
