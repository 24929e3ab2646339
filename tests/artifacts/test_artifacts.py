import json
import multiprocessing
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastkd import artifacts
from fastkd.artifacts import Built, building, verifying
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

    monkeypatch.setattr(verifying, "file_digest", never)
    artifacts.load(subset.path)
    os.utime(subset.path / "indices.npy")
    with pytest.raises(AssertionError, match="checksum computed"):
        artifacts.load(subset.path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 1}, "format version 1; this fastkd .* reads 2. Build it again"),
        ({"format_version": 99}, "format version 99; this fastkd"),
        ({"kind": "NONSENSE"}, "not a fastkd manifest"),
        ({"inputs": {"data": "other"}}, "the key does not match the key fields"),
        ({"surprise": 1}, "not a fastkd manifest"),
        *(
            ({"files": {name: {"size": 1, "xxh3_128": "0"}}}, "leads out of the artifact")
            for name in ("../x", "/etc/passwd", "views/../../x", "..", ".", "", "a//b", "./a", "a/", "a\\b", "a\0b")
        ),
    ],
)
def test_a_changed_manifest_is_refused(subset, reseal, values, message):
    reseal(subset.path, **values)
    with pytest.raises(ArtifactError, match=message):
        artifacts.load(subset.path)


@pytest.mark.parametrize(
    "name", ["kind", "created", "key", "parents", "settings", "facts", "cost_s", "files", "digest"]
)
def test_no_field_of_a_manifest_can_change_unseen(subset, name):
    """The key is of the inputs alone; the digest is of all the rest."""
    file = subset.path / "manifest.json"
    fields = json.loads(file.read_text())
    other = {"kind": "LABELS", "cost_s": 0.5, "digest": "0" * 32, "key": "0" * 32, "created": "yesterday"}
    fields[name] = other.get(name, {"a": "b"}) if name != "files" else {}
    file.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="damaged, or changed by hand"):
        artifacts.load(subset.path)


def test_any_flipped_bit_of_a_manifest_is_seen_or_changes_nothing(subset):
    """All bits of all bytes: what is let through is the same manifest, written otherwise (blanks, escapes)."""
    file = subset.path / "manifest.json"
    text, refused = file.read_bytes(), 0
    for at in range(len(text)):
        for bit in range(8):
            file.write_bytes(text[:at] + bytes([text[at] ^ (1 << bit)]) + text[at + 1 :])
            try:
                assert artifacts.read_manifest(subset.path) == subset.manifest
            except ArtifactError as error:
                refused += str(subset.path) in str(error)
    assert refused > 0.85 * 8 * len(text)


def test_a_verdict_is_of_the_manifest_too(subset, tmp_path, reseal):
    """Another manifest over the same files, as large as the first, is no reason to trust them."""
    before = (subset.path / ".verified.json").read_bytes()
    fields = json.loads((subset.path / "manifest.json").read_text())
    fields["files"]["indices.npy"]["xxh3_128"] = "0" * 32
    (subset.path / "manifest.json").write_text(json.dumps(fields | {"digest": artifacts.digest_of(fields)}))
    with pytest.raises(ArtifactError, match=r"indices\.npy: damaged: its xxh3-128"):
        artifacts.load(subset.path)
    assert (subset.path / ".verified.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, "\xff", '{"manifest.json": 1}'])
def test_a_damaged_verdict_is_no_verdict(subset, text):
    verdict = subset.path / ".verified.json"
    verdict.write_bytes(text.encode("latin-1"))
    assert artifacts.load(subset.path).manifest == subset.manifest
    assert json.loads(verdict.read_bytes())["manifest.json"] == subset.manifest.digest


def test_damage_that_keeps_the_times_of_a_file_is_found(subset):
    file = subset.path / "indices.npy"
    times = file.stat()
    time.sleep(0.02)  # a clock of the file system's ticks every few milliseconds
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArtifactError, match=r"indices\.npy: damaged: its xxh3-128"):
        artifacts.load(subset.path)


