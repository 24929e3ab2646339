"""train: the student, from whatever the chain provides → RUN."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastkd import artifacts, console, doctor, models
from fastkd import recipe as recipes
from fastkd.artifacts import Artifact, Built
from fastkd.data.loader import BATCHES_AHEAD, Batch, Loader
from fastkd.data.order import epoch_order
from fastkd.data.stored import StoredRows
from fastkd.engine.average import MovingAverage
from fastkd.engine.dynamic import RunningLosses
from fastkd.engine.feed import feed
from fastkd.engine.loop import LiveTeacher, Objective, ReadFn, TrainState, evaluate, train_epoch, warm_up
from fastkd.engine.losses import LossFn, kd_loss, reshape_logits, stored_logits, supervised_loss
from fastkd.engine.schedule import learning_rates
from fastkd.kernels import mix64
from fastkd.stages import labelling

if TYPE_CHECKING:
    from fastkd.stages.chain import Chain

EVAL_BATCH_SIZE = 256
MEASURED_BATCHES, MEASURED_S = 64, 0.5
LOADER_LIMITS = 0.1  # share of the time waited for data from which on a person should hear of it
LOADER_AHEAD = 1.5  # how much faster than the step the loader should be
VERSIONS = ("fastkd", "torch", "torchvision", "ffcv", "numba", "numpy", "timm")


def build_run(chain: "Chain", *, out: Path | None = None, source: Path | None = None) -> tuple[Artifact, bool]:
    """Train the student of a chain, or find its RUN.

    Parameters
    ----------
    out
        Where the RUN goes; default: under `train.runs_dir`, by name and key.
    source
        The recipe file, kept in the RUN as it was given.
    """
    recipe = chain.recipe
    inputs = run_inputs(chain)
    path = out or Path(recipe.train.runs_dir) / f"{recipe.name}-{artifacts.key_of('RUN', inputs)[:8]}"
    if not chain.build and not path.exists():
        raise chain.missing("RUN", path)
    parents = {"DATASET": chain.dataset.key}
    if uses_subset(chain):
        parents["SUBSET"] = chain.subset.key
    if uses_labels(recipe):
        parents["LABELS"] = chain.labels.key
    return artifacts.build(
        path,
        "RUN",
        inputs,
        lambda directory: _train(chain, directory, source),
        parents=parents,
        settings={"precision": chain.runtime.precision, "device": chain.runtime.device.type},
        force="train" in chain.force,
    )


def uses_subset(chain: "Chain") -> bool:
    """Tell whether a recipe needs the teacher's scores: not for plain KD on all data with a live teacher."""
    recipe = chain.recipe
    needed = recipe.labels.mode == "stored" or recipe.labels.reshape or recipe.prune.keep_ratio < 1
    return recipe.teacher is not None and (needed or chain.export is not None)


def uses_labels(recipe: recipes.Recipe) -> bool:
    """Tell whether a recipe reads stored logits of numbered views."""
    return recipe.teacher is not None and recipe.labels.mode == "stored" and recipe.num_views is not None


def run_inputs(chain: "Chain") -> dict[str, Any]:
    """Return what determines the student, building whatever comes before it.

    Precision, device and versions are recorded, not keyed.
    """
    recipe = chain.recipe
    inputs: dict[str, Any] = {
        "data": chain.dataset.key,
        "holdout_ratio": recipe.data.holdout_ratio,
        "view": chain.view_inputs(recipe.data.input_px, varied=recipe.num_views is not None),
        "views": recipe.num_views,
        "student": {"model": recipe.student.model, "weights": _student_weights(recipe)},
        "optim": recipe.optim.model_dump(mode="json"),
        "epochs": recipe.train.epochs,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.seed,
        **_unusual(recipe.train),
    }
    if recipe.teacher is not None:
        inputs |= {
            "teacher": chain.teacher_inputs,
            "loss": recipe.loss.model_dump(mode="json"),
            "labels": recipe.labels.model_dump(mode="json", include={"mode", "reshape", "topk"}),
        }
    if uses_subset(chain):
        inputs["subset"] = chain.subset.key
    if recipe.prune.dynamic:
        inputs["prune"] = recipe.prune.deciding()
    if uses_labels(recipe):
        inputs["labels"]["key"] = chain.labels.key
    return inputs


