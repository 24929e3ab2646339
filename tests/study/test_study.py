"""A whole study: shared by processes, interrupted, resumed, and its results."""

import csv
import json
import signal
import time

import pytest
from harness import seconds, start_study

from fastkd import artifacts, machine
from fastkd.errors import ArtifactError
from fastkd.study import __main__ as study_command
from fastkd.study import worker
from fastkd.study.grid import Study, grid_of
from fastkd.study.results import TIMES, collect


@pytest.fixture
def study(tiny_recipe, tmp_path):
    """Return the arguments of a study of 8 students with one epoch each."""
    return [
        tiny_recipe.path,
        *("train.epochs=2", "--vary", "prune.method=medium", "--seeds", "2", "--out", tmp_path / "study"),
    ]


def test_a_study_from_the_command_to_its_page(study, command, json_in, tmp_path):
    code, text = command(study_command.main, *study, "--dry-run", "--json")
    assert code == 0
    planned = json_in(text)
    assert (planned["students"], planned["finished"]) == (8, 0)
    assert planned["cells"] == {"keep 0.5, 2 epochs": ["medium", "random", "all data, 1 epoch", "full KD"]}
    assert not (tmp_path / "study").exists()

    code, text = command(study_command.main, *study)
    assert code == 0
    assert "[8/8]" in text
    assert "medium has the highest top-1 on the hold-out; on val, over 2 seeds, it is" in text
    folder = tmp_path / "study"
    report = json.loads((folder / "study.json").read_bytes())
    (cell,) = report["cells"]
    assert cell["chosen"] == "medium"
    assert set(cell["val"]) == {"medium", "random", "all data, 1 epoch", "full KD"}
    assert set(cell["differences"]) == {"random", "same_steps", "full"}
    assert report["finished"] == report["students"] == 8
    for arm in cell["arms"]:
        runs = [artifacts.load(tmp_path.joinpath(path), "RUN") for path in arm["runs"].values()]
        assert arm["holdout"]["values"] == [run.facts["top1"]["holdout"] for run in runs]
        assert arm["further_student_s"] > 0
    page = (folder / "study.html").read_text()
    assert "medium has the highest top-1" in page
    assert page.count("<svg") == 3
    assert {"differences.png", "accuracy-first-student.png"} <= {p.name for p in folder.iterdir()}
    rows = list(csv.DictReader((folder / "study.csv").open()))
    assert len(rows) == 8
    for row in rows:
        timing = json.loads((tmp_path.joinpath(row["run"]) / "timing.json").read_bytes())
        assert {name: float(row[name]) for name in TIMES} == {name: timing[name] for name in TIMES}
    assert {row["arm"] for row in rows if row["chosen"] == "True"} == {"medium"}

    before = {p: p.stat().st_mtime_ns for p in (folder / "students").rglob("*.safetensors")}
    code, text = command(study_command.main, *study)
    assert code == 0
    assert "8 finished, 0 to train" in text
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "students").rglob("*.safetensors")}


def test_val_takes_no_part_in_the_choice(tiny_recipe, tmp_path, monkeypatch):
    loads = iter([999.0, 0.0, 0.0])
    monkeypatch.setattr(machine, "_load_average", lambda: next(loads))
    study = Study(
        recipe=str(tiny_recipe.path),
        overrides=["train.epochs=1"],
        vary={"prune.method": ["medium", "hard"]},
        seeds=1,
        baselines=["random"],
    )
    grid = grid_of(study, tmp_path / "students")
    assert not worker.train_all(grid, worker.Costs(), verbose=False)
    report = collect(grid, {})
    assert report["machines"][0].endswith("; busy when 1 of 3 students started: times are too long")
    (cell,) = report["cells"]
    others = {arm["title"] for arm in cell["arms"]} - {cell["chosen"], "random"}
    assert len(others) == 1
    assert others.isdisjoint(cell["val"])
    assert cell["conclusion"].endswith("one seed does not allow a comparison.")


def test_a_student_that_fails_is_reported_and_the_others_are_trained(study, command, tmp_path, monkeypatch):
    trained = worker.pipeline.train

    def fail_random(recipe, **options):
        if recipe.prune.method == "random":
            raise ArtifactError("broken here")
        return trained(recipe, **options)

    monkeypatch.setattr(worker.pipeline, "train", fail_random)
    code, text = command(study_command.main, *study)
    assert code == 1
    assert "2 of 8 students failed or are damaged" in text
    report = json.loads((tmp_path / "study" / "study.json").read_bytes())
    assert report["finished"] == 6
    assert all("broken here" in reason for reason in report["failed"].values())
    (cell,) = report["cells"]
    assert set(cell["differences"]) == {"same_steps", "full"}


