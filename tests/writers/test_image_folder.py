"""image_folder without class folders of val: val cut from train, lists of labels, and ImageNet's devkit."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from pictures import CLASSES, make_folder

from fastkd import console
from fastkd.data.writer_api import load_writer, stratified_split
from fastkd.errors import InputError
from fastkd.pipeline import write


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures") / "root")


@pytest.fixture
def folder(pictures, tmp_path) -> Path:
    """A copy of 256 + 64 images in four classes."""
    shutil.copytree(pictures, tmp_path / "root")
    return tmp_path / "root"


def read(root: Path, **options):
    writer = load_writer("image_folder")
    return writer.read(writer.options({"root": str(root), **options}))


def refused(root: Path, text: str, **options) -> None:
    with pytest.raises(InputError, match=text):
        read(root, **options)


# val_ratio


def test_val_is_cut_from_train_in_each_class(folder):
    shutil.rmtree(folder / "val")
    all_paths = sorted(str(path) for path in (folder / "train").glob("*/*"))
    splits, classes = read(folder, val_ratio=0.25)
    assert classes == list(CLASSES)
    assert Counter(splits["val"].labels) == dict.fromkeys(range(4), 16)
    assert Counter(splits["train"].labels) == dict.fromkeys(range(4), 48)
    assert sorted(splits["train"].paths + splits["val"].paths) == all_paths
    for split, indices in zip(("train", "val"), stratified_split(np.repeat(range(4), 64), 0.25, 0), strict=True):
        assert splits[split].paths == [all_paths[i] for i in indices]
        assert all(Path(p).parent.name == CLASSES[k] for p, k in zip(*vars(splits[split]).values(), strict=True))
    again, other = read(folder, val_ratio=0.25)[0], read(folder, val_ratio=0.25, seed=1)[0]
    assert again["val"].paths == splits["val"].paths
    assert other["val"].paths != splits["val"].paths


def test_a_root_of_class_folders_is_enough(folder):
    splits, classes = read(folder / "train", train_dir=".", val_ratio=0.1)
    assert classes == list(CLASSES)
    assert {name: len(split) for name, split in splits.items()} == {"train": 232, "val": 24}


def test_val_is_not_cut_where_there_is_one_or_nothing_to_cut(folder, tmp_path):
    refused(folder, r"val: exists, so val need not be cut from train; leave out val_ratio", val_ratio=0.1)
    shutil.rmtree(folder / "val")
    refused(folder, r"val: no such folder; expected ROOT/train.*val_ratio=0.1 cuts some")
    refused(folder, r"give one of them", val_ratio=0.1, val_labels="list.txt")
    refused(folder, r"val_ratio: 1.0", val_ratio=1.0)
    for name in CLASSES:
        for file in sorted((folder / "train" / name).iterdir())[1:]:
            file.unlink()
    refused(folder, r"train: every class has one image only, so none is left for val", val_ratio=0.1)


def test_a_source_with_a_val_that_was_cut_is_watched(folder, tmp_path):
    shutil.rmtree(folder / "val")
    options = {"root": str(folder), "val_ratio": 0.1, "workers": 1}
    artifact, _ = write("image_folder", tmp_path / "out", options)
    assert artifact.facts["counts"] == {"train": 232, "val": 24}
    assert artifact.facts["source"]["files"] == 256
    assert not write("image_folder", tmp_path / "out", options)[1]
    next((folder / "train/cat").iterdir()).unlink()
    with pytest.raises(InputError, match=r"256 files of .* when it was written, now 255 files"):
        write("image_folder", tmp_path / "out", options)


# A val without class folders


@pytest.fixture
def flat(folder) -> tuple[Path, list[tuple[str, str]]]:
    """A folder whose val holds files only, and their names and classes, in another order than that of the classes."""
    held = []
    for number, path in enumerate(sorted((folder / "val").glob("*/*"), key=lambda path: path.stem[::-1])):
        name = f"ILSVRC2012_val_{number + 1:08}.JPEG"
        path.rename(folder / "val" / name)
        held.append((name, path.parent.name))
    for name in CLASSES:
        (folder / "val" / name).rmdir()
    assert [name for _, name in held] != sorted(name for _, name in held)
    return folder, held


def lines(held, form: str) -> str:
    texts = {
        "space": [f"{file} {name}" for file, name in held],
        "tab": [f"{file}\t{name}" for file, name in reversed(held)],
        "comma": [f"{file},{name}" for file, name in held],
        "heading": ["file,class", *(f"{file},{name}" for file, name in held)],
        "kaggle": ["ImageId,PredictionString"]
        + [f"{file.removesuffix('.JPEG')},{name} 85 1 499 272 {name} 1 2 3 4" for file, name in held],
        "one column": [name for _, name in held],
        "blank lines": [f"\n{file}   {name}\n\n" for file, name in held],
        "bom": ["\ufeff" + "\r\n".join(f"{file} {name}" for file, name in held)],
    }
    return "\n".join(texts[form]) + "\n"


FORMS = ("space", "tab", "comma", "heading", "kaggle", "one column", "blank lines", "bom")


@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_labels(flat, tmp_path, form):
    root, held = flat
    (tmp_path / "list.txt").write_text(lines(held, form))
    splits, classes = read(root, val_labels=str(tmp_path / "list.txt"))
    assert classes == list(CLASSES)
    val = splits["val"]
    assert [(Path(path).name, CLASSES[label]) for path, label in zip(val.paths, val.labels, strict=True)] == held


def test_a_flat_val_gives_the_data_set_of_class_folders(flat, pictures, tmp_path):
    root, held = flat
    (tmp_path / "list.txt").write_text(lines(held, "space"))
    options = {"root": str(root), "val_labels": str(tmp_path / "list.txt"), "workers": 1}
    artifact, _ = write("image_folder", tmp_path / "out", options)
    for file, name in held:  # the same images, in class folders that keep their order
        place = root / "val" / name
        place.mkdir(exist_ok=True)
        (root / "val" / file).rename(place / file)
    folders = write("image_folder", tmp_path / "folders", {"root": str(root), "workers": 1})[0]
    assert artifact.facts["class_counts"] == folders.facts["class_counts"]
    assert artifact.manifest.inputs["train"] == folders.manifest.inputs["train"]
    assert artifact.facts["source"]["files"] == 256 + 64 + 1


def test_a_list_that_changed_is_a_source_that_changed(flat, tmp_path):
    root, held = flat
    (tmp_path / "list.txt").write_text(lines(held, "space"))
    options = {"root": str(root), "val_labels": str(tmp_path / "list.txt"), "workers": 1}
    write("image_folder", tmp_path / "out", options)
    (tmp_path / "list.txt").write_text(lines(held[::-1], "space"))
    with pytest.raises(InputError, match=r"its source changed since it was written.*list.txt"):
        write("image_folder", tmp_path / "out", options)


def test_a_flat_val_without_a_list_is_told_what_to_do(flat):
    root, _ = flat
    refused(
        root,
        r"val: holds 64 images, but no class folders. If it is ImageNet's val, give its classes with val_labels=: "
        r"expected lines `file class`, .*ILSVRC2012_devkit_t12",
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda held: held[1:], r"no class for 1 of 64 images: ILSVRC2012_val_00000001.JPEG"),
        (lambda held: [*held, ("x.jpg", "cat")], r"1 files that are not in .*val: x.jpg"),
        (lambda held: [("x.jpg", "cat"), *held], r"1 files that are not in .*val: x.jpg"),
        (lambda held: [*held, held[3]], r"names 1 files twice: ILSVRC2012_val_00000004.JPEG"),
        (lambda held: [*held[:-1], (held[-1][0], "yak")], r"list.txt: the classes \['yak'\] are not in the training"),
        (lambda held: [*held[:-1], (held[-1][0], "Cat")], r"differ only in case or accents: Cat and cat"),
        (lambda held: [*held[:-1], (held[-1][0], "")], r"'ILSVRC2012_val_00000064.JPEG' names no class; expected"),
        (lambda held: [(file, str(CLASSES.index(name))) for file, name in held], r"the classes .*'3'.* are not in"),
        (lambda held: [], r"list.txt: 0 lines, but .*val holds 64 images"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit(flat, tmp_path, change, text):
    root, held = flat
    changed = change(held)
    (tmp_path / "list.txt").write_text("".join(f"{file} {name}\n" for file, name in changed))
    refused(root, text, val_labels=str(tmp_path / "list.txt"))


def test_lists_that_cannot_be_read(flat, tmp_path):
    root, _ = flat
    refused(
        root, r"nowhere.txt: cannot be read \(No such file or directory\); expected lines", val_labels="nowhere.txt"
    )
    (tmp_path / "ids.txt").write_text("1\n" * 64)
    refused(
        root, r"are not in the training images; for ids of a devkit, meta.mat must", val_labels=f"{tmp_path}/ids.txt"
    )
    (tmp_path / "short.txt").write_text("cat\ndog\n")
    refused(root, r"short.txt: 2 lines, but .*val holds 64 images", val_labels=f"{tmp_path}/short.txt")
    os.symlink("gone", tmp_path / "link.txt")
    refused(root, r"link.txt: cannot be read", val_labels=f"{tmp_path}/link.txt")
    (tmp_path / "latin.txt").write_bytes("café 1\n".encode("latin-1"))
    refused(root, r"latin.txt: 1 files that are not in|no class for 64", val_labels=f"{tmp_path}/latin.txt")


# ImageNet's devkit

IDS = {"fox": 1, "cat": 2, "emu": 3, "dog": 4, "animal": 5}
"""Ids of classes and of one inner node, in another order than that of the folders."""


def write_devkit(folder: Path, held, *, compressed: bool = True) -> Path:
    """Write the folder data of ILSVRC2012_devkit_t12, as MATLAB does."""
    data = folder / "data"
    data.mkdir(parents=True)
    rows = [
        (number, name, f"words of {name}", "gloss", 0 if number < 5 else 4, [] if number < 5 else [1, 2, 3, 4], 0, 1300)
        for name, number in IDS.items()
    ]
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train")
    synsets = np.array([tuple(row) for row in rows], [(field, object) for field in fields]).reshape(-1, 1)
    scipy.io.savemat(data / "meta.mat", {"note": "x", "synsets": synsets}, do_compression=compressed)
    truth = "".join(f"{IDS[name]}\n" for _, name in held)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    return folder


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("inner", ["", "data", "data/ILSVRC2012_validation_ground_truth.txt"])
def test_imagenets_devkit(flat, tmp_path, compressed, inner):
    root, held = flat
    devkit = write_devkit(tmp_path / "devkit", held, compressed=compressed)
    val = read(root, val_labels=str(devkit / inner))[0]["val"]
    assert [CLASSES[label] for label in val.labels] == [name for _, name in held]


def test_a_devkit_is_part_of_the_source(flat, tmp_path):
    root, held = flat
    writer = load_writer("image_folder")
    options = writer.options({"root": str(root), "val_labels": str(write_devkit(tmp_path / "devkit", held))})
    names = {Path(path).name for path in writer._source_files(options)}
    assert {"meta.mat", "ILSVRC2012_validation_ground_truth.txt"} < names


def test_devkits_that_do_not_fit(flat, tmp_path):
    root, held = flat
    devkit = write_devkit(tmp_path / "devkit", held)
    truth, meta = devkit / "data/ILSVRC2012_validation_ground_truth.txt", devkit / "data/meta.mat"
    whole = meta.read_bytes()
    for damaged in (b"", whole[:100], whole[:300], whole[:-40], b"\0" * 400, whole[:200] + b"x" * 200):
        meta.write_bytes(damaged)
        refused(root, r"meta.mat: (not the meta.mat of ImageNet's devkit|holds no synsets)", val_labels=str(devkit))
    scipy.io.savemat(meta, {"other": np.arange(9)})
    refused(root, r"meta.mat: holds no synsets of the ids", val_labels=str(devkit))
    meta.unlink()
    refused(root, r"meta.mat: cannot be read", val_labels=str(devkit))
    meta.write_bytes(whole)
    truth.write_text(truth.read_text() + "1\n")
    refused(root, r"ground_truth.txt: 65 lines, but .*val holds 64 images", val_labels=str(devkit))
    truth.write_text("7\n" * 64)
    refused(root, r"meta.mat: holds no synsets of the ids 7", val_labels=str(devkit))
    truth.write_text("5\n" * 64)
    refused(root, r"the classes \['animal'\] are not in the training images", val_labels=str(devkit))
    truth.unlink()
    refused(root, r"ground_truth.txt: cannot be read", val_labels=str(devkit))


def test_warnings_of_class_names_stay(flat, tmp_path):
    root, held = flat
    (tmp_path / "list.txt").write_text("".join(f"{file} cat\n" for file, _ in held))
    read(root, val_labels=str(tmp_path / "list.txt"))
    assert any("no images of 3 of 4 classes: dog, emu, fox" in text for text in console.warnings_since(0))
