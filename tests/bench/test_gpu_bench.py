"""``bench gpu``: each part with tiny data on a CPU, some on the stand-in for a GPU; its processes and its report."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cuda_standin import CudaStandIn
from harness import seconds

from fastkd.bench import __main__ as bench
from fastkd.bench import plan, savings, scale
from fastkd.bench.gpu import agreement, commands, parts, recipes, run, speed
from fastkd.bench.gpu.parts import PARTS, Part, record
from fastkd.bench.gpu.report import goal_text, markdown, row_line, value_text
from fastkd.bench.gpu.rows import Row, Settings
from fastkd.bench.workbench import TrainingLoop
from fastkd.engine import prefetch
from fastkd.errors import ArtifactError, InputError
from fastkd.recipe.tables import LOSSES
from fastkd.stages.training_setup import TrainingSetup


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Settings:
    """Settings of parts that share data, teacher and labels."""
    return Settings(tmp_path_factory.mktemp("gpu"), "cpu", tiny=True)


@pytest.fixture(scope="module")
def on_standin(tmp_path_factory) -> Settings:
    return Settings(tmp_path_factory.mktemp("gpu-standin"), "cuda", tiny=True)


def names(found: dict) -> list[str]:
    return [row["name"] for row in found["rows"]]


def succeed(name: str, settings: Settings) -> dict:
    """Run a part; return its record."""
    found = record(name, settings)
    assert found["status"] == "done", found
    assert found["rows"]
    assert json.loads(parts.record_file(name, settings.out).read_text()) == found
    assert all(isinstance(row["value"], int | float) for row in found["rows"])
    return found


def test_the_device_agrees_with_itself(on_cpu):
    found = succeed("agreement", on_cpu)
    assert all(row["met"] for row in found["rows"])
    assert {f"error of the loss {name} and its gradient" for name in LOSSES} < set(names(found))
    values = {row["name"]: row["value"] for row in found["rows"]}
    assert values["difference of the losses of the first 8 steps, fp32, eager"] == 0
    assert values["difference of the losses of the first 8 steps, bf16, eager"] > 0
    assert values["error of the teacher's logits in fp32, relative to the largest of their row"] == 0
    assert sum("stored rows" in name for name in values) == 2
    assert len(values) == 2 + len(LOSSES) + 2 + 2 + 2


@pytest.mark.parametrize(
    "name", ["agreement", "feeding", "teacher", "memory", pytest.param("steps", marks=pytest.mark.soak)]
)
def test_parts_run_on_the_standin(on_standin, name, card):
    succeed(name, on_standin)


def test_batches_that_change_on_their_way_are_found(on_cpu, monkeypatch):
    def wrong(batches, runtime, real=prefetch.prefetch_to_device):
        for number, batch in enumerate(real(batches, runtime)):
            yield batch._replace(labels=batch.labels + (number == 1))

    monkeypatch.setattr("fastkd.bench.gpu.agreement.prefetch_to_device", wrong)
    monkeypatch.setattr("fastkd.bench.gpu.agreement._losses", lambda settings: iter(()))
    for rest in ("_logits", "_stored_rows", "_steps"):
        monkeypatch.setattr(f"fastkd.bench.gpu.agreement.{rest}", lambda *given: iter(()))
    found = record("agreement", on_cpu)
    assert found["status"] == "failed"
    assert [row["value"] for row in found["rows"]] == [1, 1]


def test_loading_and_the_passes_of_the_teacher_are_compared_with_the_bare_rate(on_cpu):
    found = [*succeed("feeding", on_cpu)["rows"], *succeed("teacher", on_cpu)["rows"]]
    shares = [row for row in found if row["unit"] == "%"]
    assert [row["least"] for row in shares] == [0.97] * 3 + [0.95] * 6
    for row in shares:
        assert row["value"] == pytest.approx(row["facts"]["fed"]["median"] / row["facts"]["bare"]["median"], rel=0.5)
        assert row["met"] == (row["value"] >= row["least"])


def test_loaders_make_long_passes_over_little_data(on_cpu, monkeypatch):
    loaded, batches = [], TrainingSetup.batches
    monkeypatch.setattr(
        TrainingSetup, "batches", lambda self, ids, epoch: loaded.append(ids) or batches(self, ids, epoch)
    )
    with speed.workbench(recipes.load("small", on_cpu)) as bench:
        assert (len(bench.ids), bench.passes) == (160, 10)
        loop = TrainingLoop(bench.pipeline, bench.setup(bench.pipeline.runtime), passes=bench.passes)
        loop.advance(25)
        loop.close()
    (ids,) = loaded
    assert (np.bincount(ids) == 10).all()
    assert len(ids) == 1600


def test_rows_that_do_not_match_are_an_error_of_their_row(on_cpu, monkeypatch):
    def differ(recipe):
        raise ArtifactError("LABELS: 3 of 256 rows differ")

    monkeypatch.setattr(agreement, "check_recipe", differ)
    (row,) = agreement._stored_rows(recipes.load("small", on_cpu, compile=False))
    assert (row.met, row.error) == (False, "LABELS: 3 of 256 rows differ")


def test_steps_are_timed_in_all_combinations_while_there_is_time(on_cpu, monkeypatch):
    found = succeed("steps", on_cpu)
    assert len(found["rows"]) == 2 * len(speed.step_variants(on_cpu)) == 8
    assert len(set(names(found))) == 8
    assert names(found)[0] == "step, 32 px, fp32, channels_last, eager, batch of 8"
    late = Settings(on_cpu.out, "cpu", tiny=True, ends_at=time.monotonic())
    assert [(row["name"], row["value"]) for row in succeed("steps", late)["rows"]] == [
        ("combinations that there was no time for", 8)
    ]


def test_the_combinations_closest_to_the_recommended_one_come_first():
    found = speed.step_variants(Settings(Path("unused")))
    first = found[0]
    assert (first["precision"], first["channels_last"], first["step"], first["batch_size"]) == (
        "bf16", True, next(iter(speed.STEPS)), 256,
    )  # fmt: skip
    different = [sum(one[key] != first[key] for key in one) for one in found]
    assert different == sorted(different)
    assert len(found) == 3 * 2 * len(speed.STEPS) * 3


def test_a_combination_that_fails_does_not_stop_the_others(on_cpu, monkeypatch):
    real = speed.resident_step_rate

    def rate(setup, batch, steps):
        if len(batch.labels) == 16:
            raise RuntimeError("CUDA error: out of memory")
        return real(setup, batch, steps)

    monkeypatch.setattr(speed, "resident_step_rate", rate)
    found = record("steps", on_cpu)
    assert found["status"] == "failed"
    errors = [row["error"] for row in found["rows"]]
    assert sum("out of memory" in error for error in errors) == errors.count("") == 4


def test_savings_and_plan(on_cpu, monkeypatch):
    monkeypatch.setattr(plan, "SEGMENT_S", 0.01)
    monkeypatch.setattr(plan, "SCORED_ROWS", 100)
    skipped = record("plan", on_cpu)
    assert skipped["status"] == "skipped"
    assert "the parts savings and savings-large train them" in skipped["reason"]
    found = succeed("savings", on_cpu)
    told = names(found)
    for expected in (
        "each additional student, 32 px, reference implementation (extrapolated)",
        "each additional student, 32 px, vanilla KD (all data)",
        "first student, 32 px, speed-up over the reference",
        "test top-1, 32 px, ccs (keep 0.5)",
        "training, 32 px, + pruning: the recipe",
    ):
        assert expected in told
    plans = succeed("plan", on_cpu)["rows"]
    assert [row["most"] for row in plans] == [1.15] * 3
    for row in plans:
        assert row["value"] == pytest.approx(row["facts"]["predicted_s"] / row["facts"]["measured_s"])


def test_photos_are_compared_by_the_same_benchmark(on_cpu, monkeypatch):
    """The real one runs in the part `savings`."""
    seen = []
    monkeypatch.setattr(savings, "measure", lambda *given, **more: seen.append((given, more)) or {"reference": {}})
    assert record("savings-large", on_cpu)["status"] == "failed"  # the report is empty
    ((recipe, out), more) = seen[0]
    assert (recipe.name, out) == ("gpu-large", on_cpu.out / "savings-large")
    assert more == {"source": on_cpu.out / "large.yaml"}


def test_two_processes_are_timed_where_there_are_two_devices(on_cpu, monkeypatch):
    def measured(path, overrides, out, *, processes, repeats, rounds):
        rate = {"median": 100.0}
        return {"lines": [{"processes": n, "images_per_s": rate, "efficiency": 1 / n} for n in processes]}

    monkeypatch.setattr(scale, "measure", measured)
    assert succeed("processes", on_cpu)["rows"][-1]["value"] == 0.5
    with CudaStandIn():
        found = record("processes", Settings(on_cpu.out, "cuda", tiny=True))
    assert (found["status"], found["reason"]) == ("skipped", "two GPUs are needed, and this machine has 1 GPU")


def test_the_tests_of_a_clone_are_run(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "TESTS", tmp_path / "none")
    assert record("tests", on_cpu)["status"] == "skipped"
    file = tmp_path / "clone" / "tests" / commands.TINY_TESTS
    file.parent.mkdir(parents=True)
    file.write_text("import pytest\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 0\n")
    monkeypatch.setattr(commands, "TESTS", tmp_path / "clone" / "tests")
    found = record("tests", on_cpu)
    assert (found["status"], found["reason"]) == ("failed", "tests that failed")
    assert [row["value"] for row in found["rows"]] == [1, 1, 0]
    assert found["rows"][0]["facts"]["failed"][0].endswith("test_b")


# --- the command ----------------------------------------------------------------------------------------------------


def test_parts_run_in_processes(tmp_path, command, json_in):
    options = ("--device", "cpu", "--tiny", "--out", tmp_path, "--parts", "data", "--minutes", "200", "--json")
    code, text = command(bench.gpu, *options)
    assert code == 0, text
    assert "data set, 32 px: small" in text
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert json_in(text) == report
    assert report["parts"]["data"]["status"] == "done"
    assert report["gpu"] is None
    assert "| data |  |" in (tmp_path / "gpu.md").read_text()
    code, text = command(bench.gpu, "--device", "cpu", "--out", tmp_path, "--parts", "data")
    assert code == 2
    assert "has results of" in text
    code, text = command(bench.gpu, "--device", "cpu", "--tiny", "--out", tmp_path, "--parts", "dta")
    assert code == 2
    assert "--parts dta: unknown; expected some of data, agreement" in text


def test_a_machine_without_a_gpu_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cpu --tiny"):
        run.measure(tmp_path)


FAULTS = {"hangs": "time.sleep(1000)", "dies": "os.kill(os.getpid(), 11)", "works": ""}
SCRIPT = """
import json, os, sys, time
from pathlib import Path
name, options = sys.argv[1], json.loads(sys.argv[2])
out = Path(options["out"])
(out / "environment.json").write_text('{"machine": {"cpu": "A CPU", "cores": 2}, "gpu": null, "torch": "2"}')
if name == "environment":
    sys.exit()