def _unusual(train: recipes.Train) -> dict[str, Any]:
    """Return settings of the loop that bear on the student and are seldom used: where they are, alone."""
    settings = {"accumulate": train.accumulate, "ema_decay": train.ema_decay}
    usual = recipes.Train(epochs=1, batch_size=1)
    unusual: dict[str, Any] = {name: value for name, value in settings.items() if value != getattr(usual, name)}
    if train.progressive_px:
        unusual["progressive_px"] = sorted(train.progressive_px.items())
    return unusual


def _student_weights(recipe: recipes.Recipe) -> str | None:
    """Return what identifies the weights that a student starts from: a file's digest, a RUN's key, or their name."""
    weights = recipe.student.weights
    if weights is None:
        return None
    path = Path(weights)
    if path.is_file():
        return artifacts.file_digest(path)
    return artifacts.load(path, "RUN").key if path.is_dir() else weights


class Stopwatch:
    """Wall seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Charge the time inside to `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


class Journal:
    """metrics.jsonl: one JSON object a line, written as it happens."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", buffering=1)

    def write(self, event: str, **values: Any) -> None:
        """Append an event."""
        self._stream.write(json.dumps({"event": event, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _train(chain: "Chain", directory: Path, source: Path | None) -> Built:
    """Train, evaluate once, and write everything that a RUN holds."""
    recipe, runtime = chain.recipe, chain.runtime
    console.heading(f"train: {recipe.name}: {recipe.student.model} on {runtime.device} in {runtime.precision}")
    if source is not None:
        shutil.copyfile(recipes.locate(source), directory / "recipe.yaml")
    (directory / "resolved.yaml").write_text(recipes.dump(recipe))
    _write_json(directory / "env.json", environment(chain))
    journal = Journal(directory / "metrics.jsonl")
    watch = chain.watch

    job = prepare(chain)
    epochs: list[dict[str, float]] = []
    images, first = job.images_per_epoch, 0
    with console.progress("train", recipe.train.epochs * images) as update:
        for epoch in range(recipe.train.epochs):
            with watch.on("train"):
                ids = job.epoch_ids(epoch)
                lr_S = learning_rates(recipe.optim, recipe.train.epochs, epoch, job.loader.full_batches(len(ids)))

            def on_log(
                step: int, loss: float, wait: float, first: int = first, epoch: int = epoch, lr_S: np.ndarray = lr_S
            ) -> None:
                journal.write(
                    "steps", epoch=epoch, step=first + step, loss=loss, lr=lr_S[step - 1], data_wait_share=wait
                )
                done = round((epoch + step / len(lr_S)) * images)
                update(done, f"epoch {epoch + 1}, loss {loss:.3f}, data wait {wait:.1%}")

            with watch.on("train"):
                result = train_epoch(
                    job.state,
                    job.batches(ids, epoch),
                    job.teacher.live,
                    lr_S,
                    log_every_steps=recipe.log.every_steps,
                    on_log=on_log,
                    running=job.running,
                )
            first += len(lr_S)
            summary = {
                "loss": result.loss,
                "images": result.images,
                "wall_s": result.wall_s,
                "data_wait_s": result.data_wait_s,
                "images_per_s": result.images_per_s,
            }
            epochs.append(summary)
            journal.write("epoch", epoch=epoch, **summary)
            every = recipe.train.eval_every_epochs
            look = every and (epoch + 1) % every == 0 and epoch + 1 < recipe.train.epochs
            if look and len(chain.holdout_ids):
                with watch.on("evaluate"):
                    _look(chain, job.result, journal, "train", chain.holdout_ids, "holdout", epoch)
    accuracy = {}
    with watch.on("evaluate"):
        if len(chain.holdout_ids):
            accuracy["holdout"] = _look(chain, job.result, journal, "train", chain.holdout_ids, "holdout", epoch)
        val_ids = np.arange(chain.dataset.facts["counts"]["val"])
        accuracy["val"] = _look(chain, job.result, journal, "val", val_ids, "val", epoch)
    journal.close()

    _save_student(chain, job, directory)
    timing = _timing(chain, epochs)
    _write_json(directory / "timing.json", timing)
    facts = {"model": recipe.student.model, "top1": accuracy, "images_per_s": timing["images_per_s"]}
    if recipe.prune.dynamic:
        facts["trained_share"] = sum(e["images"] for e in epochs) / (recipe.train.epochs * images)
        console.say(f"train: {recipe.prune.method} trained on {facts['trained_share']:.2%} of the images of all epochs")
    console.say(
        f"train: top-1 {accuracy['val']:.2%} on val; {timing['images_per_s']:,.0f} images/s, "
        f"data wait {timing['data_wait_share']:.1%}; this student took {timing['further_student_s']:.1f} s, "
        f"with all before it {timing['first_student_s']:.1f} s"
    )
    if timing["data_wait_share"] > LOADER_LIMITS:
        console.warn(
            "train: the step waited for data; more data.workers, images stored raw or smart instead of jpg, a lower "
            "max_resolution when writing or a smaller data.input_px would help; python -m fastkd.bench step RECIPE "
            "tells what each step could reach"
        )
    return Built(facts=facts)


@dataclass(frozen=True)
class TeacherFeed:
    """Where the teacher's logits of each batch come from."""

    stored: Callable[[int | None], StoredRows | None]
    """For a view's number (None: the plain view), the rows that the loader brings along."""
    live: LiveTeacher | None
    """The teacher itself, where nothing is stored."""
    read: ReadFn
    """Logits from rows, or from what the live teacher said; part of what is compiled."""


@dataclass(frozen=True)
class Job:
    """All that training needs, compiled and ready for the first step.

    Attributes
    ----------
    ids : int64 [M]
        Samples to train on, ascending.
    running
        The samples' losses, where a dynamic method goes by them.
    """

    recipe: recipes.Recipe
    loader: Loader
    student: models.Normalised
    state: TrainState
    ids: np.ndarray
    teacher: TeacherFeed
    running: RunningLosses | None

    @property
    def images_per_epoch(self) -> int:
        """Images of an epoch that leaves nothing out but the last batch, if that is not full."""
        return self.loader.full_batches(len(self.ids)) * self.recipe.train.batch_size

    @property
    def result(self) -> models.Normalised:
        """The net that is evaluated and saved: the student, or the average of its weights."""
        average = self.state.average
        return cast(models.Normalised, average.net) if average else self.student

    def epoch_ids(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in its order: all, or those that a dynamic method leaves (int64 [n])."""
        order = epoch_order(len(self.ids), self.recipe.seed, epoch)
        if self.running is not None:
            prune = self.recipe.prune
            full = epoch >= self.recipe.train.epochs * (1 - prune.full_epochs_ratio)
            kept_M = self.running.infobatch(0.0 if full else prune.easy_drop_ratio, seed=prune.seed, epoch=epoch)
            order = order[kept_M[order]]
        return self.ids[order]

    def batches(self, ids: np.ndarray, epoch: int) -> Generator[Batch, None, None]:
        """Load samples in the order given, as an epoch sees them."""
        view, px = self.recipe.view_of(epoch), self.recipe.px_of(epoch)
        return self.loader.batches(ids, last="drop", view=view, stored=self.teacher.stored(view), input_px=px)


def prepare(chain: "Chain") -> Job:
    """Build all that the first step needs, compile it, and divide the cores."""
    recipe, runtime = chain.recipe, chain.runtime
    train, watch = recipe.train, chain.watch
    with watch.on("setup"):
        loader = chain.loader("train", train.batch_size)
        ids_M = np.asarray(chain.subset.array("indices.npy")) if uses_subset(chain) else chain.train_ids
        loader.full_batches(len(ids_M))
        student = _new_student(chain)
        student.train()
        teacher = teacher_feed(chain)
        state = TrainState(
            runtime,
            runtime.compiled(Objective(student, loss_of(recipe), teacher.read)),
            runtime.optimizer(recipe.optim, student.parameters()),
            runtime.scaler(),
            parts=train.accumulate,
            clip_norm=recipe.optim.clip_norm,
            average=MovingAverage(student, train.ema_decay) if train.ema_decay else None,
        )
        running = RunningLosses(ids_M, runtime.device) if recipe.prune.dynamic else None
        job = Job(recipe, loader, student, state, ids_M, teacher, running)
    with watch.on("compile"):
        if runtime.compile:
            console.say("train: compiling; the first time on a machine this takes up to a minute")
        sizes = {recipe.px_of(epoch): epoch for epoch in reversed(range(train.epochs))}
        for epoch in sorted(sizes.values()):
            step_s = _warm_up(job, epoch)
    with watch.on("setup"):
        if not recipe.data.workers:
            _divide_cores(job, epoch, step_s)
    return job


def _warm_up(job: Job, epoch: int) -> float:
    """Compile a step as an epoch takes it; return the seconds of another one, without its update."""
    state, size = job.state, job.recipe.train.batch_size
    with closing(feed(job.batches(job.ids[:size], epoch), state.runtime)) as batches:
        batch = next(batches)
        weight_B = None if job.running is None else job.running.weight_N[batch.sample_ids]
        for _ in range(2):
            start = state.runtime.clock()
            warm_up(state, batch, job.teacher.live, weight_B)
        return state.runtime.clock() - start


def _divide_cores(job: Job, epoch: int, step_s: float) -> None:
    """Give the loader as many threads as keep it well ahead of the step, by measurement, and the others to the step."""
    loader, size = job.loader, job.recipe.train.batch_size
    most, loader.workers = loader.workers, 1
    if most == 1:
        return
    ids = job.ids[: MEASURED_BATCHES * size]
    with closing(job.batches(ids, epoch)) as batches:
        for _ in zip(range(BATCHES_AHEAD + 1), batches, strict=False):
            pass  # loaded while nobody waited
        start, count = time.perf_counter(), 0
        for _ in batches:
            count += 1
            if time.perf_counter() - start > MEASURED_S:
                break
    batch_s = (time.perf_counter() - start) / max(count, 1)
    loader.workers = max(1, min(most, math.ceil(LOADER_AHEAD * batch_s / step_s)))
    console.say(
        f"train: a step takes {1e3 * step_s:.2f} ms, loading a batch {1e3 * batch_s:.2f} ms in one thread: "
        f"the loader gets {loader.workers} of {most}"
    )


def _new_student(chain: "Chain") -> models.Normalised:
    """Build the student on the device, initialised from the recipe's seed alone."""
    student = chain.recipe.student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(mix64(np.array([0]), chain.recipe.seed, "init")[0] >> np.uint64(1)))
        net = models.build(student.model, chain.num_classes)
    if student.weights is not None:
        models.load_weights(net, student.weights, name=student.model)
    normalised = models.Normalised(net, chain.normalisation)
    chain.runtime.place(normalised)
    return normalised


def loss_of(recipe: recipes.Recipe) -> LossFn:
    """Return the loss that a recipe says: of KD, or without a teacher of the labels alone."""
    loss = recipe.loss
    if recipe.teacher is None:
        return partial(supervised_loss, label_smoothing=loss.label_smoothing)
    return partial(
        kd_loss,
        alpha=loss.alpha,
        gamma=loss.gamma,
        temperature=loss.temperature,
        label_smoothing=loss.label_smoothing,
    )


def teacher_feed(chain: "Chain") -> TeacherFeed:
    """Return where the teacher's logits come from, as the recipe says."""
    recipe, runtime = chain.recipe, chain.runtime
    if recipe.teacher is None:
        return TeacherFeed(lambda view: None, None, lambda told: None)

    if recipe.labels.mode == "stored":
        ids_M = np.asarray(chain.subset.array("indices.npy"))
        plain = StoredRows(ids_M, [chain.subset.array("logits.npy")])
        return TeacherFeed(
            lambda view: plain if view is None else labelling.open_view(chain.labels, ids_M, view),
            None,
            partial(stored_logits, num_classes=chain.num_classes, temperature=recipe.loss.temperature),
        )

    net = chain.teacher.net
    sigma_K = None
    if recipe.labels.reshape:
        sigma_K = torch.tensor(chain.subset.array("class_std.npy"), dtype=torch.float32, device=runtime.device)

    def live(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), runtime.autocast():
            logits_BK = net(images).float()
            return logits_BK if sigma_K is None else reshape_logits(logits_BK, labels, sigma_K)

    return TeacherFeed(lambda view: None, live, lambda told: told[0])


def _look(
    chain: "Chain", net: nn.Module, journal: Journal, split: str, ids: np.ndarray, name: str, epoch: int
) -> float:
    """Evaluate on a split; uncompiled, since compiling another graph costs more than one look saves."""
    loader: Loader = chain.loader(split, min(EVAL_BATCH_SIZE, len(ids)))
    was_training = net.training
    net.eval()
    top1 = evaluate(chain.runtime, net, loader.batches(ids, last="pad"), chain.num_classes)
    net.train(was_training)
    journal.write("evaluate", epoch=epoch, split=name, top1=top1)
    if name == "holdout":
        console.say(f"epoch {epoch + 1}: top-1 {top1:.2%} on the hold-out")
    return top1


def _save_student(chain: "Chain", job: Job, directory: Path) -> None:
    """Write the weights, and what one must know to use them."""
    models.save_weights(job.result.net, directory / "student.safetensors")
    normalisation = chain.normalisation
    described = {
        "model": chain.recipe.student.model,
        "num_classes": chain.num_classes,
        "classes": chain.dataset.facts["classes"],
        "input_hw": list(job.loader.image_hw),
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "ema": job.state.average is not None,
    }
    _write_json(directory / "model.json", described)


def _timing(chain: "Chain", epochs: list[dict[str, float]]) -> dict[str, Any]:
    """Return what everything cost: first and further student, with the teacher's training on its own line."""
    own = chain.watch.seconds
    before = {name: cost for name, cost in chain.costs.items() if name not in ("teacher", "train")}
    further_s = sum(own.values())
    wall_s = sum(e["wall_s"] for e in epochs)
    wait_s = sum(e["data_wait_s"] for e in epochs)
    return {
        "stages": [
            *({"stage": name, "seconds": c.seconds, "reused": c.reused} for name, c in before.items()),
            *({"stage": name, "seconds": s, "reused": False} for name, s in own.items()),
        ],
        "first_student_s": sum(c.seconds for c in before.values()) + further_s,
        "further_student_s": further_s,
        "stored_bytes": _stored_bytes(chain),
        "teacher_training_s": chain.costs["teacher"].seconds if "teacher" in chain.costs else None,
        "data_wait_s": wait_s,
        "step_s": wall_s - wait_s,
        "data_wait_share": wait_s / wall_s,
        "images_per_s": sum(e["images"] for e in epochs) / wall_s,
        "epochs": epochs,
    }


def _stored_bytes(chain: "Chain") -> int:
    """Return the size of the stored logits that the student learned from."""
    if chain.recipe.teacher is None or chain.recipe.labels.mode == "online":
        return 0
    if uses_labels(chain.recipe):
        return chain.labels.facts["row_bytes"] * chain.labels.facts["count"] * (chain.recipe.num_views or 0)
    return chain.subset.manifest.files["logits.npy"].size


def environment(chain: "Chain") -> dict[str, Any]:
    """Return what a run was made with."""
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    runtime = chain.runtime
    return {
        "machine": doctor.machine(),
        "torch_threads": torch.get_num_threads(),
        "device": str(runtime.device),
        "gpu": torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None,
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "compile": runtime.compile,
        "versions": versions,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
