"""Unusual sources of images, and sources that change after they were written"""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd import console, pipeline, recipe
from fastkd.artifacts import WARNINGS
from fastkd.data.image_files import list_images
from fastkd.data.writer_api import load_writer
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline, write
from fastkd.stages.predicting import find_images

pytestmark = pytest.mark.timeout(120)


def picture(file: Path, seed: int = 0, kind: str | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind or "PNG")
    return file


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of two images to train on and one to evaluate on."""
    root = tmp_path / "pets"
    for n, name in enumerate(("train/cat/a.png", "train/cat/b.png", "train/dog/c.png", "train/dog/d.png")):
        picture(root / name, n)
    picture(root / "val/cat/e.png", 8)
    picture(root / "val/dog/f.png", 9)
    return root


def listed(root: Path, **options: str) -> list[str]:
    """Return the training images that image_folder lists."""
    writer = load_writer("image_folder")
    train = writer.read(writer.options({"root": str(root), **options}))[0]["train"]
    return [os.path.relpath(train.describe(i), root) for i in range(len(train))]


def refused(root: Path, text: str, **options: str) -> None:
    with pytest.raises(InputError, match=text):
        listed(root, **options)


USUAL = ["train/cat/a.png", "train/cat/b.png", "train/dog/c.png", "train/dog/d.png"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../dog", "loop"])
def test_a_link_to_itself_or_to_a_parent_folder__is_refused_by_name(pets, target):
    (pets / "train/dog/loop").symlink_to(target, target_is_directory=True)
    refused(pets, "train/dog/loop: a link that leads to")
    with pytest.raises(InputError, match="loop: a link that leads to"):
        find_images([pets / "train/dog"])


def test_a_link_to_a_parent_of_the_target_of_a_linked_class__is_refused_by_name(pets, tmp_path):
    (pets / "train/dog").rename(tmp_path / "dog")
    (pets / "train/dog").symlink_to(tmp_path / "dog")
    assert listed(pets) == USUAL
    (tmp_path / "dog/up").symlink_to(pets / "train")
    refused(pets, "train/dog/up: a link that leads to")


def test_links_to_files_that_are_already_listed__add_no_image(pets):
    picture(pets / "train/cat/deep/g.png", 5)
    (pets / "train/cat/again").symlink_to("deep")
    (pets / "train/cat/h.png").symlink_to("a.png")
    assert listed(pets) == [*USUAL[:2], "train/cat/deep/g.png", *USUAL[2:]]
    assert [path.name for path in find_images([pets / "train/cat"])] == ["a.png", "b.png", "g.png"]


def test_links_to_other_folders__are_followed(pets, tmp_path):
    picture(tmp_path / "store/x.png", 5)
    picture(tmp_path / "y.png", 6)
    (pets / "train/cat/more").symlink_to(tmp_path / "store")
    (pets / "train/cat/z.png").symlink_to(tmp_path / "y.png")
    assert listed(pets)[2:4] == ["train/cat/more/x.png", "train/cat/z.png"]
    assert [path.name for path in find_images([pets / "train/cat"])] == ["a.png", "b.png", "x.png", "z.png"]


def test_a_folder_in_two_classes_or_splits__is_refused(pets):
    (pets / "train/dog/more").symlink_to("../cat")
    refused(pets, "are the same folder: its images would be listed twice")
    (pets / "train/dog/more").unlink()
    shutil.rmtree(pets / "val/cat")
    (pets / "val/cat").symlink_to("../train/cat")
    refused(pets, "val/cat and .*train/cat are the same folder")


def test_train_and_val_in_the_same_folder_or_nested__are_refused(pets):
    refused(pets, "are the same folder: train and val must be apart", val_dir="train")
    refused(pets, "one lies in the other", train_dir=".")
    (pets / "test").symlink_to("train")
    refused(pets, "are the same folder: train and val must be apart", val_dir="test")


def test_a_folder_that_cannot_be_read__is_an_error_that_names_it(pets, monkeypatch):
    (pets / "train/dog/deep").mkdir()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)  # root may read anything
    refused(pets, r"train/dog/deep: cannot be read \(Permission denied\)")
    with pytest.raises(InputError, match="deep: cannot be read"):
        find_images([pets])


def test_a_broken_link_in_place_of_a_class__is_refused(pets):
    (pets / "train/emu").symlink_to("/nowhere/emu")
    refused(pets, "train/emu: a broken link in place of a class folder")


def test_files_of_operating_systems_and_programs__are_left_out_and_counted(pets, tmp_path):
    clutter = [".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png", "__MACOSX/a.png", "lost+found/a.png", "._a.png"]
    for n, name in enumerate([*clutter, ".thumbs/deep/b.png"]):
        picture(pets / "train/cat" / name, n)
    for name in ("Thumbs.db", "desktop.ini", "notes.TXT", "photo.heic", "README"):
        (pets / "train/cat" / name).write_text("no image")
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        picture(pets / "train" / name / "x.png", 3)
    picture(pets / "train/stray.png")
    picture(pets / "val/.ipynb_checkpoints/x.png", 3)
    os.mkfifo(pets / "train/dog/pipe.png")
    artifact, _ = write("image_folder", tmp_path / "out", {"root": str(pets), "workers": 1})
    assert artifact.facts["counts"] == {"train": 4, "val": 2}
    assert artifact.facts["classes"] == ["cat", "dog"]
    (text,) = [text for text in artifact.facts[WARNINGS] if "left out" in text]
    for part in (
        "left out 17 files or folders", "1 .txt", "1 .heic", "1 without suffix", "5 hidden", "7 of an operating",
        "1 in no class folder", "1 neither file nor folder", "and 12 more",
    ):  # fmt: skip
        assert part in text
    console.forget_warnings()
    found = find_images([pets])
    assert {path.name for path in found} == {*(f"{c}.png" for c in "abcdef"), "stray.png"}
    assert find_images([pets / "train/cat/._a.png"]) == [pets / "train/cat/._a.png"]  # named, so taken


def test_rare_suffixes_of_images__are_accepted(pets):
    for name, kind in (("p.jfif", "JPEG"), ("q.JPE", "JPEG"), ("r.mpo", "JPEG"), ("s.AVIF", "PNG"), ("t.Tiff", "TIFF")):
        picture(pets / "train/cat" / name, 1, kind)
    assert [Path(name).name for name in listed(pets)[2:7]] == ["p.jfif", "q.JPE", "r.mpo", "s.AVIF", "t.Tiff"]
    assert len(find_images([pets])) == 11


def test_names_that_are_not_utf8__are_escaped_for_files_and_refused_for_classes(pets, tmp_path):
    os.rename(pets / "train/cat/a.png", os.fsencode(pets) + b"/train/cat/caf\xe9.png")
    assert "train/cat/caf\\xe9.png" in listed(pets)
    artifact, _ = write("image_folder", tmp_path / "out", {"root": str(pets), "workers": 1})
    assert artifact.facts["counts"]["train"] == 4
    os.mkdir(os.fsencode(pets) + b"/train/caf\xe9")
    refused(pets, r"class names that are not valid UTF-8: caf\\xe9")


def test_class_names_that_differ_only_in_case__cause_a_warning(pets, tmp_path):
    (pets / "val/cat").rename(pets / "val/Cat")
    refused(pets, r"the classes \['Cat'\] are not in .*differ only in case or accents: Cat and cat")
    (pets / "val/Cat").rename(pets / "val/cat")
    picture(pets / "train/Cat/z.png", 7)
    artifact, _ = write("image_folder", tmp_path / "out", {"root": str(pets), "workers": 1})
    both = "\n".join(artifact.facts[WARNINGS])
    assert "class names that differ only in case or accents: Cat, cat" in both
    assert "no images of 1 of 3 classes: Cat" in both


def test_a_root_that_is_a_file_or_empty_or_missing__is_refused_with_a_message(pets, tmp_path):
    refused(pets / "train/cat/a.png", "is a file; root= names the folder")
    refused(tmp_path / "nowhere", "train: no such folder; expected ROOT/train")
    for root, text in (("", "is empty"), (b"/caf\xe9".decode("utf-8", "surrogateescape"), "not valid UTF-8")):
        with pytest.raises(InputError, match=text):
            load_writer("image_folder").options({"root": root})


def test_a_data_set_inside_or_around_its_source__is_refused(pets, tmp_path):
    options = {"root": str(pets), "workers": 1}
    with pytest.raises(InputError, match=r"is inside the source folder .*train; choose a directory outside"):
        write("image_folder", pets / "train/out", options)
    assert not any(path.name.startswith((".out", "out")) for path in (pets / "train").iterdir())
    out = write("image_folder", tmp_path / "out", options)[0].path
    shutil.move(pets, out / "pets")
    with pytest.raises(InputError, match=r"the source \(root=.*\); choose another directory"):
        write("image_folder", out, {"root": str(out / "pets")}, force=True)
    assert (out / "pets/train/cat/a.png").is_file()


@pytest.mark.parametrize("name", ["workers", "jpeg_quality", "max_resolution", "smart_threshold_bytes"])
def test_true_as_a_number__is_refused(name):
    with pytest.raises(InputError, match=f"{name}: true is wrong: expected a number"):
        load_writer("digits").options({name: True})


# Changed


def _add(pets):
    picture(pets / "train/emu/x.png", 11)


def _remove(pets):
    (pets / "train/cat/a.png").unlink()


def _exchange(pets):
    (pets / "train/cat/a.png").write_bytes((pets / "train/dog/c.png").read_bytes())


def _touch(pets):
    os.utime(pets / "train/cat/a.png", ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_add, "6 files of .* when it was written, now 7 files.*train/emu/x.png"),
        (_remove, "6 files of .* when it was written, now 5 files"),
        (_exchange, "train/cat/a.png"),
        (_touch, "same names and sizes, but other times of modification; new or changed: 1 .*train/cat/a.png"),
    ],
)
def test_a_source_that_changed__is_refused_without_force(pets, tmp_path, change, text):
    options = {"root": str(pets), "workers": 1}
    first, _ = write("image_folder", tmp_path / "out", options)
    assert not write("image_folder", tmp_path / "out", options)[1]
    (pets / "train/cat/notes.txt").write_text("no image")  # is no part of the source
    assert not write("image_folder", tmp_path / "out", options)[1]
    change(pets)
    with pytest.raises(InputError, match=f"its source changed since it was written: .*{text}.* again with --force "):
        write("image_folder", tmp_path / "out", options)
    if change is not _add:  # emu has no val
        assert write("image_folder", tmp_path / "out", options, force=True)[0].key != first.key or change is _touch
        assert not write("image_folder", tmp_path / "out", options)[1]


def test_a_source_that_changed_before_a_training__is_refused(pets, tmp_path):
    out = tmp_path / "out"
    path = tmp_path / "pets.yaml"
    path.write_text(
        f"name: pets\ndata: {{path: {out}, writer: image_folder, options: {{root: {pets}, workers: 1}}}}\n"
        f"student: {{model: cifar/resnet8}}\noptim: {{lr: 0.1}}\n"
        f"train: {{epochs: 1, batch_size: 2, compile: false, runs_dir: {tmp_path / 'runs'}}}\n"
    )
    key = Pipeline(recipe.load(path)).dataset.key
    picture(pets / "train/cat/x.png", 11)
    with pytest.raises(InputError, match=r"its source changed since it was written.*again with --force write "):
        pipeline.train(recipe.load(path))
    assert Pipeline(recipe.load(path), force={"write"}).dataset.key != key


def test_a_missing_source__causes_a_warning_and_the_data_set_stays_usable(pets, tmp_path):
    options = {"root": str(pets), "workers": 1}
    first, _ = write("image_folder", tmp_path / "out", options)
    shutil.rmtree(pets)
    mark = console.warning_mark()
    assert write("image_folder", tmp_path / "out", options)[0].key == first.key
    assert "its source is gone" in console.warnings_since(mark)[0]
    pets.mkdir()  # a mount point without its disk
    assert write("image_folder", tmp_path / "out", options)[0].key == first.key


OWN = """
from fastkd.data.writer_api import ArrayDataset, LocalPath, WriterOptions
import numpy as np

