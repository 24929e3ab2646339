"""Every file of every kind of artifact, damaged in many ways: damaged, foreign or stale artifacts are never used."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastkd import artifacts, check, pipeline, recipe
from fastkd.artifacts import MANIFEST
from fastkd.errors import ArtifactError
from fastkd.export.dataset import export_dataset
from fastkd.export.images import export_images
from fastkd.pipeline import Pipeline
from fastkd.verification import check_recipe

KINDS = ("DATASET", "SCORES", "SUBSET", "LABELS", "RUN", "export", "EXPORT")
FLIPS = 12  # of each file


@pytest.fixture(scope="module")
def recipe_file(tiny, tiny_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    shutil.copytree(tiny.path, folder / "tiny")
    file = folder / "student.yaml"
    file.write_text(
        f"""
name: student
data: {{path: {folder / "tiny"}, view: {{family: flip}}}}
teacher: {{model: cifar/resnet8, weights: {tiny_teacher}}}
prune: {{keep_ratio: 0.5}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 2, batch_size: 25, compile: false, runs_dir: {folder / "runs"}}}
"""
    )
    return file


@pytest.fixture(scope="module")
def whole(recipe_file) -> dict[str, Path]:
    """A real pipe, and two exports of it, for fastkd and as shards: each test leaves them as they were."""
    pipe = Pipeline(recipe.load(recipe_file))
    run, _ = pipe.train(source=recipe_file)
    export, _ = export_dataset(pipe.subset.path, recipe_file.parent / "export")
    shards, _ = export_images(pipe.subset.path, recipe_file.parent / "shards", "webdataset", shard_mb=0.05)
    made = (pipe.dataset, pipe.scores, pipe.subset, pipe.labels, run, export, shards)
    return {kind: artifact.path for kind, artifact in zip(KINDS, made, strict=True)}


@pytest.fixture(scope="module")
def twins(whole, reseal, tmp_path_factory) -> dict[str, Path]:
    """For each artifact another that is whole by itself, of the same names and sizes: other bytes, right checksums."""
    found = {}
    for kind, path in whole.items():
        twin = tmp_path_factory.mktemp("twins") / kind
        shutil.copytree(path, twin)
        for name in artifacts.read_manifest(twin).files:
            file = twin / name
            file.write_bytes(file.read_bytes()[::-1])
        reseal(twin)
        assert artifacts.load(twin)
        found[kind] = twin
    return found


def files_of(path: Path) -> list[str]:
    return sorted(artifacts.read_manifest(path).files)


@contextlib.contextmanager
def restored(*files: Path) -> Iterator[list[bytes]]:
    """Give the bytes of files, and put them back in the end."""
    before = [file.read_bytes() for file in files]
    try:
        yield before
    finally:
        for file, data in zip(files, before, strict=True):
            file.write_bytes(data)


def refused(path: Path, name: str, why: str) -> None:
    """Loading ends in the one error, which names the file."""
    with pytest.raises(ArtifactError, match=why) as error:
        artifacts.load(path)
    assert str(path / name) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_any_file__is_detected_before_use(whole, kind):
    path, rng = whole[kind], np.random.default_rng(KINDS.index(kind))
    artifacts.load(path)  # there is a verdict now, which must not be trusted
    for name in files_of(path):
        file = path / name
        size = file.stat().st_size
        places = [0, size - 1, *rng.integers(0, size, FLIPS - 2).tolist()]
        for at in places:
            with file.open("r+b") as stream:
                stream.seek(at)
                (byte,) = stream.read(1)
                stream.seek(at)
                stream.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
                stream.flush()
                refused(path, name, "damaged: its xxh3-128 is")
                stream.seek(at)
                stream.write(bytes([byte]))
    assert artifacts.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_any_manifest__is_detected_or_has_no_effect(whole, kind):
    path, rng = whole[kind], np.random.default_rng(10 + KINDS.index(kind))
    file, right, unnamed = path / MANIFEST, artifacts.read_manifest(path), 0
    with restored(file) as (text,):
        for at in rng.integers(0, len(text), 300):
            file.write_bytes(text[:at] + bytes([text[at] ^ (1 << int(rng.integers(8)))]) + text[at + 1 :])
            try:
                assert artifacts.load(path).manifest == right
            except ArtifactError as error:
                unnamed += str(path) not in str(error)
    assert not unnamed


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_truncated_or_extended_or_missing__are_refused_by_name(whole, kind):
    path = whole[kind]
    for name in [*files_of(path), MANIFEST]:
        why = "not a fastkd manifest" if name == MANIFEST else r"damaged: \d+ bytes, the manifest says \d+"
        with restored(path / name) as (data,):
            # A manifest without its last line's end is the same manifest.
            for cut in (data[: -2 if name == MANIFEST else -1], data[: len(data) // 2], b"", data + b"\0"):
                (path / name).write_bytes(cut)
                refused(path, name, why)
            (path / name).unlink()
            with pytest.raises(ArtifactError, match="missing") as error:
                artifacts.load(path)
            assert str(path) in str(error.value)
    assert artifacts.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_or_manifest_of_another_artifact_of_the_same_sizes__is_refused(whole, twins, kind):
    path, twin = whole[kind], twins[kind]
    for name in files_of(path):
        with restored(path / name):
            shutil.copyfile(twin / name, path / name)
            refused(path, name, "damaged: its xxh3-128 is")
    artifacts.load(path)  # no file changes from here on: only the manifest tells that they are not its own
    with restored(path / MANIFEST):
        shutil.copyfile(twin / MANIFEST, path / MANIFEST)
        refused(path, files_of(path)[0], "damaged: its xxh3-128 is")
    assert artifacts.load(path)


@pytest.mark.parametrize("kind", ["SCORES", "SUBSET", "LABELS"])
def test_arrays_of_another_byte_order_type_or_shape_with_right_checksums__are_refused(whole, reseal, kind):
    path = whole[kind]
    for name in files_of(path):
        array = np.load(path / name)
        swapped = array.astype(array.dtype.newbyteorder())
        for wrong in (swapped, array.astype(np.float64 if array.dtype != np.float64 else np.float32), array[:-1]):
            with restored(path / name, path / MANIFEST):
                np.save(path / name, wrong)
                reseal(path)
                loaded = artifacts.load(path, kind)
                with pytest.raises(ArtifactError, match=r"holds .*, where .* belongs") as error:
                    loaded.array(name)
                assert str(path / name) in str(error.value)
        assert np.array_equal(artifacts.load(path).array(name), array)


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_key_or_another_format_version__is_refused(whole, reseal, kind):
    path = whole[kind]
    manifest = artifacts.read_manifest(path)
    for values, why in (
        ({"key": "0" * 32}, "the key does not match the key fields"),
        ({"inputs": manifest.inputs | {"more": 1}}, "the key does not match the key fields"),
        ({"format_version": artifacts.FORMAT_VERSION + 1}, "format version 3; this fastkd .* reads 2"),
        ({"format_version": 1}, r"format version 1; this fastkd .* reads 2\. Build it again"),
    ):
        with restored(path / MANIFEST):
            reseal(path, **values)
            with pytest.raises(ArtifactError, match=why):
                artifacts.load(path)


@pytest.mark.parametrize("kind", ["SCORES", "SUBSET", "LABELS", "RUN"])
def test_an_artifact_made_from_other_parents__is_not_used(whole, recipe_file, reseal, kind):
    """Whole and right by itself, but of other inputs or of stale parents: the recipe's own is asked for by name."""
    path, loaded = whole[kind], recipe.load(recipe_file)
    manifest = artifacts.read_manifest(path)
    other = manifest.inputs | {"more": 1}
    foreign = {"inputs": other, "key": artifacts.key_of(manifest.kind, other)}
    stale = {"parents": manifest.parents | {"DATASET": "0" * 32}}
    for values, why in (
        (foreign, "made from other key fields than requested: more is 1, not None"),
        (stale, "has other parents than those in use: DATASET is '0000"),
    ):
        with restored(path / MANIFEST):
            reseal(path, **values)
            for use in (pipeline.train, check_recipe) if kind != "RUN" else (pipeline.train,):
                with pytest.raises(ArtifactError, match=why) as error:
                    use(loaded)
                assert str(path) in str(error.value)
    assert not pipeline.train(loaded)[1]