file = out / "parts" / f"{name}.json"
file.parent.mkdir(exist_ok=True)
row = {"name": "one", "value": 1.0, "unit": "", "least": None, "most": None, "error": "", "met": None}
file.write_text(json.dumps({"status": "running", "reason": "", "seconds": 0.0, "rows": [row]}))
print("said by", name)
exec(FAULTS.get(name, ""))
file.write_text(json.dumps({"status": "done", "reason": "", "seconds": 0.1, "rows": [row]}))
"""


def test_a_part_that_hangs_or_dies_does_not_stop_the_others(tmp_path, monkeypatch, capfd, traces):
    """In place of each part, a process that writes one row and then does what its name says."""
    script, started = tmp_path / "script.py", run.subprocess.Popen
    script.write_text(f"FAULTS = {FAULTS!r}\n{SCRIPT}")
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda words, **more: started([sys.executable, str(script), *words[3:]], **more)
    )
    budget = seconds(3)
    monkeypatch.setattr(run, "PARTS", {name: Part(lambda settings: iter(()), budget) for name in FAULTS})
    out = tmp_path / "out"
    report = run.measure(out, device="cpu", tiny=True)
    assert report["failed"] == ["hangs", "dies"]
    reasons = {name: found["reason"] for name, found in report["parts"].items()}
    assert "it took more than" in reasons["hangs"]
    assert reasons["dies"].startswith("was killed by SIGSEGV")
    assert reasons["works"] == ""
    assert all([row["value"] for row in found["rows"]] == [1.0] for found in report["parts"].values())
    assert (out / "logs" / "dies.log").read_text() == "said by dies\n"
    assert capfd.readouterr().out.count("one: 1") == 3
    assert traces.gone()
    again = run.measure(out, device="cpu", tiny=True, parts=["works"])
    assert again["failed"] == ["hangs", "dies"]  # of all parts so far
    assert "works: reused" in capfd.readouterr().out
    run.measure(out, device="cpu", tiny=True, parts=["works"], fresh=True)
    assert "reused" not in capfd.readouterr().out


def test_rows_as_text():
    rate = Row("a step", 12345.6, "images/s")
    share = Row("a share", 0.9712, "%", least=0.97)
    ratio = Row("a ratio", 1.2, "×", 0.85, 1.15)
    broken = Row("a step", None, "images/s", error="out of memory")
    assert [one.met for one in (rate, share, ratio, broken)] == [None, True, False, False]
    lines = [row_line(one.as_json()) for one in (rate, share, ratio, broken)]
    assert lines == [
        "a step: 12,346 images/s",
        "a share: 97.1 % (goal: ≥ 97.0 %: met)",
        "a ratio: 1.2× (goal: 0.85× … 1.15×: not met)",
        "a step: –: error: out of memory",
    ]
    assert value_text(0.00123, "") == "0.00123"
    assert goal_text(Row("different", 0, most=0).as_json()) == "≤ 0"
    part = {"reason": "", "seconds": 3.0, "status": "done", "rows": [share.as_json()]}
    machine = {"cpu": "A CPU", "cores": 2}
    text = markdown(
        {"machine": machine, "gpu": "A GPU", "torch": "2", "cuda": "13", "tiny": False, "parts": {"p": part}}
    )
    assert text.startswith("A CPU, 2 cores, A GPU; torch 2, CUDA 13\n")
    assert "|  | a share | 97.1 % | ≥ 97.0 % | met |" in text


def test_budgets_add_up_to_the_default_time():
    assert sum(part.budget_s for name, part in PARTS.items() if name != "processes") == 60 * run.MINUTES


def test_recipes_are_those_of_the_titles(tmp_path, monkeypatch):
    """Not tiny, without their data."""
    monkeypatch.setattr(recipes, "small_data", lambda settings: type("Data", (), {"path": tmp_path}))
    monkeypatch.setattr(recipes, "large_data", lambda settings, raw: type("Data", (), {"path": tmp_path}))
    small, large = (recipes.load(name, Settings(tmp_path)) for name in (recipes.SMALL, recipes.LARGE))
    assert (small.data.input_px, large.data.input_px) == (32, 160)
    assert (small.student.model, large.student.model) == ("cifar/resnet8x4", "torchvision/resnet18")
    assert small.train.compile
    assert (small.num_views, large.num_views) == (4, 2)
