"""The kept images of a SUBSET in the formats of other trainers."""

import errno
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import CLASSES, listed, make_folder
from PIL import Image
from subsets import make_labels, make_subset, snapshot

from fastkd import artifacts, pipeline
from fastkd.artifacts import Artifact, building
from fastkd.artifacts.inventory import unneeded
from fastkd.data.encode import decode_jpeg
from fastkd.data.extract import read_table
from fastkd.data.writer_api import load_writer
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.export import __main__ as command_module
from fastkd.export import formats
from fastkd.export.formats import FORMATS
from fastkd.export.images import export_images
from fastkd.export.sources import open_sources

pytestmark = pytest.mark.timeout(120)
HAS_DATASETS = importlib.util.find_spec("datasets") is not None
needs_datasets = pytest.mark.skipif(not HAS_DATASETS, reason="needs the library datasets")
EACH = ["webdataset", pytest.param("hf", marks=needs_datasets), "numpy"]
"""All formats; the images of `tiny` have one size."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder of 256 + 64 JPEG and PNG files of many sizes."""
    return make_folder(tmp_path_factory.mktemp("sources") / "root")


@pytest.fixture(scope="module")
def photos(sources, tmp_path_factory) -> Artifact:
    """Their DATASET: JPEG files are kept, PNG files are stored as pixels."""
    options = {"root": str(sources), "mode": "smart", "smart_threshold_bytes": 0, "workers": 1}
    return pipeline.write("image_folder", tmp_path_factory.mktemp("photos") / "photos", options)[0]


@pytest.fixture(scope="module")
def pixels(sources, tmp_path_factory) -> Artifact:
    """A DATASET of the same images, stored as pixels."""
    options = {"root": str(sources), "mode": "raw", "workers": 1}
    return pipeline.write("image_folder", tmp_path_factory.mktemp("pixels") / "pixels", options)[0]


@pytest.fixture
def ids() -> list[int]:
    return sorted(np.random.default_rng(1).permutation(150)[:60].tolist())


@pytest.fixture
def subset(tiny, ids, tmp_path) -> Artifact:
    return make_subset(tmp_path / "made" / "subset-1", tiny, ids, weights=True)