def test_an_export_with_another_subset_inside__is_refused(whole, reseal, recipe_file):
    """The folder within an export is an artifact that somebody may replace, with right checksums all the way up."""
    path, inside = whole["export"], whole["export"] / "subset"
    manifest = artifacts.read_manifest(inside)
    other = manifest.inputs | {"more": 1}
    foreign = {"inputs": other, "key": artifacts.key_of("SUBSET", other)}
    for values in (foreign, {"parents": manifest.parents | {"DATASET": "0" * 32}}):
        with restored(path / MANIFEST, inside / MANIFEST):
            reseal(inside, **values)
            reseal(path)
            with pytest.raises(ArtifactError, match=r"is not the SUBSET that .* was made from; export again"):
                _ = Pipeline(recipe.load(recipe_file, [f"data.path={path}"])).subset


def test_labels_made_before_their_subset_was_built_again__are_not_exported(whole, reseal, tmp_path):
    """A SUBSET of the same key may keep other samples, and then the rows are of others."""
    subset, labels = whole["SUBSET"], whole["LABELS"]
    ids = np.load(subset / "indices.npy")
    with restored(subset / "indices.npy", subset / MANIFEST):
        row = int(np.flatnonzero(np.diff(ids) > 3)[0])
        ids[row] += 3  # a sample of the same class that was left out
        np.save(subset / "indices.npy", ids)
        reseal(subset)
        with pytest.raises(ArtifactError, match=r"was made before .* was built again; label again"):
            export_dataset(subset, tmp_path / "out", labels=labels)
        assert export_dataset(subset, tmp_path / "out")[0].facts["export"]["labels"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_damage_that_check_finds__is_reported_in_one_line_with_exit_code_2(whole, command, kind):
    path = whole[kind]
    name = files_of(path)[-1]
    with restored(path / name) as (data,):
        (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        code, said = command(check.main, path)
        assert code == 2
        assert said.startswith(f"error: {path / name}: damaged: its xxh3-128 is")
        assert said.count("\n") == 1
    os.utime(path / name)
    assert command(check.main, path)[0] == 0
