"""A SUBSET and its LABELS as a data set of their own."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from subsets import make_labels, make_subset, snapshot

from fastkd import artifacts, pipeline, recipe
from fastkd.artifacts import Artifact, Built, building
from fastkd.data.extract import read_table
from fastkd.data.loader import Loader
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.export import __main__ as command_module
from fastkd.export.dataset import export_dataset

pytestmark = pytest.mark.timeout(120)


def used(file: Path) -> int:
    """Return the bytes that a file uses on disk, as du counts them."""
    return min(file.stat().st_size, 512 * file.stat().st_blocks)


def read(data: Artifact, ids: np.ndarray, input_px: int | None = None) -> list[tuple[int, int, bytes]]:
    """Load samples through the real loader: (id, label, pixels)."""
    loader = Loader(data, "train", 16, input_px=input_px, workers=1)
    found = []
    for batch in loader.batches(ids, last="pad"):
        for i in range(batch.valid):
            found.append((int(batch.sample_ids[i]), int(batch.labels[i]), batch.images[i].numpy().tobytes()))
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Artifact:
    """A DATASET of 40 + 6 JPEGs of varied size in 3 classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 6)):
        for n in range(count):
            file = root / "source" / split / f"class{n % 3}" / f"{n:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(20, 60, 2)
            cv2.imwrite(str(file), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return pipeline.write("image_folder", root / "photos", {"root": str(root / "source"), "workers": 2})[0]


@pytest.fixture
def ids() -> list[int]:
    return sorted(np.random.default_rng(1).permutation(150)[:60].tolist())


@pytest.fixture
def subset(tiny, ids, tmp_path) -> Artifact:
    return make_subset(tmp_path / "made" / "subset-1", tiny, ids)


# What comes out


@pytest.mark.parametrize("name", ["tiny", "photos"])
def test_every_kept_sample_has_its_own_pixels_and_label(request, name, tmp_path):
    parent: Artifact = request.getfixturevalue(name)
    count = parent.facts["counts"]["train"]
    ids = np.sort(np.random.default_rng(2).permutation(count)[: count // 2]).astype(np.int64)
    made = make_subset(tmp_path / "subset", parent, ids.tolist())
    out, built = export_dataset(made.path, tmp_path / "out")
    assert built
    shuffled = np.random.default_rng(3).permutation(ids)
    px = None if name == "tiny" else 24
    assert read(out, shuffled, px) == read(parent, shuffled, px)
    ours, theirs = (read_table(a.file("train.beton")) for a in (out, parent))
    raw, parents_raw = (a.file("train.beton").read_bytes() for a in (out, parent))
    assert ours.sample_ids.tolist() == ids.tolist()
    for position, sample_id in enumerate(ids):
        sizes = ours.sizes[position], theirs.sizes[sample_id]
        starts = (int(t["f0"]["data_ptr"]) for t in (ours.metadata[position], theirs.metadata[sample_id]))
        mine, its = (r[s : s + n] for r, s, n in zip((raw, parents_raw), starts, sizes, strict=True))
        assert mine == its


def test_manifest(tiny, subset, ids, tmp_path):
    labels = make_labels(subset.path.with_name("labels-1"), subset)
    reports = []
    artifact, _ = export_dataset(subset.path, tmp_path / "out", progress=lambda *report: reports.append(report))
    assert reports[-1] == ("train", 60, 60)
    again = artifacts.load(tmp_path / "out", "DATASET")
    assert again.manifest == artifact.manifest
    assert set(again.manifest.files) == {
        "train.beton",
        "val.beton",
        *(f"subset/{n}" for n in ("manifest.json", *subset.manifest.files)),
        *(f"labels/{n}" for n in ("manifest.json", "views/v0000.npy", "views/v0001.npy")),
    }
    facts, label_of = again.facts, read_table(tiny.file("train.beton")).labels
    for name in ("classes", "mean", "std", "writer", "options", "skipped"):
        assert facts[name] == tiny.facts[name]
    assert facts["image"] == tiny.facts["image"]
    assert facts["counts"] == {"train": 60, "val": 60}
    assert facts["class_counts"]["train"] == np.bincount(label_of[ids], minlength=3).tolist()
    assert facts["class_counts"]["val"] == tiny.facts["class_counts"]["val"]
    told = facts["export"]
    assert told["dataset"] == tiny.key
    assert told["counts"] == tiny.facts["counts"]
    assert (told["subset"], told["labels"]) == (subset.key, labels.key)
    assert told["bytes"] == {
        "parent": tiny.bytes_on_disk,
        "images_parent": 150 * 16 * 16 * 3,
        "images": 60 * 16 * 16 * 3,
        "dataset": sum(used(tmp_path / "out" / n) for n in ("train.beton", "val.beton")),
        "labels": sum(s.size for s in labels.manifest.files.values()),
    }
    assert tiny.bytes_on_disk == sum(used(tiny.file(n)) for n in ("train.beton", "val.beton")) < 300_000
    assert again.manifest.parents == {"DATASET": tiny.key, "SUBSET": subset.key, "LABELS": labels.key}
    assert again.manifest.settings == {
        "data": str(tiny.path),
        "subset": str(subset.path),
        "labels": str(labels.path),
    }
    inputs = again.manifest.inputs
    assert (inputs["val"], inputs["classes"]) == (tiny.manifest.inputs["val"], tiny.facts["classes"])
    assert inputs["train"] != tiny.manifest.inputs["train"]
    assert (tmp_path / "out" / "val.beton").read_bytes() == tiny.file("val.beton").read_bytes()
    assert (tmp_path / "out" / "val.beton").stat().st_nlink == 1


def test_the_largest_image_is_that_of_what_is_there(photos, tmp_path):
    table, val = (read_table(photos.file(f"{split}.beton")) for split in ("train", "val"))
    heights = table.metadata["f0"]["height"]
    low = np.argsort(heights)[:9]
    out, _ = export_dataset(make_subset(tmp_path / "s", photos, sorted(low.tolist())).path, tmp_path / "out")
    assert out.facts["image"]["max_height"] == max(int(heights[low].max()), val.largest[0])
    assert out.facts["image"]["fixed_size"] is None


def test_a_fixed_size_stays_the_parents(photos, tmp_path):
    out, _ = export_dataset(make_subset(tmp_path / "s", photos, [7]).path, tmp_path / "out")
    assert out.facts["counts"]["train"] == 1
    assert out.facts["image"]["fixed_size"] is None  # one size, but crops must be as of the parent


def test_nested_artifacts_load_on_their_own(subset, tmp_path):
    labels = make_labels(subset.path.with_name("labels-1"), subset)
    export_dataset(subset.path, tmp_path / "out")
    shutil.rmtree(subset.path.parent)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert artifacts.load(moved / "subset", "SUBSET").manifest == subset.manifest
    inside = artifacts.load(moved / "labels", "LABELS")
    assert inside.manifest == labels.manifest
    assert inside.array("views/v0001.npy").shape == (60, 3)
    (moved / ".verified.json").unlink()
    artifacts.load(moved, "DATASET")  # what loading the nested ones leaves behind is none of its files


def test_all_kept_is_the_same_content(tiny, tmp_path):
    out, _ = export_dataset(make_subset(tmp_path / "s", tiny, list(range(150))).path, tmp_path / "out")
    assert out.key == tiny.key


@pytest.mark.parametrize("name", ["train.beton", "val.beton", "subset/logits.npy", "labels/views/v0001.npy"])
def test_a_damaged_file_is_refused(subset, tmp_path, name):
    make_labels(subset.path.with_name("labels-1"), subset)
    out, _ = export_dataset(subset.path, tmp_path / "out")
    with out.file(name).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    with pytest.raises(ArtifactError, match=f"{name}: damaged"):
        artifacts.load(tmp_path / "out", "DATASET")


# An export of an export


def test_from_an_export_of_the_same_data(tiny, subset, ids, tmp_path):
    """`data` may be an export that has the samples: what comes out is as from the whole."""
    first, _ = export_dataset(subset.path, tmp_path / "first")
    fewer = make_subset(tmp_path / "made" / "subset-2", tiny, ids[::2], said=False)
    direct, _ = export_dataset(fewer.path, tmp_path / "direct", data=tiny.path)
    again, _ = export_dataset(fewer.path, tmp_path / "again", data=first.path)
    assert again.key == direct.key
    assert again.facts == direct.facts
    assert again.manifest.parents["DATASET"] == first.key
    assert read(again, np.array(ids[::2])) == read(tiny, np.array(ids[::2]))
    copy, _ = export_dataset(first.path / "subset", tmp_path / "copy", data=first.path)
    assert copy.facts == first.facts


def test_of_a_subset_chosen_from_an_export(tiny, subset, ids, tmp_path):
    first, _ = export_dataset(subset.path, tmp_path / "first")
    second, _ = export_dataset(make_subset(tmp_path / "s2", first, ids[3:30]).path, tmp_path / "second")
    assert second.facts["export"]["dataset"] == first.key
    assert read(second, np.array(ids[3:30])) == read(tiny, np.array(ids[3:30]))


def test_samples_that_the_export_lacks(tiny, subset, ids, tmp_path):
    first, _ = export_dataset(subset.path, tmp_path / "first")
    others = [i for i in range(150) if i not in ids][:5]
    other = make_subset(tmp_path / "s2", tiny, sorted([*ids[:5], *others]))
    text = rf"train.beton: lacks 5 of the 10 samples asked for; the first has the id {others[0]}"
    with pytest.raises(InputError, match=text):
        export_dataset(other.path, tmp_path / "out", data=first.path)


# Which data set


def test_data_is_found_beside_its_artifacts(tiny, ids, tmp_path):
    shutil.copytree(tiny.path, tmp_path / "shelf" / "tiny.v2")
    made = make_subset(tmp_path / "shelf" / "tiny.v2.artifacts" / "subset-1", tiny, ids, said=False)
    out, _ = export_dataset(made.path, tmp_path / "out")
    assert out.manifest.settings["data"] == str(tmp_path / "shelf" / "tiny.v2")


def test_data_that_moved_is_asked_for(tiny, ids, tmp_path):
    there = shutil.copytree(tiny.path, tmp_path / "there")
    made = make_subset(tmp_path / "s", artifacts.load(there), ids)
    there.rename(tmp_path / "gone")
    text = r"the data set that was pruned is not found \(searched .*there\); give it: --data DATASET"
    with pytest.raises(InputError, match=text):
        export_dataset(made.path, tmp_path / "out")
    assert export_dataset(made.path, tmp_path / "out", data=tmp_path / "gone")[1]


def test_data_that_is_not_known_is_asked_for(tiny, ids, tmp_path):
    made = make_subset(tmp_path / "s", tiny, ids, said=False)
    with pytest.raises(InputError, match="is not found; give it: --data DATASET"):
        export_dataset(made.path, tmp_path / "out")


def test_other_data_is_refused(subset, photos, tiny, tmp_path):
    with pytest.raises(ArtifactError, match=rf"from the DATASET of key {tiny.key}, .*has the key {photos.key}"):
        export_dataset(subset.path, tmp_path / "out", data=photos.path)
    with pytest.raises(ArtifactError, match="holds a SUBSET, where a DATASET is expected"):
        export_dataset(subset.path, tmp_path / "out", data=subset.path)
    with pytest.raises(ArtifactError, match="no artifact here"):
        export_dataset(subset.path, tmp_path / "out", data=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def own(tiny, tmp_path) -> Callable[..., Artifact]:
    """Return a function that makes a SUBSET of logits of one's own."""

    def make(count: int = 150) -> Artifact:
        labels = read_table(tiny.file("train.beton")).labels[:count]
        np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32))
        np.save(tmp_path / "y.npy", labels)
        settings = recipe.Prune(keep_ratio=0.3)
        return pipeline.prune_arrays(tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / "own", settings)[0]

    return make


def test_subset_of_ones_own_logits(tiny, own, tmp_path):
    made = own()
    with pytest.raises(InputError, match="give it: --data DATASET"):
        export_dataset(made.path, tmp_path / "out")
    out, _ = export_dataset(made.path, tmp_path / "out", data=tiny.path)
    ids = np.asarray(made.array("indices.npy"))
    assert read(out, ids) == read(tiny, ids)
    assert out.facts["export"]["dataset"] == tiny.key
    assert artifacts.load(out.path / "subset").key == made.key


def test_ones_own_logits_of_other_data(tiny, own, tmp_path):
    with pytest.raises(InputError, match=r"holds 150 train samples, but .*own was selected from 149"):
        export_dataset(own(count=149).path, tmp_path / "out", data=tiny.path)


def test_ones_own_labels_of_other_data(tiny, own, tmp_path, reseal):
    made = own()
    counts = [made.facts["class_counts"][0] - 1, made.facts["class_counts"][1] + 1, made.facts["class_counts"][2]]
    reseal(made.path, facts=made.facts | {"class_counts": counts})
    with pytest.raises(InputError, match=r"other labels in it: 15, 15, 15 per class instead of 14, 16, 15; give"):
        export_dataset(made.path, tmp_path / "out", data=tiny.path)


def test_ones_own_logits_are_not_of_an_export(tiny, own, tmp_path):
    ids = list(range(0, 150, 2))
    first, _ = export_dataset(make_subset(tmp_path / "s", tiny, ids).path, tmp_path / "first")
    with pytest.raises(InputError, match="first: is an export, whose sample ids are not the rows"):
        export_dataset(own(count=75).path, tmp_path / "out", data=first.path)


# Which labels


def test_without_labels(subset, tmp_path):
    out, _ = export_dataset(subset.path, tmp_path / "out")
    assert out.facts["export"]["labels"] is None
    assert out.facts["export"]["bytes"]["labels"] == 0
    assert not (tmp_path / "out" / "labels").exists()


def test_labels_of_another_subset_are_not_taken(tiny, subset, ids, tmp_path):
    other = make_subset(subset.path.with_name("subset-2"), tiny, ids[1:])
    wrong = make_labels(subset.path.with_name("labels-2"), other)
    assert export_dataset(subset.path, tmp_path / "out")[0].facts["export"]["labels"] is None
    text = rf"made for the SUBSET of key {other.key}, but .*has the key {subset.key}"
    with pytest.raises(ArtifactError, match=text):
        export_dataset(subset.path, tmp_path / "out2", labels=wrong.path)
    with pytest.raises(ArtifactError, match="holds a SUBSET, where a LABELS is expected"):
        export_dataset(subset.path, tmp_path / "out2", labels=other.path)


def test_several_labels_ask(subset, tmp_path):
    make_labels(subset.path.with_name("labels-1"), subset)
    second = make_labels(subset.path.with_name("labels-2"), subset, seed=5)
    (subset.path.parent / "foreign").mkdir()
    (subset.path.parent / "foreign" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"there are 2 LABELS for it: .*labels-1, .*labels-2; choose with --labels"):
        export_dataset(subset.path, tmp_path / "out")
    out, _ = export_dataset(subset.path, tmp_path / "out", labels=second.path)
    assert out.facts["export"]["labels"] == second.key


def test_damaged_labels_are_refused(subset, tmp_path):
    labels = make_labels(subset.path.with_name("labels-1"), subset)
    os.truncate(labels.file("views/v0000.npy"), 10)
    with pytest.raises(ArtifactError, match=r"v0000.npy: damaged: 10 bytes"):
        export_dataset(subset.path, tmp_path / "out")


# What is no SUBSET


def test_other_artifacts_are_refused(tiny, subset, tmp_path):
    labels = make_labels(tmp_path / "labels", subset)
    run = artifacts.build(tmp_path / "run", "RUN", {"a": 1}, lambda directory: Built())[0]
    for other, kind in ((tiny, "DATASET"), (labels, "LABELS"), (run, "RUN")):
        with pytest.raises(InputError, match=f"is of kind {kind}; expected a SUBSET"):
            export_dataset(other.path, tmp_path / "out")
    with pytest.raises(ArtifactError, match="no artifact here"):
        export_dataset(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize(
    "indices", [np.array([3, 2]), np.array([1, 1]), np.array([1.0]), np.array([[1]]), np.array([], np.int64)]
)
def test_indices_that_cannot_be(tiny, tmp_path, indices):
    def fill(directory: Path) -> Built:
        np.save(directory / "indices.npy", indices)
        return Built(facts={"count": len(indices)})

    made = artifacts.build(tmp_path / "s", "SUBSET", {}, fill, parents={"DATASET": tiny.key})[0]
    with pytest.raises(ArtifactError, match=r"expected ascending int64|where <i8 \[1\] belongs"):
        export_dataset(made.path, tmp_path / "out", data=tiny.path)


# Where it goes


def test_the_same_again_is_reused(subset, tmp_path):
    first, _ = export_dataset(subset.path, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    again, built = export_dataset(subset.path, tmp_path / "out")
    assert not built
    assert again.manifest == first.manifest
    assert snapshot(tmp_path / "out") == before


def test_another_export_is_replaced_only_by_force(tiny, subset, ids, tmp_path):
    export_dataset(subset.path, tmp_path / "out")
    other = make_subset(tmp_path / "other", tiny, ids[:30])
    before = snapshot(tmp_path / "out")
    with pytest.raises(InputError, match=r"out: holds another export: .*subset is .*, not .*replace it with --force"):
        export_dataset(other.path, tmp_path / "out")
    make_labels(subset.path.with_name("labels-1"), subset)
    with pytest.raises(InputError, match=r"labels is None, not '"):
        export_dataset(subset.path, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    out, built = export_dataset(other.path, tmp_path / "out", force=True)
    assert built
    assert out.facts["counts"]["train"] == 30


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_export_is_never_touched(tiny, subset, tmp_path, force):
    shutil.copytree(tiny.path, tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("mine")
    (tmp_path / "file").write_text("mine")
    labels = make_labels(tmp_path / "labels", subset)
    before = snapshot(tmp_path)
    for name, text in (
        ("data", "holds a data set that is not an export"),
        ("mine", "is not empty and is not a fastkd data set"),
        ("file", "is not a directory"),
        (labels.path.name, "holds a LABELS"),
    ):
        with pytest.raises(InputError, match=text):
            export_dataset(subset.path, tmp_path / name, force=force)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_is_exported_is_never_replaced(tiny, subset, ids, tmp_path, force):
    first, _ = export_dataset(subset.path, tmp_path / "first")
    fewer = make_subset(tmp_path / "fewer", first, ids[:30])
    before = snapshot(tmp_path / "first")
    for source, data, out in (
        (fewer.path, first.path, first.path),
        (first.path / "subset", tiny.path, first.path),
        (fewer.path, first.path, first.path / "inside"),
        (fewer.path, first.path, fewer.path),
    ):
        with pytest.raises(InputError, match=r"overlaps .*, which is exported; choose another directory"):
            export_dataset(source, out, data=data, force=force)
    assert snapshot(tmp_path / "first") == before


def test_a_forced_export_that_fails_keeps_the_old_one(subset, tmp_path, monkeypatch):
    export_dataset(subset.path, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(FastkdError, match="no space left"):
        export_dataset(subset.path, tmp_path / "out", force=True)
    assert snapshot(tmp_path / "out") == before
    assert not (tmp_path / "out.fastkd-partial").exists()


# A full disk


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_too_little_room_is_told_beforehand(tiny, subset, tmp_path, monkeypatch):
    labels = make_labels(subset.path.with_name("labels-1"), subset)
    table = read_table(tiny.file("train.beton"))
    copied = sum(s.size for a in (subset, labels) for s in a.manifest.files.values())
    needed = table.bytes_needed(np.arange(60)) + tiny.file("val.beton").stat().st_size + copied
    usage = shutil.disk_usage(tmp_path)
    written = []
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(args))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(FastkdError, match=rf"the export needs {needed:,} bytes, but {needed - 1:,} are free") as caught:
        export_dataset(subset.path, tmp_path / "out")
    assert not isinstance(caught.value, InputError)
    assert not written
    assert not list(tmp_path.glob("out*"))
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert export_dataset(subset.path, tmp_path / "out")[1]


@pytest.mark.parametrize(("module", "name"), [(os, "pwrite"), (shutil, "copyfile"), (building, "fsync")])
def test_a_disk_that_fills_up_leaves_nothing(subset, tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(module, name, full)
    with pytest.raises(FastkdError, match=r"no space left"):
        export_dataset(subset.path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_copy_that_is_not_one(subset, tmp_path, monkeypatch):
    def wrong(source, target):
        Path(target).write_bytes(bytes(Path(source).stat().st_size))

    monkeypatch.setattr(shutil, "copyfile", wrong)
    with pytest.raises(FastkdError, match=r"val.beton: differs from .*val.beton after copying; check the disk"):
        export_dataset(subset.path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# The command


def test_command(subset, tiny, tmp_path, command):
    make_labels(subset.path.with_name("labels-1"), subset)
    out = tmp_path / "out"
    code, text = command(command_module.main, subset.path, out)
    assert code == 0
    assert "60 of 150 train images, 60 val images; built in" in text
    assert "size of the train images: 0.0 of 0.1 MB (40.0%); of all files, with val and labels: " in text
    assert f"python -m fastkd.train RECIPE data.path={out}" in text
    code, text = command(command_module.main, subset.path, out, "--data", tiny.path)
    assert code == 0
    assert "reused: it was exported before" in text


def test_command_explains_wrong_input(subset, tiny, photos, tmp_path, command):
    first, second = (make_labels(subset.path.with_name(f"labels-{n}"), subset, seed=n) for n in (1, 2))
    code, text = command(command_module.main, subset.path, tmp_path / "out")
    assert code == 2
    assert "choose with --labels" in text
    assert command(command_module.main, subset.path, tmp_path / "out", "--labels", first.path)[0] == 0
    code, text = command(command_module.main, subset.path, tmp_path / "out", "--labels", second.path)
    assert code == 2
    assert "holds another export: labels is" in text
    assert command(command_module.main, subset.path, tmp_path / "out", "--labels", second.path, "--force")[0] == 0
    code, text = command(command_module.main, subset.path, tmp_path / "out2", "--data", photos.path)
    assert code == 2
    assert "give the data set that was pruned: --data DATASET" in text
    assert command(command_module.main, tiny.path, tmp_path / "out2")[0] == 2
    assert command(command_module.main, subset.path)[0] == 2


def test_command_says_that_the_disk_is_full(subset, tmp_path, command, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full)
    code, text = command(command_module.main, subset.path, tmp_path / "out")
    assert code == 1
    assert "no space left" in text