def test_a_damaged_student_is_reported_and_the_others_count(study, command, tmp_path):
    quick = [*study, "train.epochs=1", "--baselines", "random"]
    assert command(study_command.main, *quick)[0] == 0
    weights = sorted((tmp_path / "study" / "students").glob("*/student.safetensors"))[0]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert command(study_command.main, *quick)[0] == 1
    report = json.loads((tmp_path / "study" / "study.json").read_bytes())
    assert report["finished"] == report["students"] - 1 == 3
    (reason,) = report["failed"].values()
    assert str(weights.parent) in reason


def test_a_study_of_other_images_is_refused_before_it_trains(study, command, tmp_path, reseal):
    quick = [*study, "train.epochs=1", "--seeds", "1", "--baselines", "none"]
    assert command(study_command.main, *quick)[0] == 0
    (run,) = (path.parent for path in (tmp_path / "study" / "students").glob("*/student.safetensors"))
    inputs = json.loads((run / artifacts.MANIFEST).read_bytes())["inputs"]
    reseal(run, inputs=inputs | {"data": "0" * 32})
    code, text = command(study_command.main, *quick)
    assert code == 2
    assert "was trained on other images" in text


@pytest.mark.parametrize("option", ["prune.method", "=1", "prune.method=[", "seed=1,2", "prune.methd=a"])
def test_a_wrong_option_is_one_clear_error(study, command, option):
    code, text = command(study_command.main, *study, "--vary", option)
    assert code == 2
    assert "error: " in text
    assert "Traceback" not in text


def test_claims_are_exclusive_and_do_not_wait(tmp_path):
    path = tmp_path / "students" / "one"
    assert not artifacts.is_claimed(path)
    with artifacts.claim(path) as mine:
        assert mine
        assert artifacts.is_claimed(path)
        with artifacts.claim(path) as second:
            assert not second
    assert not artifacts.is_claimed(path)


def test_time_left_is_predicted_from_finished_students(tiny_recipe, tmp_path):
    study = Study(recipe=str(tiny_recipe.path), vary={"train.epochs": [2, 6]}, seeds=1, baselines=["full"])
    grid = grid_of(study, tmp_path)
    costs = worker.Costs()
    assert costs.left_s(grid.students, grid.base) is None
    short = next(one for one in grid.students if worker._epochs(one.recipe) == 1)
    costs.seconds[short.path] = 10.0
    # left: 2 epochs of all data, half of 6 epochs, and 6 epochs
    assert costs.left_s(grid.students, grid.base) == pytest.approx(10.0 * (2 + 3 + 6))
    assert "which takes about 110.0 s in one process, without scoring and labelling" in worker.overview(grid, costs)


# --- several processes ------------------------------------------------------------------------------------------------


def wait_for(condition, within_s):
    end = time.monotonic() + seconds(within_s)
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


@pytest.mark.soak  # one process that is killed is in test_processes.py
def test_processes_share_a_study_and_take_over_from_the_dead(study, tmp_path):
    students = tmp_path / "study" / "students"
    workers = [start_study(study) for _ in range(4)]
    wait_for(lambda: len(list(students.glob("*.fastkd-partial"))) > 1, 120)
    assert [one.poll() for one in workers] == [None] * 4
    for one in workers[:2]:
        one.kill()
    workers.append(start_study(study))  # a late joiner
    texts = [one.communicate(timeout=seconds(280))[0] for one in workers]
    assert [one.returncode for one in workers] == [-signal.SIGKILL] * 2 + [0] * 3, texts
    report = json.loads((tmp_path / "study" / "study.json").read_bytes())
    assert report["finished"] == report["students"] == 8
    assert not report["failed"]
    trained = sum(text.count("on the hold-out after") for text in texts)
    assert trained <= 8  # each student once; the killed processes may have finished some without telling
    assert len(list(students.glob("*/student.safetensors"))) == 8
    assert not [p for p in (tmp_path / "study").iterdir() if p.name.startswith(".study")]
