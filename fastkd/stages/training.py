"""train: train the student → RUN."""

import contextlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd import artifacts, console
from fastkd import recipe as recipes
from fastkd.artifacts import Artifact, Built
from fastkd.data.order import dealt_batches
from fastkd.distributed import AsyncAny, current
from fastkd.engine import checkpoint
from fastkd.engine.checkpoint import Checkpoint
from fastkd.engine.epoch import Epoch, StoppedError, train_epoch
from fastkd.engine.inference import evaluate
from fastkd.engine.schedule import learning_rates
from fastkd.errors import InputError
from fastkd.stages.distributed_build import build_together, decided_by_main, read_once_seen
from fastkd.stages.label_format import view_names
from fastkd.stages.new_student import derive_seed
from fastkd.stages.resumable import full_disk_explained
from fastkd.stages.run_files import timing, write_environment, write_json, write_recipe, write_student
from fastkd.stages.run_log import Cost, History
from fastkd.stages.stop_signal import StopRequest
from fastkd.stages.store import ArtifactStore, MissingError
from fastkd.stages.training_setup import LOADING_HELP, TrainingInputs, TrainingSetup, prepare

CHECKPOINTS = "checkpoints"
EVAL_BATCH_SIZE = 256
LINES_PER_EPOCH = 5
"""Number of lines in metrics.jsonl for an epoch that is too short for `log.every_steps`, if it has as many steps."""
LOADER_LIMITS = 0.1
"""Warn when data wait exceeds this share of training time."""


@dataclass(frozen=True)
class Origin:
    """What a RUN records besides the training itself.

    Attributes
    ----------
    costs
        Costs of the stages before training, by their names.
    warnings
        Returns the warnings given so far.
    file
        The recipe file, which is copied into the RUN.
    notes
        Lines to print before training.
    """

    costs: dict[str, Cost]
    warnings: Callable[[], list[str]]
    file: Path | None = None
    notes: Sequence[str] = ()


def build_run(
    store: ArtifactStore, inputs: TrainingInputs, origin: Origin, out: Path | None = None
) -> tuple[Artifact, bool]:
    """Train the student, or find its RUN.

    Parameters
    ----------
    out
        Where the RUN goes. Default: under `train.runs_dir`, named by recipe and key.

    Returns
    -------
    run, built
        `built` is False if it existed.
    """
    recipe, runtime = inputs.recipe, inputs.runtime
    fields = run_key_fields(inputs)
    path = run_path(recipe, fields, out)
    if not store.build and not path.exists():
        raise MissingError("RUN", path)
    with full_disk_explained(path.parent, "the next run resumes from the last checkpoint", setting="train.runs_dir"):
        return build_together(
            path,
            "RUN",
            fields,
            lambda directory: _Training(inputs, origin, directory).run(),
            parents={source.manifest.kind: source.key for source in inputs.sources},
            settings={"precision": runtime.precision, "device": runtime.device.type},
            force="train" in store.force,
            resumable=True,
            scratch=CHECKPOINTS,
            sources=lambda: inputs.sources,
        )


def run_path(recipe: recipes.Recipe, fields: dict[str, Any], out: Path | None = None) -> Path:
    """Return where the RUN with these key fields goes."""
    return out or Path(recipe.train.runs_dir) / f"{recipe.name}-{artifacts.key_of('RUN', fields)[:8]}"


def run_key_fields(inputs: TrainingInputs) -> dict[str, Any]:
    """Return the key fields of a RUN: everything that determines the student.

    Precision, device and versions are recorded, but are not part of the key.
    """
    recipe, images = inputs.recipe, inputs.images
    fields: dict[str, Any] = {
        "data": images.dataset.key,
        "holdout_ratio": recipe.data.holdout_ratio,
        "view": images.view_key_fields(recipe.data.input_px, varied=recipe.num_views is not None),
        "views": recipe.num_views,
        "student": inputs.student_key_fields,
        "optim": recipe.optim.key_fields(),
        "epochs": recipe.train.epochs,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.seed,
        **_unusual(recipe.train),
    }
    if recipe.teacher is not None:
        fields |= {
            "teacher": inputs.teacher_key_fields,
            "loss": recipe.loss.key_fields(),
            "labels": {"mode": recipe.labels.mode, "topk": recipe.labels.topk, **recipe.labels.reshape_fields()},
        }
    elif recipe.loss.label_smoothing:
        fields["loss"] = {"label_smoothing": recipe.loss.label_smoothing}
    if inputs.subset is not None:
        fields["subset"] = inputs.subset.key
    if recipe.prune.dynamic:
        fields["prune"] = recipe.prune.key_fields()
    if inputs.labels is not None:
        fields["labels"]["key"] = inputs.labels.key
    return fields


