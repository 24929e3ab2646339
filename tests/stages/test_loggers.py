"""Loggers get the numbers of metrics.jsonl, resume their run, and never stop a training."""

import contextlib
import importlib.util
import json
import struct
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hosts import wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastkd import artifacts, console, pipeline, recipe
from fastkd.errors import InputError, require
from fastkd.pipeline import Pipeline
from fastkd.recipe.tables import LOGGERS
from fastkd.stages import loggers
from fastkd.stages.run_log import History, Stopwatch
from fastkd.stages.training import run_key_fields

ROOT = Path(__file__).parents[2]
CONFIG = {"name": "tiny", "optim": {"lr": 0.1, "betas": [0.9, 0.99]}}
SERVICES = ["wandb", "mlflow", "trackio"]


class Killed(BaseException):
    """Ends a training as a signal does."""


class FakeService:
    """Stands in for the packages of all three services, and keeps what they are sent.

    Attributes
    ----------
    entries
        (step, name, value) of each run, by its identifier.
    runs
        What each run was started or resumed with, in order.
    fault
        Raised by the call of this name: "init", "log" or "close".
    """

    def __init__(self) -> None:
        self.entries: dict[str, list[tuple[int, str, float]]] = {}
        self.runs: list[dict] = []
        self.status: dict[str, object] = {}
        self.fault: tuple[str, BaseException] | None = None

    def fail_in(self, call: str) -> None:
        if self.fault and self.fault[0] == call:
            raise self.fault[1]

    def add(self, run_id: str, numbers: dict[str, float], step: int) -> None:
        self.fail_in("log")
        self.entries[run_id] += [(step, name, value) for name, value in numbers.items()]

    def end(self, run_id: str, status: object) -> None:
        self.fail_in("close")
        self.status[run_id] = status

    def start(self, run_id: str, **given: object) -> None:
        self.fail_in("init")
        self.entries.setdefault(run_id, [])
        self.runs.append({"id": run_id, **given})

    def wandb(self) -> dict[str, object]:
        def init(*, id, **given):
            self.start(id, **given)
            steps = [step for step, _, _ in self.entries[id]]
            return SimpleNamespace(
                step=max(steps, default=-1) + 1,
                log=lambda numbers, step: self.add(id, numbers, step),
                summary=SimpleNamespace(update=lambda numbers: self.add(id, numbers, -1)),
                finish=lambda exit_code: self.end(id, exit_code),
            )

        return {"init": init, "Settings": dict}

    def mlflow(self) -> dict[str, object]:
        def create_run(experiment, run_name):
            run_id = f"m{len(self.entries)}"
            self.start(run_id, project=experiment, name=run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

        def log_batch(run_id, metrics=(), params=()):
            self.runs[-1].setdefault("config", {}).update(params)
            for name, value, _, step in metrics:
                self.add(run_id, {name: value}, step)

        client = SimpleNamespace(
            create_run=create_run,
            log_batch=log_batch,
            update_run=lambda run_id, status: self.start(run_id, status=status),
            set_terminated=self.end,
        )
        return {"MlflowClient": lambda: client, "set_experiment": lambda name: SimpleNamespace(experiment_id=name)}

    def trackio(self) -> dict[str, object]:
        def init(project, name, **given):
            print("trackio prints to stdout")
            self.start(name, project=project, name=name, **given)
            return SimpleNamespace(
                log=lambda numbers, step: self.add(name, numbers, step), finish=lambda: self.end(name, None)
            )

        return {"init": init}


@pytest.fixture
def service(monkeypatch):
    """The three packages, replaced by one `FakeService`."""
    fake = FakeService()
    contents = {"wandb": fake.wandb(), "mlflow": fake.mlflow(), "trackio": fake.trackio()}
    contents["mlflow.entities"] = {"Metric": lambda *fields: fields, "Param": lambda *fields: fields}
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="a test")
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return fake


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def interrupted_and_resumed(folder: Path, name: str) -> None:
    """Log steps 1 to 3, be killed with a checkpoint of step 2, resume, and log steps 3 and 4 and an evaluation."""
    with contextlib.suppress(Killed), History(folder, "key", Stopwatch(), loggers=[name], config=CONFIG) as first:
        for step in (1, 2):
            first.epoch.steps = step
            first.write("steps", epoch=0, step=step, loss=float(step))
        state = first.state()
        first.write("steps", epoch=0, step=3, loss=3.0)
        raise Killed
    with History(folder, "key", Stopwatch(), state, loggers=[name], config=CONFIG) as second:
        for step in (3, 4):
            second.write("steps", epoch=0, step=step, loss=float(step))
        second.write("evaluate", epoch=0, split="val", top1=0.5, images=60)