def shards(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the members of all shards by key and suffix, in their order."""
    found: dict[str, dict[str, bytes]] = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as archive:
            for member in archive:
                key, suffix = member.name.split(".")
                found.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return found


def opened(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


# What comes out


@pytest.mark.parametrize("stored", ["photos", "pixels"])
def test_webdataset_has_each_image_with_its_label_logits_and_id(request, stored, sources, tmp_path):
    """JPEG files byte for byte, pixels as PNG without loss."""
    data: Artifact = request.getfixturevalue(stored)
    ids = list(range(0, 256, 3))
    made = make_subset(tmp_path / "s", data, ids, weights=True)
    out, built = export_images(made.path, tmp_path / "out", "webdataset")
    assert built
    assert out.manifest.kind == "EXPORT"
    files = [path for split, _, path in listed(sources) if split == "train"]
    found = shards(out.path)
    assert sorted(found) == [f"{i:09}" for i in ids]
    assert list(found) != sorted(found)  # shuffled
    logits, weights = made.array("logits.npy"), made.array("weights.npy")
    suffixes = set()
    for row, i in enumerate(ids):
        sample = found[f"{i:09}"]
        label = i // 64
        about = json.loads(sample["json"])
        assert about == {"sample_id": i, "label": label, "class": CLASSES[label], "weight": float(weights[row])}
        assert sample["cls"] == str(label).encode()
        row_logits = np.load(io.BytesIO(sample["npy"]))
        assert row_logits.dtype == np.float16
        assert row_logits.tobytes() == logits[row].tobytes()
        (suffix,) = set(sample) - {"cls", "npy", "json"}
        suffixes.add(suffix)
        if stored == "photos" and files[i].suffix == ".jpg":
            assert sample["jpg"] == files[i].read_bytes()
        elif stored == "pixels":
            assert np.array_equal(opened(sample["png"]), np.asarray(Image.open(files[i]).convert("RGB")))
    assert suffixes == ({"jpg"} if stored == "photos" else {"png"})


def test_shards_are_read_by_the_writer_of_that_format(photos, tmp_path):
    """With the class names in their order, each image and label is what was exported."""
    ids = [*range(3), *range(64, 128), *range(200, 256)]
    out, _ = export_images(make_subset(tmp_path / "s", photos, ids).path, tmp_path / "out", "webdataset", shard_mb=0.05)
    assert len(out.facts["shards"]) > 3
    writer = load_writer("webdataset")
    pattern = f"{out.path}/train-{{000000..{len(out.facts['shards']) - 1:06}}}.tar"
    splits, _ = writer.read(writer.options({"train": pattern, "val_ratio": 0.5}))
    assert sum(map(len, splits.values())) == len(ids)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    options = {"train": pattern, "val": pattern.replace("000000", "000001", 1), "classes": str(tmp_path / "names.txt")}
    with pytest.raises(InputError, match="are the same shard"):
        writer.read(writer.options(options))
    found = shards(out.path)
    for split in splits.values():
        for i in range(len(split)):
            key = re.search(r"(\d{9})\.jpg$", split.describe(i))[1]
            assert split[i][0] == found[key]["jpg"]


def test_shards_are_cut_by_size(photos, tmp_path):
    ids = list(range(256))
    made = make_subset(tmp_path / "s", photos, ids)
    whole, _ = export_images(made.path, tmp_path / "whole", "webdataset")
    assert [s["count"] for s in whole.facts["shards"]] == [256]
    out, _ = export_images(made.path, tmp_path / "out", "webdataset", shard_mb=0.1)
    files = sorted(out.path.glob("*.tar"))
    assert [f.name for f in files] == [s["file"] for s in out.facts["shards"]]
    assert len(files) > 5
    assert sum(s["count"] for s in out.facts["shards"]) == 256
    assert all(80_000 < f.stat().st_size <= 101_024 for f in files[:-1])  # with the end of the archive
    assert shards(out.path) == shards(whole.path)
    each, _ = export_images(made.path, tmp_path / "each", "webdataset", shard_mb=1e-4)
    assert [s["count"] for s in each.facts["shards"]] == [1] * 256  # larger than a shard: one of its own


def test_numpy_arrays(tiny, subset, ids, tmp_path):
    out, _ = export_images(subset.path, tmp_path / "out", "numpy")
    arrays = {file.stem: np.load(file) for file in out.path.glob("*.npy")}
    assert set(arrays) == {"images", "labels", "sample_ids", "logits", "weights"}
    raw, table = tiny.file("train.beton").read_bytes(), read_table(tiny.file("train.beton"))
    assert (arrays["images"].dtype, arrays["images"].shape) == (np.uint8, (60, 16, 16, 3))
    for row, i in enumerate(ids):
        start = int(table.metadata["f0"]["data_ptr"][i])
        assert arrays["images"][row].tobytes() == raw[start : start + 16 * 16 * 3]
    assert arrays["sample_ids"].tolist() == ids
    assert arrays["labels"].tolist() == table.labels[ids].tolist()
    for name in ("logits", "weights"):
        assert np.array_equal(arrays[name], subset.array(f"{name}.npy"))
    assert arrays["logits"].dtype == np.float16


def test_numpy_decodes_jpeg_files_as_the_networks_see_them(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(12):
        file = tmp_path / "source" / ("train" if n < 8 else "val") / "ab"[n % 2] / f"{n}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    data, _ = pipeline.write("image_folder", tmp_path / "data", {"root": str(tmp_path / "source"), "workers": 1})
    made = make_subset(tmp_path / "s", data, [0, 3, 5])
    out, _ = export_images(made.path, tmp_path / "out", "numpy")
    files = sorted((tmp_path / "source" / "train").glob("*/*.jpg"))
    for image, i in zip(np.load(out.path / "images.npy"), (0, 3, 5), strict=True):
        expected = decode_jpeg(np.frombuffer(files[i].read_bytes(), np.uint8), 12, 10)
        assert np.array_equal(image, expected)


def test_numpy_needs_one_size(photos, tmp_path):
    made = make_subset(tmp_path / "s", photos, list(range(40)))
    text = r"the kept images have \d+ sizes, from 8 x \d+ to 13 x \d+ pixels .*use --format webdataset or hf"
    with pytest.raises(InputError, match=text):
        export_images(made.path, tmp_path / "out", "numpy")
    assert not list(tmp_path.glob("out*"))


@needs_datasets
@pytest.mark.parametrize("stored", ["photos", "pixels"])
def test_hf_folder(request, stored, sources, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(formats, "_BATCH_ROWS", 20)
    data: Artifact = request.getfixturevalue(stored)
    ids = list(range(1, 256, 4))
    made = make_subset(tmp_path / "s", data, ids, weights=True)
    out, _ = export_images(made.path, tmp_path / "out", "hf")
    assert not (out.path / "rows").exists()
    assert not datasets.are_progress_bars_disabled()
    (moved := tmp_path / "moved").mkdir()
    shutil.copytree(out.path, moved / "pets")
    shutil.rmtree(out.path)
    found = datasets.load_from_disk(str(moved / "pets"))
    assert found.features["label"].names == list(CLASSES)
    assert found["sample_id"][:] == ids
    assert found["label"][:] == [i // 64 for i in ids]
    rows = np.array(found.with_format("numpy")["logits"][:])
    assert np.array_equal(rows, made.array("logits.npy").astype(np.float32))
    assert found["weight"][:] == pytest.approx(made.array("weights.npy").tolist())
    files = [path for split, _, path in listed(sources) if split == "train"]
    undecoded = found.cast_column("image", datasets.Image(decode=False))
    for row, i in enumerate(ids):
        image = undecoded[row]["image"]
        if stored == "pixels":
            assert image["path"] == f"{i:09}.png"
            assert np.array_equal(np.asarray(found[row]["image"]), np.asarray(Image.open(files[i]).convert("RGB")))
        elif files[i].suffix == ".jpg":
            assert image == {"bytes": files[i].read_bytes(), "path": f"{i:09}.jpg"}
    again, _ = pipeline.write(
        "hf_dataset", tmp_path / "again", {"path": str(moved / "pets"), "val_ratio": 0.2, "workers": 1, "mode": "raw"}
    )
    assert sum(again.facts["counts"].values()) == len(ids)


@pytest.mark.parametrize("form", EACH)
def test_description(tiny, subset, ids, form, tmp_path):
    reports = []
    out, _ = export_images(subset.path, tmp_path / "out", form, progress=lambda *report: reports.append(report))
    assert reports[-1] == ("train", 60, 60)
    about = json.loads((out.path / "dataset.json").read_text())
    assert (about["format"], about["count"], about["classes"]) == (form, 60, tiny.facts["classes"])
    assert about["class_counts"] == subset.facts["class_counts"]
    assert set(about["fields"]) == {"image", "label", "logits", "sample_id", "weight"}
    assert (about["dataset"], about["subset"]) == (tiny.key, subset.key)
    assert (about["mean"], about["std"]) == (tiny.facts["mean"], tiny.facts["std"])
    assert out.manifest.parents == {"DATASET": tiny.key, "SUBSET": subset.key}
    unweighted = make_subset(tmp_path / "u", tiny, ids)
    out, _ = export_images(unweighted.path, tmp_path / "out2", form)
    assert "weight" not in json.loads((out.path / "dataset.json").read_text())["fields"]
    assert not (out.path / "weights.npy").exists()


def test_the_description_says_how_logits_were_made(tiny_recipe, tmp_path):
    """Of a SUBSET that prune made: reshaping, teacher, view."""
    made, _ = pipeline.prune(tiny_recipe("labels.reshape_strength=0.5", "data.input_px=12"))
    out, _ = export_images(made.path, tmp_path / "out", "webdataset")
    about = json.loads((out.path / "dataset.json").read_text())
    assert (about["reshape"], about["reshape_strength"]) == (True, 0.5)
    assert about["teacher"]["model"] == "cifar/resnet8"
    assert about["view"]["input_px"] == 12
    assert about["view"]["crop_ratio"] == 0.875


def test_of_an_export_that_has_the_samples(tiny, subset, ids, tmp_path):
    from fastkd.export.dataset import export_dataset

    half, _ = export_dataset(subset.path, tmp_path / "half")
    direct, _ = export_images(subset.path, tmp_path / "direct", "webdataset")
    again, _ = export_images(half.path / "subset", tmp_path / "again", "webdataset", data=half.path)
    assert again.key == direct.key
    assert shards(again.path) == shards(direct.path)


@pytest.mark.parametrize("form", EACH)
def test_memory_does_not_grow_with_the_images(form, noise, tmp_path, monkeypatch):
    """Besides an index of the data set."""
    monkeypatch.setattr(formats, "_BATCH_ROWS", 20)

    def peak(count: int) -> int:
        data, _ = pipeline.write(noise, tmp_path / f"d{count}", {"n": count, "workers": 1, "sides": [24, 24]})
        made = make_subset(tmp_path / f"s{count}", data, list(range(count)))
        (out := tmp_path / f"out{count}").mkdir()
        tracemalloc.start()
        try:
            kept = formats.Kept(open_sources(made.path, None), lambda done, total: None, 100_000)
            FORMATS[form].write(out, kept)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # imports
    few, many = peak(1100), peak(2200)  # more than the batches of the library
    assert (many - few) / 1100 < 300  # bytes an image, of 1,728 bytes of pixels


# Where it goes


@pytest.mark.parametrize("form", EACH)
def test_the_same_again_is_reused_and_another_needs_force(tiny, subset, ids, form, tmp_path):
    first, _ = export_images(subset.path, tmp_path / "out", form)
    before = snapshot(tmp_path / "out")
    again, built = export_images(subset.path, tmp_path / "out", form)
    assert (built, again.manifest) == (False, first.manifest)
    other = make_subset(tmp_path / "other", tiny, ids[:30])
    with pytest.raises(InputError, match=r"out: holds another export: .*subset is .*, not .*replace it with --force"):
        export_images(other.path, tmp_path / "out", form)
    with pytest.raises(InputError, match=r"holds another export: .*format is"):
        export_images(subset.path, tmp_path / "out", "numpy" if form == "webdataset" else "webdataset")
    assert snapshot(tmp_path / "out") == before
    out, built = export_images(other.path, tmp_path / "out", form, force=True)
    assert (built, out.facts["count"]) == (True, 30)


def test_shards_of_another_size_are_another_export(subset, tmp_path):
    export_images(subset.path, tmp_path / "out", "webdataset")
    assert not export_images(subset.path, tmp_path / "out", "webdataset", shard_mb=256)[1]
    with pytest.raises(InputError, match=r"shard_mb is 256.0, not 1"):
        export_images(subset.path, tmp_path / "out", "webdataset", shard_mb=1)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_export_is_never_touched(tiny, subset, tmp_path, force):
    shutil.copytree(tiny.path, tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    labels = make_labels(tmp_path / "labels", subset)
    before = snapshot(tmp_path)
    for name, text in (
        ("data", "holds a DATASET"),
        ("mine", "is not empty and is not a fastkd EXPORT"),
        ("file", "is not a directory"),
        ("link", "is not a directory"),
        (labels.path.name, "holds a LABELS"),
        (f"{subset.path.relative_to(tmp_path)}/inside", "overlaps .*, which is exported"),
        ("made", "overlaps .*, which is exported"),
    ):
        with pytest.raises(InputError, match=text):
            export_images(subset.path, tmp_path / name, "webdataset", force=force)
    assert snapshot(tmp_path) == before


def test_exports_keep_what_they_were_made_from(tiny, subset, tmp_path):
    """As exported data sets do: artifacts gc deletes a SUBSET only if nothing needs it."""
    assert subset.path in [one.path for one in unneeded([tmp_path])]
    export_images(subset.path, tmp_path / "out", "webdataset")
    assert not unneeded([tmp_path])


# Faults


@pytest.mark.parametrize("form", EACH)
@pytest.mark.parametrize("name", ["indices.npy", "logits.npy", "weights.npy", "train.beton"])
def test_damaged_sources_are_refused(tiny, ids, form, name, tmp_path):
    data = artifacts.load(shutil.copytree(tiny.path, tmp_path / "data"))
    made = make_subset(tmp_path / "s", data, ids, weights=True)
    file = (data if name == "train.beton" else made).file(name)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: damaged"):
        export_images(made.path, tmp_path / "out", form)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", EACH)
def test_a_damaged_export_is_refused(subset, form, tmp_path):
    out, _ = export_images(subset.path, tmp_path / "out", form)
    file = max(out.path.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ArtifactError, match=f"{file.name}: damaged"):
        export_images(subset.path, tmp_path / "out", form)
    assert export_images(subset.path, tmp_path / "out", form, force=True)[1]


def test_a_jpeg_file_that_cannot_be_decoded_is_named(photos, tmp_path, monkeypatch):
    made = make_subset(tmp_path / "s", photos, [7])
    monkeypatch.setattr(formats, "decode_jpeg", lambda data, height, width: None)
    with pytest.raises(ArtifactError, match=r"train.beton: the JPEG file of sample 7 cannot be decoded; write"):
        export_images(made.path, tmp_path / "out", "numpy")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", EACH)
def test_a_source_that_changes_meanwhile_is_noticed(tiny, ids, form, tmp_path):
    data = artifacts.load(shutil.copytree(tiny.path, tmp_path / "data"))
    made = make_subset(tmp_path / "s", data, ids)

    def change(*report):
        content = data.file("train.beton").read_bytes()
        data.file("train.beton").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    with pytest.raises(ArtifactError, match=r"train.beton: was written to while it was in use"):
        export_images(made.path, tmp_path / "out", form, progress=change)
    assert not list(tmp_path.glob("out*"))


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("form", EACH)
def test_too_little_room_is_told_beforehand(subset, form, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60 * 16 * 16 * 3))
    with pytest.raises(FastkdError, match=r"the export needs [\d,]+ bytes, but 46,080 are free"):
        export_images(subset.path, tmp_path / "out", form)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", EACH)
def test_what_is_written_fits_into_the_room_that_was_asked_for(pixels, subset, form, tmp_path, monkeypatch):
    """Of noise, which PNG does not compress."""
    made = subset if form == "numpy" else make_subset(tmp_path / "s", pixels, list(range(200)))
    asked = []
    monkeypatch.setattr("fastkd.export.images.refuse_full_disk", lambda folder, needed: asked.append(needed))
    out, _ = export_images(made.path, tmp_path / "out", form)
    files = [path for path in out.path.iterdir() if path.name not in ("manifest.json", ".verified.json")]
    assert sum(path.stat().st_size for path in files) <= asked[0] / FORMATS[form].copies + 10_000


@pytest.mark.parametrize("form", EACH)
@pytest.mark.parametrize("name", ["fsync", "write"])
def test_a_disk_that_fills_up_leaves_nothing_and_keeps_the_old_one(subset, form, name, tmp_path, monkeypatch):
    if name == "fsync":
        monkeypatch.setattr(building, "fsync", full)
    else:
        monkeypatch.setattr(formats.Kept, "samples", full)
    with pytest.raises(FastkdError, match=r"out: no space left .*another OUT"):
        export_images(subset.path, tmp_path / "out", form)
    assert not list(tmp_path.glob("out*"))
    monkeypatch.undo()
    export_images(subset.path, tmp_path / "out", form)
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(building, "fsync", full)
    with pytest.raises(FastkdError, match="no space left"):
        export_images(subset.path, tmp_path / "out", form, force=True)
    assert snapshot(tmp_path / "out") == before


def test_a_folder_that_cannot_be_written(subset, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(InputError, match=r"file: cannot write here \(.*\); choose another place"):
        export_images(subset.path, tmp_path / "file" / "out", "webdataset")


def test_without_the_library(subset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--format hf needs datasets, not installed: pip install datasets$"):
        export_images(subset.path, tmp_path / "out", "hf")
    assert not list(tmp_path.glob("out*"))


def test_other_artifacts_and_formats_are_refused(tiny, subset, tmp_path):
    with pytest.raises(InputError, match="is of kind DATASET; expected a SUBSET"):
        export_images(tiny.path, tmp_path / "out", "numpy")
    with pytest.raises(InputError, match="format 'tfrecord': unknown; known: webdataset, hf, numpy"):
        export_images(subset.path, tmp_path / "out", "tfrecord")
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"shard_mb=.*expected a number of MB above 0"):
            export_images(subset.path, tmp_path / "out", "webdataset", shard_mb=wrong)


# The command


def test_command(subset, tiny_run, tmp_path, command):
    assert [form.value for form in command_module.Format] == ["beton", *FORMATS]
    make_labels(subset.path.with_name("labels-1"), subset)
    make_labels(subset.path.with_name("labels-2"), subset, seed=1)  # several, which this format does not take
    out = tmp_path / "out"
    code, text = command(command_module.main, subset.path, out, "--format", "webdataset", "--shard-mb", "0.1")
    assert code == 0, text
    count = len(list(out.glob("*.tar")))
    assert count > 1
    assert f"EXPORT: {out}: 60 images in {count} shards, " in text
    code, text = command(command_module.main, subset.path, out, "--format", "webdataset", "--shard-mb", "0.1")
    assert "reused: it was exported before" in text
    code, text = command(command_module.main, subset.path, tmp_path / "n", "--format", "numpy", "--json")
    assert code == 0
    (line,) = [json.loads(one) for one in text.splitlines() if one.startswith("{")]
    assert (line["kind"], line["format"], line["count"], line["built"]) == ("EXPORT", "numpy", 60, True)
    assert line["bytes"] == sum(stamp.size for stamp in artifacts.load(tmp_path / "n").manifest.files.values())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--format", "tfrecord"], "'tfrecord' is not one of"),
        (["--format", "numpy", "--shard-mb", "3"], "--format numpy has no shards"),
        (["--shard-mb", "3"], "--shard-mb: is for --format webdataset"),
        (["--format", "webdataset", "--shard-mb", "-3"], "--shard-mb"),
        (["--format", "webdataset", "--labels", "x"], "--labels: --format webdataset has the logits of the evaluation"),
        (["--format", "webdataset", "--model", "my/net.py:f"], "is no RUN; --model belongs to"),
    ],
)
def test_command_explains_wrong_options(subset, tmp_path, command, words, text):
    code, told = command(command_module.main, subset.path, tmp_path / "out", *words)
    assert code == 2
    assert text in " ".join(told.split())
    assert not list(tmp_path.glob("out*"))


def test_command_refuses_a_format_of_a_run(tiny_run, tmp_path, command):
    for words in (("--format", "hf"), ("--shard-mb", "3")):
        code, told = command(command_module.main, tiny_run.path, tmp_path / "out", *words)
        assert code == 2
        assert "is a RUN; --format, --shard-mb, --data and --labels are for a SUBSET" in told