@pytest.mark.parametrize("what", ["a file elsewhere", "a folder elsewhere", "a directory"])
def test_links_out_of_an_artifact_are_refused(tmp_path, what):
    """However right the checksum: what lies elsewhere is not the artifact's."""

    def nested(directory: Path) -> Built:
        (directory / "views").mkdir()
        np.save(directory / "views" / "v0000.npy", np.zeros((2, 3), np.float16))
        return Built()

    made = artifacts.build(tmp_path / "labels", "LABELS", INPUTS, nested)[0]
    moved = made.path / "views" if what == "a folder elsewhere" else made.path / "views" / "v0000.npy"
    moved.rename(tmp_path / "elsewhere")
    if what == "a directory":
        moved.mkdir()
    else:
        moved.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"v0000\.npy: is a link or no file"):
        artifacts.load(made.path)


def test_an_artifact_may_itself_be_reached_through_a_link(subset, tmp_path):
    (tmp_path / "link").symlink_to(subset.path)
    assert artifacts.load(tmp_path / "link").manifest == subset.manifest


def test_other_parents_than_those_in_use_are_refused(subset):
    """The key says what an artifact is to be made from, its parents what it was made from."""
    assert artifacts.build(subset.path, "SUBSET", INPUTS, fill, parents={"SCORES": "p"})[1] is False
    with pytest.raises(ArtifactError, match="has other parents than those in use: SCORES is 'p', not 'q'"):
        artifacts.build(subset.path, "SUBSET", INPUTS, fill, parents={"SCORES": "q"})


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
    with pytest.raises(ArtifactError, match=r"made from other key fields than requested: keep_ratio is 0\.5, not 0\.3"):
        artifacts.build(subset.path, "SUBSET", INPUTS | {"keep_ratio": 0.3}, fill)


def test_nearest_names_the_most_alike_and_what_differs(subset, tmp_path):
    other = {"data": "x", "teacher": {"model": "y", "weights": "z"}, "keep_ratio": 0.5}
    artifacts.build(tmp_path / "far", "SUBSET", other, fill)
    asked = INPUTS | {"teacher": {"model": "cifar/resnet8", "weights": "456"}}
    assert artifacts.nearest(tmp_path, "SUBSET", asked) == "subset: teacher.weights is '123' there and '456' here"
    assert artifacts.nearest(tmp_path, "LABELS", asked) is None


def test_nearest_says_which_values_are_missing_and_names_four_at_most(subset, tmp_path):
    settings = dict.fromkeys("abcdef", 1)
    said = artifacts.nearest(tmp_path, "SUBSET", {k: v for k, v in INPUTS.items() if k != "keep_ratio"} | settings)
    assert said == (
        "subset: a is not set there and 1 here; b is not set there and 1 here; c is not set there and 1 here; "
        "d is not set there and 1 here and 3 more"
    )


def array_artifact(folder: Path, array: np.ndarray, name: str = "indices.npy", **facts: object) -> artifacts.Artifact:
    def saved(directory: Path) -> Built:
        np.save(directory / name, array, allow_pickle=True)
        return Built(facts=facts)

    return artifacts.build(folder / "subset", "SUBSET", INPUTS, saved)[0]


def test_pickled_arrays_are_refused(tmp_path):
    artifact = array_artifact(tmp_path, np.array([{"a": 1}], dtype=object), count=1)
    with pytest.raises(ArtifactError, match=r"not a plain \.npy array"):
        artifact.array("indices.npy")


@pytest.mark.parametrize(
    ("array", "facts", "found"),
    [
        (np.arange(5, dtype=">i8"), {"count": 5}, r"holds >i8 \[5\], where <i8 \[5\] belongs"),
        (np.arange(5, dtype=np.int32), {"count": 5}, r"holds <i4 \[5\], where <i8 \[5\] belongs"),
        (np.arange(5.0), {"count": 5}, r"holds <f8 \[5\]"),
        (np.arange(5), {"count": 6}, r"holds <i8 \[5\], where <i8 \[6\] belongs"),
        (np.arange(5), {}, r"holds <i8 \[5\], where <i8 \[None\] belongs"),
        (np.arange(4).reshape(2, 2), {"count": 4}, r"holds <i8 \[2, 2\]"),
        (np.array(7), {"count": 1}, r"holds <i8 \[\]"),
        (np.zeros(3, [("a", "<i8")]), {"count": 3}, r"holds records \[3\]"),
    ],
)
def test_an_array_of_another_type_or_shape_than_the_facts_say_is_refused(tmp_path, array, facts, found):
    with pytest.raises(ArtifactError, match=r"indices\.npy: " + found + ".*build it again"):
        array_artifact(tmp_path, array, **facts).array("indices.npy")