def _unusual(train: recipes.Train) -> dict[str, Any]:
    """Return settings that determine the student and differ from their defaults; others are not in the key."""
    settings = {name: getattr(train, name) for name in ("accumulate", "ema_decay", "sync_batchnorm")}
    usual = recipes.Train(epochs=1, batch_size=1)
    unusual: dict[str, Any] = {name: value for name, value in settings.items() if value != getattr(usual, name)}
    if train.progressive_px:
        unusual["progressive_px"] = sorted(train.progressive_px.items())
    return unusual


def other_recipe_error(recipe: recipes.Recipe, directory: Path) -> InputError:
    """Return the error for an unfinished RUN of another recipe; it names the differences."""
    phrases = []
    with contextlib.suppress(OSError, ValueError, TypeError, InputError):  # the file may be incomplete
        phrases = artifacts.differences(recipe.model_dump(mode="json"), recipes.read_yaml(directory / "resolved.yaml"))
    differs = f" ({'; '.join(phrases[:5])})" if phrases else ""
    return InputError(
        f"{directory}: was started with another recipe, or with other settings{differs}; use those to resume, "
        "choose another path, or start over with --force train"
    )


class _Training:
    """The training of one RUN, resumed from the last checkpoint if there is one. All processes of a job run it.

    Parameters
    ----------
    directory
        Directory that the main process writes.
    """

    def __init__(self, inputs: TrainingInputs, origin: Origin, directory: Path) -> None:
        self.inputs, self.origin, self.directory = inputs, origin, directory
        self.recipe, self.stopwatch = inputs.recipe, inputs.stopwatch
        self.key = artifacts.key_of("RUN", run_key_fields(inputs))
        self.checkpoints = directory / CHECKPOINTS

    def run(self) -> Built:
        """Train, evaluate, and write all files of the RUN."""
        recipe, runtime, world = self.recipe, self.inputs.runtime, current()
        console.heading(f"train: {recipe.name}: {recipe.student.model} on {runtime.device} in {runtime.precision}")
        for note in self.origin.notes:
            console.say(note)
        found = self._last_checkpoint()
        self.setup = self._prepare(found)
        self.history = self._begin(found)
        with self.history:
            with StopRequest() as stop:
                self._train_to_the_end(stop)
            accuracy = self._evaluate_at_the_end()
        if not world.is_main:
            return Built()
        return Built(facts=self._write_results(accuracy), earlier_s=self.history.earlier_s)

    def _last_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint; the main process finds it, and the others read the same file.

        Raises
        ------
        InputError
            It belongs to another recipe.
        """
        world = current()
        found = checkpoint.newest(self.checkpoints) if world.is_main else None
        if (name := decided_by_main(lambda: found and found.file.name)) and not world.is_main:
            found = read_once_seen(self.checkpoints / name, checkpoint.read)
        if found and found.state["key"] != self.key:
            raise other_recipe_error(self.recipe, self.directory)
        world.check_equal("checkpoint to resume from", {"name": found and found.file.name})
        return found

    def _prepare(self, found: Checkpoint | None) -> TrainingSetup:
        """Write the recipe and the environment, and prepare the first step."""
        world = current()
        begun = world.is_main and self.checkpoints.exists()
        if world.is_main:
            write_recipe(self.directory, self.recipe, self.origin.file)
            write_environment(self.inputs.runtime, self.directory / "env.json", begun=found is not None)
        try:
            return prepare(self.inputs)
        except InputError:
            if not begun and world.is_main:
                shutil.rmtree(self.directory)
            raise

    def _begin(self, found: Checkpoint | None) -> History:
        """Open the log, and restore the checkpoint if there is one."""
        world, setup = current(), self.setup
        # Seeds random numbers inside networks, such as dropout.
        torch.manual_seed(derive_seed(self.recipe.seed, "train" if world.is_main else f"train {world.rank}"))
        history = History(
            self.directory,
            self.key,
            self.stopwatch,
            found.state if found else None,
            loggers=self.recipe.log.loggers,
            config=self.recipe.model_dump(mode="json"),
            writes=world.is_main,
        )
        if found:
            checkpoint.restore(found, setup.student, setup.state, setup.per_sample_loss)
            console.say(
                f"train: resuming at epoch {len(history.epochs) + 1}, step {history.epoch.steps + 1}, from the last "
                f"checkpoint; {history.earlier_s:.1f} s were spent before"
            )
            self.history = history
            self._save()  # so that the lost work is charged only once
        return history

    def _save(self) -> None:
        """Write a checkpoint, after checking that the artifacts in use have not changed."""
        self._refuse_changed()
        setup, history = self.setup, self.history
        step = history.steps_before + history.epoch.steps
        checkpoint.save(self.checkpoints, step, setup.student, setup.state, setup.per_sample_loss, history.state())

    def _refuse_changed(self, epoch: int | None = None) -> None:
        """Check that no artifact in use has changed. Given an epoch, of LABELS only its view is checked.

        Raises
        ------
        ArtifactError
            Names the file.
        """
        for source in self.inputs.sources:
            view = self.recipe.view_of(epoch) if epoch is not None and source.manifest.kind == "LABELS" else None
            source.refuse_changed(*(() if view is None else view_names(source, view)))

    def _train_to_the_end(self, stop: StopRequest) -> None:
        """Train the remaining epochs; if asked to stop, write a checkpoint first."""
        try:
            self._train_epochs(stop)
            self._save()  # evaluation and publishing may also be interrupted
        except StoppedError:
            if math.isfinite(self.history.epoch.unlogged):
                self._save()
            console.say("train: stopped; run the same command again to resume from the last checkpoint")
            raise stop.reason() from None
        if current().any_of(stop.requested):
            raise stop.reason()

    def _train_epochs(self, stop: StopRequest) -> None:
        """Train the remaining epochs, and write checkpoints.

        Raises
        ------
        StoppedError
            A signal requested to stop; `history` is up to date.
        """
        train, history, world, images = self.recipe.train, self.history, current(), self.setup.images_trained_on
        stop_here = AsyncAny(world, lambda: stop.requested)
        begun = len(history.epochs) * images + history.epoch.images
        evaluated = ""
        with console.progress("train", train.epochs * images, begun=begun) as update:
            for number in range(len(history.epochs), train.epochs):
                self._refuse_changed(number)
                self._train_epoch(number, stop_here, evaluated, update)
                history.epoch.data_wait_s = world.mean(history.epoch.data_wait_s)
                history.end_epoch()
                every, holdout_ids = train.eval_every_epochs, self.inputs.images.holdout_ids
                if every and (number + 1) % every == 0 and number + 1 < train.epochs and len(holdout_ids):
                    with self.stopwatch.on("evaluate"):
                        top1 = self._evaluate("train", holdout_ids, "holdout", number)
                    evaluated = f", top-1 {top1:.2%}"
                if world.any_of(history.is_due(train.checkpoint_every_s)):
                    self._save()
        stop_here.close()

    def _train_epoch(self, number: int, stop: Callable[[], bool], evaluated: str, update: console.Update) -> None:
        """Train the rest of an epoch."""
        setup, history, train = self.setup, self.history, self.recipe.train
        epoch, images = history.epoch, setup.images_trained_on
        with self.stopwatch.on("train"):
            ids = setup.epoch_ids(number, begun=epoch.steps > 0)
            lr_S = learning_rates(self.recipe.optim, train.epochs, number, setup.steps_of(len(ids)))
        if epoch.steps == len(lr_S):
            return

        def on_log(epoch: Epoch, loss: float) -> None:
            wait = epoch.data_wait_s / epoch.wall_s
            step, lr = history.steps_before + epoch.steps, lr_S[epoch.steps - 1]
            history.write("steps", epoch=number, step=step, loss=loss, lr=lr, data_wait_share=wait)
            done = round((number + epoch.steps / len(lr_S)) * images)
            memory = f"memory {self.inputs.runtime.memory_bytes() / 1e9:.2f} GB"
            update(done, f"epoch {number + 1}, loss {loss:.3f}, data wait {wait:.1%}{evaluated}, {memory}")
            if epoch.steps < len(lr_S) and current().any_of(history.is_due(train.checkpoint_every_s)):
                self._save()

        with self.stopwatch.on("train"):
            train_epoch(
                setup.state,
                setup.batches(ids[epoch.steps * train.batch_size :], number),
                setup.teacher.live,
                lr_S,
                log_every_steps=min(self.recipe.log.every_steps, math.ceil(len(lr_S) / LINES_PER_EPOCH)),
                on_log=on_log,
                per_sample_loss=setup.per_sample_loss,
                epoch=epoch,
                stop=stop,
            )

    def _evaluate_at_the_end(self) -> dict[str, float]:
        """Return the top-1 on the hold-out, if there is one, and on val."""
        accuracy, images, last = {}, self.inputs.images, self.recipe.train.epochs - 1
        with self.stopwatch.on("evaluate"):
            if len(images.holdout_ids):
                accuracy["holdout"] = self._evaluate("train", images.holdout_ids, "holdout", last)
            accuracy["val"] = self._evaluate("val", images.val_ids, "val", last)
        return accuracy

    def _evaluate(self, split: str, ids: np.ndarray, name: str, epoch: int) -> float:
        """Return the top-1 on some samples. Not compiled: compiling takes longer than one evaluation.

        The processes share the batches. Batch norm statistics are those of the main process.
        """
        world, net, images = current(), self.setup.result, self.inputs.images
        loader = images.loader(split, min(EVAL_BATCH_SIZE, len(ids)))
        was_training = net.training
        net.eval()
        world.broadcast_tensors(net.buffers())
        mine = dealt_batches(ids, loader.batch_size, world.rank, world.size)
        batches = loader.batches(mine, last="pad") if len(mine) else None
        top1 = evaluate(self.inputs.runtime, net, batches)
        net.train(was_training)
        self.history.write("evaluate", epoch=epoch, split=name, top1=top1, images=len(ids))
        if name == "holdout":
            console.say(f"epoch {epoch + 1}: top-1 {top1:.2%} on the hold-out")
        return top1

    def _write_results(self, accuracy: dict[str, float]) -> dict[str, Any]:
        """Write the student and timing.json, print a summary, and return the facts of the manifest."""
        recipe, setup, epochs = self.recipe, self.setup, self.history.epochs
        write_student(self.directory, recipe, self.inputs.images, setup.result, setup.loader.image_hw)
        times = timing(self.origin.costs, self.stopwatch.seconds, self.inputs.stored_bytes, epochs)
        write_json(self.directory / "timing.json", times)
        facts = {
            "model": recipes.model_name(recipe.student.model),
            "top1": accuracy,
            "images_per_s": times["images_per_s"],
        }
        if recipe.prune.dynamic:
            images = recipe.train.epochs * setup.images_per_epoch
            share = facts["trained_share"] = sum(e["images"] for e in epochs) / images
            console.say(f"train: {recipe.prune.name} trained on {share:.2%} of the images of all epochs")
        console.say(
            f"train: top-1 {accuracy['val']:.2%} on val; {times['images_per_s']:,.0f} images/s, "
            f"data wait {times['data_wait_share']:.1%}; this student took {times['further_student_s']:.1f} s "
            f"({times['first_student_s']:.1f} s with all stages before)"
            + (f", on a busy machine (load {times['load_at_start']} at the start)" if times["busy"] else "")
        )
        if times["data_wait_share"] > LOADER_LIMITS:
            console.warn(
                f"train: the step waited for data; {LOADING_HELP}. python -m fastkd.bench step RECIPE measures the "
                "rates of loader and step"
            )
        if warnings := self.origin.warnings():
            facts[artifacts.WARNINGS] = warnings
        return facts