LOSSES = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


# TensorBoard ----------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_numbers_of_metrics_jsonl_and_no_key_changes(tiny_recipe):
    """Its folder is a part of the RUN, whole when that is published."""
    loaded = tiny_recipe("log.to=[tensorboard]", "train.epochs=2")
    run, _ = pipeline.train(loaded)
    lines = [json.loads(line) for line in run.file("metrics.jsonl").read_text().splitlines()]
    found = scalars(run.path / "tensorboard")
    for name in ("loss", "lr", "data_wait_share"):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if line["event"] == "steps"]
        assert found[f"steps/{name}"] == expected
    assert len(found["steps/loss"]) == 6
    rates = [line["images_per_s"] for line in lines if line["event"] == "epoch"]
    assert found["epoch/images_per_s"] == [(3, pytest.approx(rates[0])), (6, pytest.approx(rates[1]))]
    assert found["evaluate/val/top1"] == [(6, pytest.approx(run.facts["top1"]["val"]))]
    assert any(name.startswith("tensorboard/") for name in run.manifest.files)
    assert run_key_fields(Pipeline(loaded).training_inputs) == run_key_fields(
        Pipeline(tiny_recipe("train.epochs=2")).training_inputs
    )


def test_what_was_lost_since_the_checkpoint_is_taken_back(tmp_path):
    """A run that goes on shows each step once, with what it came to in the end."""
    with History(tmp_path, "key", Stopwatch(), loggers=["tensorboard"]) as first:
        for step in (1, 2):
            first.epoch.steps = step
            first.write("steps", epoch=0, step=step, loss=float(step))
        state = first.state()
        first.write("steps", epoch=0, step=3, loss=99.0)
    with History(tmp_path, "key", Stopwatch(), state, loggers=["tensorboard"]) as second:
        second.write("steps", epoch=0, step=3, loss=3.0)
    assert scalars(tmp_path / "tensorboard")["steps/loss"] == LOSSES[:3]
    with History(tmp_path, "key", Stopwatch(), loggers=["tensorboard"]):
        pass
    assert scalars(tmp_path / "tensorboard") == {}


# The recipe -----------------------------------------------------------------------------------------------------------


def test_the_old_key_still_works_and_the_warning_names_the_new_one(tiny_recipe):
    run, _ = pipeline.train(tiny_recipe("log.tensorboard=true"))
    assert scalars(run.path / "tensorboard")
    told = "recipe: log.tensorboard is deprecated; use log.to: [tensorboard]"
    assert [text for text in run.facts[artifacts.WARNINGS] if "deprecated" in text] == [told]
    assert tiny_recipe("log.tensorboard=true", "log.to=[tensorboard]").log.loggers == ("tensorboard",)


def test_the_recipe_names_loggers_in_a_list(tiny_recipe):
    assert tiny_recipe("log.to=[mlflow, wandb, mlflow]").log.loggers == ("mlflow", "wandb")
    with pytest.raises(InputError, match=r"log\.to\.0: 'wanb' is wrong: .*'tensorboard', 'wandb', 'mlflow' or 'tra"):
        tiny_recipe("log.to=[wanb]")
    with pytest.raises(InputError, match=r"log\.to: 'wandb' is wrong: expected a list, in brackets"):
        tiny_recipe("log.to=wandb")


def test_each_logger_has_a_class_and_is_an_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, class_name in LOGGERS.items():
        assert issubclass(getattr(loggers, class_name), loggers.Logger)
        assert [one.partition(">")[0] for one in extras[name]] == [name]
    assert recipe.Log.model_json_schema()["properties"]["to"]["items"]["enum"] == list(LOGGERS)


