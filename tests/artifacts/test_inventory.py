"""What lies on the disk, what it is needed for, and what may be deleted."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from filelock import FileLock

from fastkd import artifacts, pipeline
from fastkd.artifacts import Artifact, Built, inventory
from fastkd.artifacts.__main__ import gc, ls
from fastkd.export.dataset import export_dataset
from fastkd.pipeline import Pipeline

VIEWS = ("data.view.family=flip", "train.epochs=2")


def make(path: Path, kind: artifacts.Kind, *parents: Artifact, size: int = 1000) -> Artifact:
    """Publish an artifact of one file."""

    def fill(directory: Path) -> Built:
        (directory / "bytes").write_bytes(b"x" * size)
        return Built()

    keys = {parent.manifest.kind: parent.key for parent in parents}
    return artifacts.build(path, kind, {"path": path.name}, fill, parents=keys)[0]


class Disk:
    """A trained student's artifacts, and SCORES → SUBSET → LABELS that nobody trained on."""

    def __init__(self, root: Path) -> None:
        own = root / "data" / "pets.artifacts"
        self.data = make(root / "data" / "pets", "DATASET")
        self.scores = make(own / "scores-1", "SCORES", self.data)
        self.subset = make(own / "subset-1", "SUBSET", self.data, self.scores)
        self.labels = make(own / "labels-1", "LABELS", self.data, self.subset)
        self.run = make(root / "runs" / "student-1", "RUN", self.data, self.subset, self.labels)
        self.scores2 = make(own / "scores-2", "SCORES", self.data, size=10**6)
        self.subset2 = make(own / "subset-2", "SUBSET", self.data, self.scores2)
        self.labels2 = make(own / "labels-2", "LABELS", self.data, self.subset2)
        self.unused = [self.labels2.path, self.subset2.path, self.scores2.path]


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Disk:
    monkeypatch.chdir(tmp_path)
    return Disk(tmp_path)


@pytest.fixture
def run(command) -> Callable[..., tuple[int, str]]:
    """Return a function that runs ``fastkd.artifacts NAME …``."""

    def both(*arguments: object) -> tuple[int, str]:
        return command({"ls": ls, "gc": gc}[str(arguments[0])], *arguments, named=True)

    return both


def left(root: Path) -> set[str]:
    return {p.parent.name for p in root.rglob("bytes")}


def unneeded(*folders: Path) -> list[Path]:
    return [one.path.resolve() for one in inventory.unneeded(folders)]


def test_ls_tells_kind_size_key_and_users(disk, run):
    code, said = run("ls")
    assert code == 0
    for artifact, user in ((disk.scores, "subset-1"), (disk.labels, "student-1"), (disk.scores2, "subset-2")):
        (line,) = (line for line in said.splitlines() if artifact.key[:12] in line)
        assert artifact.manifest.kind in line
        assert str(artifact.path.relative_to(Path.cwd())) in line
        assert user in line
    assert "1.0 MB" in next(line for line in said.splitlines() if disk.scores2.key[:12] in line)
    assert "8 artifacts, 1.0 MB" in said


def test_ls_prints_json(disk, run, json_in):
    code, said = run("ls", "--json", "data", "runs")
    told = json_in(said)
    found = {Path(one["path"]).name: one for one in told["artifacts"]}
    assert told["bytes"] == sum(one["bytes"] for one in found.values())
    assert code == 0
    assert set(found) == {f"{kind}-{n}" for kind in ("scores", "subset", "labels") for n in (1, 2)} | {
        "pets",
        "student-1",
    }
    assert found["subset-1"]["used_by"] == ["data/pets.artifacts/labels-1", "runs/student-1"]
    assert found["scores-2"]["bytes"] > 10**6
    assert found["scores-2"]["key"] == disk.scores2.key
    assert {one["state"] for one in found.values()} == {"published"}


