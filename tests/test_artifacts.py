import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from fastkd import artifacts
from fastkd.artifacts import Built
from fastkd.errors import ArtifactError, InputError

INPUTS = {"data": "abc", "teacher": {"model": "cifar/resnet8", "weights": "123"}, "keep_ratio": 0.5}


def fill(directory: Path) -> Built:
    np.save(directory / "indices.npy", np.arange(1000))
    return Built(facts={"count": 1000})


@pytest.fixture
def subset(tmp_path: Path) -> artifacts.Artifact:
    return artifacts.build(tmp_path / "subset", "SUBSET", INPUTS, fill, parents={"SCORES": "p"})[0]


def test_a_published_artifact_loads_as_it_was_built(subset):
    again = artifacts.load(subset.path, "SUBSET")
    assert again.manifest == subset.manifest
    assert again.key == artifacts.key_of("SUBSET", INPUTS)
    assert again.facts == {"count": 1000}
    assert again.manifest.parents == {"SCORES": "p"}
    assert again.cost_s >= 0
    assert np.array_equal(again.array("indices.npy"), np.arange(1000))
    assert not list(subset.path.parent.glob("*.fastkd-partial"))


def test_the_key_depends_on_every_input_and_on_the_kind_but_not_on_order():
    key = artifacts.key_of("SUBSET", INPUTS)
    assert key == artifacts.key_of("SUBSET", dict(reversed(INPUTS.items())))
    assert key != artifacts.key_of("LABELS", INPUTS)
    assert key != artifacts.key_of("SUBSET", INPUTS | {"keep_ratio": 0.500001})


def test_a_second_build_reuses_the_first(subset):
    def never(directory: Path) -> Built:
        raise AssertionError("built again")

    again, built = artifacts.build(subset.path, "SUBSET", INPUTS, never)
    assert not built
    assert again.manifest == subset.manifest


def test_force_builds_again_and_a_failure_keeps_the_old_one(subset):
    def broken(directory: Path) -> Built:
        (directory / "half").write_text("done")
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        artifacts.build(subset.path, "SUBSET", INPUTS, broken, force=True)
    assert artifacts.load(subset.path).manifest == subset.manifest
    assert not list(subset.path.parent.glob("*.fastkd-partial"))

    again, built = artifacts.build(subset.path, "SUBSET", INPUTS, fill, force=True)
    assert built
    assert again.key == subset.key
    assert sorted(p.name for p in subset.path.parent.iterdir() if not p.name.startswith(".")) == ["subset"]


def test_what_a_killed_builder_left_is_cleared(tmp_path):
    partial = tmp_path / "subset.fastkd-partial"
    partial.mkdir()
    (partial / "foreign").write_text("left over")
    artifact, _ = artifacts.build(tmp_path / "subset", "SUBSET", INPUTS, fill)
    assert set(artifact.manifest.files) == {"indices.npy"}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("offset", [0, 100, 4000, -1])
def test_a_flipped_byte_is_found(subset, offset):
    flip(subset.path / "indices.npy", offset)
    with pytest.raises(ArtifactError, match=r"indices\.npy: damaged: its xxh3-128"):
        artifacts.load(subset.path)


def test_a_truncated_a_missing_and_a_foreign_file_are_found(subset, tmp_path):
    file = subset.path / "indices.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"damaged: \d+ bytes, the manifest says \d+"):
        artifacts.load(subset.path)
    file.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        artifacts.load(subset.path)
    with pytest.raises(ArtifactError, match=r"holds no 'logits\.npy'"):
        subset.file("logits.npy")


def test_the_verdict_spares_checksums_until_a_file_changes(subset, monkeypatch):
    def never(path: Path) -> str:
        raise AssertionError("checksum computed")

    monkeypatch.setattr(artifacts, "file_digest", never)
    artifacts.load(subset.path)
    os.utime(subset.path / "indices.npy")
    with pytest.raises(AssertionError, match="checksum computed"):
        artifacts.load(subset.path)