def test_a_missing_package_is_told_before_anything_is_built(tiny_recipe, tmp_path, monkeypatch):
    """With the command that gets it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(InputError, match=r"log\.to needs tensorboard, not installed: pip install tensorboard$"):
        pipeline.train(tiny_recipe("log.to=[tensorboard]"))
    assert not (tmp_path / "artifacts").exists()


def test_a_folder_of_the_same_name_is_no_package(tmp_path, monkeypatch):
    """wandb writes its runs to ./wandb, and the working directory is on the path."""
    (tmp_path / "some_logger").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="needs some_logger, not installed"):
        require("log.to", "some_logger")
    (tmp_path / "some_logger" / "__init__.py").touch()
    importlib.invalidate_caches()
    require("log.to", "some_logger")


# What each service is sent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_a_resumed_training_continues_in_the_same_run_at_the_right_step(name, service, tmp_path, capsys):
    """Each step is there once, although step 3 was trained twice."""
    folder = tmp_path / f"tiny-0123{artifacts.PARTIAL}"
    folder.mkdir()
    interrupted_and_resumed(folder, name)
    (run_id,) = service.entries
    assert json.loads((folder / "loggers.json").read_text()) == {name: run_id}
    assert service.entries[run_id] == [
        *((step, "steps/loss", loss) for step, loss in LOSSES),
        (4, "evaluate/val/top1", 0.5),
        (4, "evaluate/val/images", 60.0),
    ]
    first, again = service.runs
    assert (first["project"], first["name"]) == ("fastkd", "tiny-0123")
    expected = {"name": "tiny", "optim.lr": "0.1", "optim.betas": "[0.9, 0.99]"} if name == "mlflow" else CONFIG
    assert first["config"] == expected
    if name != "mlflow":
        assert (first["resume"], again["resume"]) == {"wandb": ("allow",) * 2, "trackio": ("never", "allow")}[name]
    assert service.status == {run_id: {"wandb": 0, "mlflow": "FINISHED", "trackio": None}[name]}
    assert capsys.readouterr().out == ""


def test_an_interrupted_run_is_marked_so(service, tmp_path):
    for name, status in {"wandb": 1, "mlflow": "KILLED"}.items():
        with contextlib.suppress(Killed), History(tmp_path, "key", Stopwatch(), loggers=[name]):
            raise Killed
        run_id = json.loads((tmp_path / "loggers.json").read_text())[name]
        assert service.status[run_id] == status


def test_wandb_gets_what_it_no_longer_accepts_as_a_summary(service, tmp_path):
    """A training that was killed in its last evaluation: wandb's history is at a later step."""
    with History(tmp_path, "key", Stopwatch(), loggers=["wandb"]) as history:
        history.epoch.steps = 1
        history.write("steps", epoch=0, step=1, loss=1.0)
        state = history.state()
    with History(tmp_path, "key", Stopwatch(), state, loggers=["wandb"]) as history:
        history.write("evaluate", epoch=0, split="val", top1=0.5)
    assert list(service.entries.values()) == [[(1, "steps/loss", 1.0), (-1, "evaluate/val/top1", 0.5)]]


@pytest.mark.parametrize("damage", ["{", "[]", '{"wandb": 3}', None])
def test_a_lost_identifier_starts_a_new_run(damage, service, tmp_path):
    with History(tmp_path, "key", Stopwatch(), loggers=["wandb"]) as history:
        history.epoch.steps = 1
        history.write("steps", epoch=0, step=1, loss=1.0)
        state = history.state()
    (tmp_path / "loggers.json").unlink() if damage is None else (tmp_path / "loggers.json").write_text(damage)
    with History(tmp_path, "key", Stopwatch(), state, loggers=["wandb"]) as history:
        history.write("steps", epoch=0, step=2, loss=2.0)
    assert [entries[0][0] for entries in service.entries.values()] == [1, 2]


def test_damaged_lines_of_metrics_jsonl_are_no_hindrance(service, tmp_path):
    with History(tmp_path, "key", Stopwatch(), loggers=["wandb"]) as history:
        history.epoch.steps = 1
        history.write("steps", epoch=0, step=1, loss=1.0)
        state = history.state()
        history.write("steps", epoch=0, step=2, loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('[]\n{"event": [{}]}\n{"event": "ste')
    with History(tmp_path, "key", Stopwatch(), state, loggers=["wandb"]) as history:
        for step in (2, 3):
            history.write("steps", epoch=0, step=step, loss=float(step))
    (entries,) = service.entries.values()
    assert entries == [(step, "steps/loss", loss) for step, loss in LOSSES[:3]]


def test_only_the_process_that_writes_has_loggers(service, tmp_path):
    with History(tmp_path, "key", Stopwatch(), loggers=SERVICES, writes=False) as history:
        history.write("steps", epoch=0, step=1, loss=1.0)
        history.state()
    assert service.runs == []
    assert list(tmp_path.iterdir()) == []


def test_a_killed_training_goes_on_in_its_run(service, tiny_recipe):
    """The command as it is given, killed at its fourth step: checkpoints are written at each."""
    loaded = tiny_recipe("log.to=[wandb]", "log.every_steps=1", "train.epochs=2", "train.checkpoint_every_s=0")
    add = service.add

    def killed_at_four(run_id, numbers, step):
        add(run_id, numbers, step)
        if step == 4 and len(service.runs) == 1:
            raise Killed

    service.add = killed_at_four
    with pytest.raises(Killed):
        pipeline.train(loaded)
    run, _ = pipeline.train(loaded)
    ((run_id, entries),) = service.entries.items()
    assert [given["id"] for given in service.runs] == [run_id, run_id]
    assert [step for step, name, _ in entries if name == "steps/loss"] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in run.file("metrics.jsonl").read_text().splitlines()]
    assert [value for _, name, value in entries if name == "steps/loss"] == pytest.approx(
        [line["loss"] for line in lines if line["event"] == "steps"]
    )
    assert json.loads(run.file("loggers.json").read_text()) == {"wandb": run_id}
    assert service.runs[0]["config"]["optim"] == loaded.model_dump(mode="json")["optim"]


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), SystemExit(1)], ids=["error", "exit"])
@pytest.mark.parametrize("call", ["init", "log", "close"])
@pytest.mark.parametrize("name", SERVICES)
def test_a_logger_that_fails_is_dropped_with_one_warning(name, call, error, service, tmp_path):
    """The others go on."""
    service.fault = call, error
    with History(tmp_path, "key", Stopwatch(), loggers=[name, "tensorboard"], config=CONFIG) as history:
        for step, loss in LOSSES:
            history.write("steps", epoch=0, step=step, loss=loss)
        history.state()
    (told,) = console.warnings_since(0)
    at = {"init": 0, "log": 1, "close": 4}[call]
    text = "ConnectionError: no route" if isinstance(error, ConnectionError) else "SystemExit: 1"
    assert told == f"log.to: {name} failed at step {at} and is not used any more ({text})"
    assert scalars(tmp_path / "tensorboard")["steps/loss"] == LOSSES
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(LOSSES)