class Options(WriterOptions):
    file: LocalPath

def read(options):
    images = np.load(options.file)
    return {s: ArrayDataset(images, np.arange(len(images)) % 2) for s in ("train", "val")}, ["no", "yes"]
"""
TOLD = "def source_files(options):\n    return [options.file]\n"


@pytest.mark.parametrize("told", [False, True])
def test_a_changed_source_of_a_user_writer__is_refused_if_the_writer_lists_its_files(tmp_path, told):
    own, file = tmp_path / "own.py", tmp_path / "x.npy"
    own.write_text(OWN + TOLD * told)
    np.save(file, np.zeros((4, 6, 6), np.uint8))
    options = {"file": str(file), "workers": 1}
    artifact, _ = write(str(own), tmp_path / "out", options)
    assert ("source" in artifact.facts) == told
    np.save(file, np.ones((4, 6, 6), np.uint8))
    if told:
        with pytest.raises(InputError, match=r"its source changed since it was written.*x.npy"):
            write(str(own), tmp_path / "out", options)
    else:
        assert not write(str(own), tmp_path / "out", options)[1]


def test_a_user_writer_that_cannot_list_its_files__is_reported(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN + "def source_files(options):\n    return [1 / 0]\n")
    with pytest.raises(InputError, match=r"source_files\(\) failed: ZeroDivisionError.*expected the paths"):
        write(str(own), tmp_path / "out", {"file": "x.npy"})


def test_a_changed_npz_file__is_refused(tmp_path):
    def save(value):
        images = np.full((8, 6, 6), value, np.uint8)
        np.savez(tmp_path / "a.npz", images=images, labels=np.arange(8) % 2)

    save(0)
    options = {"file": str(tmp_path / "a.npz"), "workers": 1}
    write("arrays", tmp_path / "out", options)
    save(1)
    with pytest.raises(InputError, match=r"its source changed since it was written: .*a.npz"):
        write("arrays", tmp_path / "out", options)


def test_listing_is_the_same_in_any_order_of_the_disk(pets, monkeypatch):
    before = list_images(pets).files
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as found:
                self.entries = sorted(found, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *raised):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert list_images(pets).files == before


@pytest.mark.parametrize("way", ["copy", "link", "hard link"])
def test_an_image_in_two_classes__is_reported_with_both_names(tmp_path, way):
    rng = np.random.default_rng(0)
    root = tmp_path / "root"
    for split, name, number in itertools.product(("train", "val"), ("cat", "dog"), range(3)):
        file = root / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    cat, dog = root / "train/cat/0.png", root / "train/dog/z.png"
    {"copy": shutil.copy, "link": os.symlink, "hard link": os.link}[way](cat, dog)
    facts = write("image_folder", tmp_path / "out", {"root": str(root), "workers": 1})[0].facts
    assert facts["found"]["two_labels"] == {"train": 2}
    (warning,) = [text for text in facts["warnings"] if "different labels" in text]
    assert f"{cat} as cat" in warning
    assert f"{dog} as dog" in warning