def change_manifest(artifact: artifacts.Artifact, **values: object) -> None:
    file = artifact.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 99}, "format version 99; this fastkd"),
        ({"kind": "NONSENSE"}, "not a fastkd manifest"),
        ({"inputs": {"data": "other"}}, "the key does not follow from the inputs"),
        ({"files": {"../../etc/passwd": {"size": 1, "xxh3_128": "0"}}}, "leads out of the artifact"),
        ({"files": {"/etc/passwd": {"size": 1, "xxh3_128": "0"}}}, "leads out of the artifact"),
        ({"surprise": 1}, "not a fastkd manifest"),
    ],
)
def test_a_changed_manifest_is_refused(subset, values, message):
    change_manifest(subset, **values)
    with pytest.raises(ArtifactError, match=message):
        artifacts.load(subset.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": "SUBSET"}', "\xff\x00", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(subset, text):
    (subset.path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="not a fastkd manifest"):
        artifacts.load(subset.path)


def test_a_wrong_kind_and_a_missing_directory_are_refused(subset, tmp_path):
    with pytest.raises(ArtifactError, match="holds a SUBSET, where a DATASET is expected"):
        artifacts.load(subset.path, "DATASET")
    with pytest.raises(ArtifactError, match=r"no artifact here: manifest\.json is missing"):
        artifacts.load(tmp_path / "nowhere")


def test_another_key_at_the_same_place_says_what_differs(subset):
    with pytest.raises(ArtifactError, match=r"made from other inputs than asked for: keep_ratio is 0\.5, not 0\.3"):
        artifacts.build(subset.path, "SUBSET", INPUTS | {"keep_ratio": 0.3}, fill)


def test_nearest_names_the_most_alike_and_what_differs(subset, tmp_path):
    other = {"data": "x", "teacher": {"model": "y", "weights": "z"}, "keep_ratio": 0.5}
    artifacts.build(tmp_path / "far", "SUBSET", other, fill)
    asked = INPUTS | {"teacher": {"model": "cifar/resnet8", "weights": "456"}}
    assert artifacts.nearest(tmp_path, "SUBSET", asked) == "subset: teacher.weights is '123', not '456'"
    assert artifacts.nearest(tmp_path, "LABELS", asked) is None


def test_pickled_arrays_are_refused(tmp_path):
    def pickled(directory: Path) -> Built:
        np.save(directory / "indices.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        return Built()

    artifact, _ = artifacts.build(tmp_path / "subset", "SUBSET", INPUTS, pickled)
    with pytest.raises(ArtifactError, match=r"not a plain \.npy array"):
        artifact.array("indices.npy")


def slow_build(path: Path, built: "multiprocessing.Queue[bool]") -> None:
    def slow(directory: Path) -> Built:
        time.sleep(1.0)
        return fill(directory)

    built.put(artifacts.build(path, "SUBSET", INPUTS, slow)[1])


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    built = context.Queue()
    processes = [context.Process(target=slow_build, args=(tmp_path / "subset", built)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted([built.get(), built.get()]) == [False, True]
    assert artifacts.load(tmp_path / "subset").facts == {"count": 1000}


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write here"):
        artifacts.build(tmp_path / "file" / "subset", "SUBSET", INPUTS, fill)


def test_what_failed_and_can_be_gone_on_with_keeps_its_folder(tmp_path):
    def fails(directory: Path) -> Built:
        (directory / "metrics.jsonl").write_text("{}\n")
        raise RuntimeError("loss")

    with pytest.raises(RuntimeError):
        artifacts.build(tmp_path / "run", "RUN", INPUTS, fails, resumable=True)
    assert (tmp_path / "run.fastkd-partial" / "metrics.jsonl").read_text() == "{}\n"
    with pytest.raises(ArtifactError, match=r"run\.fastkd-partial beside it was not finished"):
        artifacts.load(tmp_path / "run")