def test_an_array_that_lies_column_by_column_is_refused(tmp_path):
    columns = np.asfortranarray(np.zeros((4, 3), np.float16))
    artifact = array_artifact(tmp_path, columns, "logits.npy", count=4, classes=3)
    with pytest.raises(ArtifactError, match="column by column, where <f2"):
        artifact.array("logits.npy")


def test_an_array_that_the_kind_does_not_have_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="a SUBSET has no array of this name"):
        array_artifact(tmp_path, np.arange(3), "else.npy", count=3).array("else.npy")


@pytest.mark.parametrize("shape", [(2**40,), (2**62, 4), (10**30,), (-1,), (2**33, 2**33)])
def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path, shape):
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    with (tmp_path / "a.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(b"\0" * 80)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.npy: not a plain \.npy array"):
        artifacts.open_array(tmp_path / "a.npy")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_an_archive_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npy.npz", a=np.arange(3))
    with pytest.raises(InputError, match=r"not a plain \.npy array"):
        artifacts.open_array(tmp_path / "a.npy.npz")


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


def test_what_can_be_gone_on_with_says_what_it_is_to_be_until_it_is(tmp_path):
    seen = []

    def looks(directory: Path) -> Built:
        seen.append(json.loads((directory / artifacts.BEGUN).read_text()))
        return fill(directory)

    made, _ = artifacts.build(tmp_path / "run", "RUN", INPUTS, looks, parents={"DATASET": "d"}, resumable=True)
    assert seen == [{"kind": "RUN", "key": made.key, "parents": {"DATASET": "d"}}]
    assert set(made.manifest.files) == {"indices.npy"}
    assert not (made.path / artifacts.BEGUN).exists()


def test_what_was_refused_or_failed_at_the_very_end_stays_known_for_what_it_is(tmp_path, monkeypatch):
    def ask(inputs: dict, builder) -> None:
        artifacts.build(tmp_path / "run", "RUN", inputs, builder, resumable=True)

    def refuses(directory: Path) -> Built:
        raise InputError("was started with another recipe")

    def killed(path: Path) -> str:
        raise KeyboardInterrupt

    begun = tmp_path / f"run{artifacts.PARTIAL}" / artifacts.BEGUN
    with monkeypatch.context() as patch:
        patch.setattr(building, "file_digest", killed)
        with pytest.raises(KeyboardInterrupt):
            ask({"a": 1}, fill)
    key = artifacts.key_of("RUN", {"a": 1})
    assert json.loads(begun.read_text())["key"] == key
    with pytest.raises(InputError):
        ask({"a": 2}, refuses)
    assert json.loads(begun.read_text())["key"] == key


# --- deleting -------------------------------------------------------------------------------------------------------


def test_deleting_leaves_nothing_and_touches_nothing_else(subset, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    (subset.path / "link").symlink_to(outside)
    (subset.path / "file").symlink_to(outside / "thesis.tex")
    artifacts.remove(subset.path)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["outside"]
    assert (outside / "thesis.tex").read_text() == "years of work"


def test_what_is_being_built_is_not_deleted(tmp_path):
    def tries(directory: Path) -> Built:
        assert artifacts.in_use(tmp_path / "subset")
        for path in (directory, tmp_path / "subset"):
            with pytest.raises(InputError, match="another process is at work on it; nothing was deleted"):
                artifacts.remove(path)
        return fill(directory)

    made, _ = artifacts.build(tmp_path / "subset", "SUBSET", INPUTS, tries)
    assert artifacts.load(made.path).manifest == made.manifest
    assert not artifacts.in_use(made.path)


def test_a_link_is_not_deleted_nor_what_it_leads_to(subset, tmp_path):
    (tmp_path / "link").symlink_to(subset.path)
    with pytest.raises(InputError, match="is a link or no directory"):
        artifacts.remove(tmp_path / "link")
    assert artifacts.load(subset.path).manifest == subset.manifest


def test_a_deletion_that_was_killed_is_finished_by_the_next_and_never_taken_for_an_artifact(
    subset, tmp_path, monkeypatch
):
    def killed(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            artifacts.remove(subset.path)
    left = subset.path.with_name("subset.fastkd-removed")
    assert left.is_dir()
    assert not subset.path.exists()
    assert artifacts.build(subset.path, "SUBSET", INPUTS, fill)[1]
    artifacts.remove(left)
    assert not left.exists()
    assert artifacts.load(subset.path).facts == {"count": 1000}