def test_a_folder_that_is_not_there_is_an_error_and_an_empty_one_is_none(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run("ls", "nowhere")
    assert code == 2
    assert "nowhere: no such folder" in said
    assert "0 artifacts" in run("ls")[1]
    assert "there is nothing to delete" in run("gc")[1]


def test_gc_deletes_what_no_run_needs_and_nothing_else(disk, run, tmp_path):
    before = left(tmp_path)
    code, said = run("gc", "--dry-run")
    assert code == 0
    assert "3 folders, 1.0 MB, are needed by no RUN and no export here" in said
    assert "a recipe that has not been trained yet may need them" in said
    assert left(tmp_path) == before
    sizes = sum(f.stat().st_size for path in disk.unused for f in path.rglob("*"))
    code, said = run("gc", "--yes")
    assert code == 0
    assert f"({sizes:,} bytes)" in said
    assert left(tmp_path) == before - {path.name for path in disk.unused}
    for artifact in (disk.data, disk.scores, disk.subset, disk.labels, disk.run):
        assert artifacts.load(artifact.path).manifest == artifact.manifest
    assert "there is nothing to delete" in run("gc")[1]


def test_what_lay_beside_goes_with_it_but_for_locks_and_what_is_somebody_elses(disk, run, tmp_path):
    """Pictures, and how far the teacher had come; what a process that waits has open is no file to delete."""
    (subset,) = (path for path in disk.unused if path.name.startswith("subset"))
    (labels,) = (path for path in disk.unused if path.name.startswith("labels"))
    beside = [artifacts.progress_file(path) for path in (labels, disk.labels.path)]
    beside += [path.with_name(path.name + ".pictures") / "samples.png" for path in (subset, disk.subset.path)]
    locks = [path.with_name(f".{path.name}.lock") for path in (subset, labels)]
    thesis = beside[2].with_name("thesis.tex")
    for file in (*beside, *locks, thesis):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    assert run("gc", "--yes")[0] == 0
    assert [file.exists() for file in beside] == [False, True, False, True]
    assert all(lock.exists() for lock in locks)
    assert thesis.exists()
    thesis.unlink()
    beside[2].parent.rmdir()


def test_progress_stays_while_a_build_that_goes_on_with_it_does(disk, run):
    """Of labels that grow: what is deleted is the published artifact, or what was begun of the next."""
    (labels,) = (path for path in disk.unused if path.name.startswith("labels"))
    partial, progress = artifacts.partial_of(labels), artifacts.progress_file(labels)
    partial.mkdir()
    progress.write_text("{}")
    artifacts.remove(labels, inventory._clear_beside)
    assert progress.exists()
    artifacts.remove(partial, inventory._clear_beside)
    assert not progress.exists()


@pytest.mark.parametrize("answer", [True, False])
def test_gc_asks_first(disk, run, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(typer, "confirm", lambda question, err: answer)
    code, said = run("gc")
    assert code == 0
    assert ("subset-2" not in left(tmp_path)) == answer
    assert ("nothing was deleted" in said) != answer


def test_without_anybody_to_ask_nothing_is_deleted(disk, run, tmp_path, monkeypatch):
    before = left(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run("gc")[0] != 0
    assert left(tmp_path) == before


def test_what_was_trained_on_until_somebody_answered_is_kept(disk, run, tmp_path, monkeypatch):
    def trains_meanwhile(question: str, err: bool) -> bool:
        make(tmp_path / "runs" / "student-2", "RUN", disk.data, disk.subset2)
        return True

    monkeypatch.setattr(typer, "confirm", trains_meanwhile)
    run("gc")
    assert {"subset-2", "scores-2"} <= left(tmp_path)
    assert "labels-2" not in left(tmp_path)


def test_runs_in_the_usual_folder_count_though_another_is_looked_at(disk, run, tmp_path):
    run("gc", "--yes", "data/pets.artifacts")
    assert "subset-1" in left(tmp_path)
    assert "subset-2" not in left(tmp_path)


def test_where_no_run_is_seen_gc_says_so(disk, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "data")
    code, said = run("gc", "--dry-run", ".")
    assert code == 0
    assert "no RUN was found: name the folders that contain RUNs, too" in said


def test_an_export_needs_what_it_was_made_from(disk, tmp_path):
    make(tmp_path / "data" / "export", "DATASET", disk.data, disk.subset2)
    assert unneeded(tmp_path) == [disk.labels2.path]


def begin(path: Path, kind: artifacts.Kind, *parents: Artifact, resumable: bool = True) -> Path:
    """Leave what a killed process does."""

    def killed(directory: Path) -> Built:
        (directory / "bytes").write_bytes(b"x" * 500)
        raise KeyboardInterrupt

    keys = {parent.manifest.kind: parent.key for parent in parents}
    with pytest.raises(KeyboardInterrupt):
        artifacts.build(path, kind, {"path": path.name}, killed, parents=keys, resumable=True)
    partial = artifacts.partial_of(path)
    if not resumable:
        (partial / artifacts.BEGUN).unlink()
    return partial


def test_an_unfinished_run_is_told_and_keeps_what_it_needs(disk, run, tmp_path):
    partial = begin(tmp_path / "runs" / "student-2", "RUN", disk.data, disk.subset2, disk.labels2)
    listed = run("ls")[1]
    (line,) = (line for line in listed.splitlines() if "runs/student-2.fastkd-partial" in line)
    assert line.split("│")[1].strip() == "RUN"
    assert "unfinished: the same command resumes it" in line
    assert unneeded(tmp_path) == []
    assert run("gc", "--yes")[0] == 0
    assert partial.is_dir()
    assert artifacts.load(disk.labels2.path)


def test_a_subset_of_anybodys_logits_is_its_makers_to_delete(disk, tmp_path):
    own, _ = artifacts.build(tmp_path / "data" / "own", "SUBSET", {"logits": "mine"}, lambda folder: artifacts.Built())
    assert own.path not in unneeded(tmp_path)


def test_what_a_live_process_is_at_work_on_is_kept(disk, run, tmp_path):
    partial = begin(tmp_path / "data" / "labels-9", "LABELS", disk.data)
    with FileLock(tmp_path / "data" / ".labels-9.lock"):
        assert partial not in unneeded(tmp_path)
        assert "a process is building it" in run("ls")[1]
    assert partial in unneeded(tmp_path)


def test_what_cannot_be_deleted_is_told_and_the_rest_goes(disk, run, tmp_path):
    with FileLock(disk.subset2.path.with_name(".subset-2.lock")):
        code, said = run("gc", "--yes")
    assert code == 2
    assert "subset-2: another process is at work on it; nothing was deleted" in said
    assert "1 of 3 folders could not be deleted" in said
    assert {"scores-2", "labels-2"}.isdisjoint(left(tmp_path))
    assert "subset-2" in left(tmp_path)


def test_leftovers_are_told_apart(disk, tmp_path):
    useless = begin(tmp_path / "data" / "subset-9", "SUBSET", resumable=False)
    half = tmp_path / "data" / f"labels-9{artifacts.REMOVED}"
    half.mkdir()
    replaced = disk.run.path.with_name(disk.run.path.name + artifacts.OLD)
    replaced.mkdir()
    only = tmp_path / "runs" / f"student-9{artifacts.OLD}"  # its new one never came to its place
    only.mkdir()
    found = {one.path: one for one in inventory.scan([tmp_path])}
    assert {path: found[path].left_over for path in (useless, half, replaced, only)} == {
        useless: True, half: True, replaced: True, only: False,
    }  # fmt: skip
    assert set(unneeded(tmp_path)) == {useless, half, replaced, *disk.unused}
    assert all(error is None for _, error in inventory.remove(inventory.unneeded([tmp_path])))
    assert only.is_dir()
    assert artifacts.load(disk.run.path)


def test_what_is_no_artifact_is_told_and_left(disk, run, tmp_path):
    app = tmp_path / "data" / "app"
    app.mkdir()
    (app / "manifest.json").write_text('{"name": "a web app"}')
    (disk.scores2.path / "manifest.json").write_bytes(b"\0")
    code, said = run("gc", "--yes")
    assert code == 0
    assert "its parents are not known (not a fastkd manifest" in said
    assert (app / "manifest.json").exists()
    assert disk.scores2.path.exists()


def test_links_are_not_followed(disk, run, tmp_path):
    outside = make(tmp_path / "elsewhere" / "scores-7", "SCORES")
    (tmp_path / "data" / "link").symlink_to(outside.path.parent)
    (tmp_path / "data" / "scores-8").symlink_to(outside.path)
    assert outside.path not in unneeded(tmp_path / "data")
    assert run("gc", "--yes")[0] == 0
    assert artifacts.load(outside.path)


def test_files_that_have_another_name_do_not_count_as_freed(disk, tmp_path):
    """Labels that grow share their files with what was there before."""
    partial = begin(tmp_path / "data" / "labels-3", "LABELS")
    (partial / "shared").hardlink_to(disk.labels.path / "bytes")
    (one,) = (one for one in inventory.scan([tmp_path]) if one.path == partial)
    assert one.bytes == 500 + (partial / artifacts.BEGUN).stat().st_size


def test_of_a_real_student_nothing_is_deleted_that_it_was_made_from(tiny_recipe, tmp_path):
    """Trained, exported, and pruned once more: only the SUBSET that was never trained on goes; the rest is reused."""
    loaded = tiny_recipe(*VIEWS)
    pipe = Pipeline(loaded)
    trained, _ = pipe.train()
    export_dataset(pipe.subset.path, tmp_path / "export")
    more, _ = pipeline.prune(tiny_recipe(*VIEWS, "prune.keep_ratio=0.3"))
    assert unneeded(tmp_path) == [more.path]
    assert [error for _, error in inventory.remove(inventory.unneeded([tmp_path]))] == [None]
    again, built = pipeline.train(loaded)
    assert not built
    assert again.manifest == trained.manifest
    export_dataset(pipe.subset.path, tmp_path / "export")


def test_a_choice_and_what_it_was_made_from_are_kept_and_an_unfinished_one_too(disk, tmp_path):
    make(tmp_path / "data" / "pets.artifacts" / "choice-1", "CHOICE", disk.data, disk.scores2)
    partial = begin(tmp_path / "data" / "choice-9", "CHOICE", disk.data)
    assert not {disk.scores2.path, partial} & set(unneeded(tmp_path))
    assert disk.subset2.path in unneeded(tmp_path)