def test_a_training_whose_logger_fails_is_completed(service, tiny_recipe):
    service.fault = "log", ConnectionError("no route")
    run, _ = pipeline.train(tiny_recipe("log.to=[mlflow]"))
    assert run.file("student.safetensors").exists()
    assert [text for text in run.facts[artifacts.WARNINGS] if "mlflow" in text] == [
        "log.to: mlflow failed at step 1 and is not used any more (ConnectionError: no route)"
    ]


# The services themselves, where they are installed --------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Services that store their runs in a folder of the test."""
    settings = {
        **{"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"},
        **{"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"},
        **{"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},
    }
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / f"tiny-0123{artifacts.PARTIAL}"
    folder.mkdir()
    return folder


def id_of(folder: Path, name: str) -> str:
    assert console.warnings_since(0) == []
    return json.loads((folder / "loggers.json").read_text())[name]


def wandb_history(file: Path) -> list[tuple[int, dict[str, float]]]:
    """Return step and numbers of each entry of an offline run: LevelDB's log format after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, entries = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                numbers = {name: float(value) for name, value in items.items() if not name.startswith("_")}
                entries.append((record.history.step.num, numbers))
    return entries


def test_wandb_offline(offline):
    """Two folders of one run, in which each step is there once."""
    pytest.importorskip("wandb", exc_type=ImportError)
    interrupted_and_resumed(offline, "wandb")
    files = sorted(offline.parent.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert {file.name for file in files} == {f"run-{id_of(offline, 'wandb')}.wandb"}
    wait_until(lambda: all(map(wandb_history, files)), 60)  # wandb's process writes, also after `finish` has returned
    first, second = map(wandb_history, files)
    assert first == [(step, {"steps/loss": loss}) for step, loss in LOSSES[:3]]
    assert second == [(4, {"steps/loss": 4.0, "evaluate/val/top1": 0.5, "evaluate/val/images": 60.0})]


def test_mlflow_in_a_local_database(offline):
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    interrupted_and_resumed(offline, "mlflow")
    client, run_id = mlflow.MlflowClient(), id_of(offline, "mlflow")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "steps/loss")] == LOSSES
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("tiny-0123", "FINISHED")
    assert run.data.metrics["evaluate/val/top1"] == 0.5
    assert run.data.params == {"name": "tiny", "optim.lr": "0.1", "optim.betas": "[0.9, 0.99]"}


def test_trackio_in_a_local_database(offline):
    pytest.importorskip("trackio", exc_type=ImportError)
    import sqlite3

    interrupted_and_resumed(offline, "trackio")
    database = sqlite3.connect(offline.parent / "trackio" / "fastkd.db")
    rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    database.close()
    assert {name for name, *_ in rows} == {id_of(offline, "trackio")} == {"tiny-0123"}
    assert len({run_id for _, run_id, *_ in rows}) == 1
    numbers = [(step, json.loads(metrics)) for *_, step, metrics in rows]
    assert [(step, one["steps/loss"]) for step, one in numbers if "steps/loss" in one] == LOSSES
    assert numbers[-1] == (4, {"evaluate/val/top1": 0.5, "evaluate/val/images": 60.0})
