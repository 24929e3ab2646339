"""train: the student, from whatever the pipeline provides → RUN."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastkd import artifacts, console, doctor, models
from fastkd import recipe as recipes
from fastkd.artifacts import Artifact, Built
from fastkd.data.loader import Loader
from fastkd.data.order import dealt_batches
from fastkd.distributed import Vote, current
from fastkd.engine import checkpoint
from fastkd.engine.loop import Epoch, StoppedError, train_epoch
from fastkd.engine.schedule import learning_rates
from fastkd.errors import InputError
from fastkd.stages import labelling
from fastkd.stages.distributed_build import build_together, decided_by_leader, read_once_seen
from fastkd.stages.resumable import full_disk_explained
from fastkd.stages.run_log import History, require_tensorboard
from fastkd.stages.stop_signal import StopRequest
from fastkd.stages.trained_student import STORED
from fastkd.stages.training_setup import (
    LOADING_HELP,
    Job,
    check_student,
    derive_seed,
    prepare,
    uses_labels,
    uses_subset,
)

if TYPE_CHECKING:
    from fastkd.pipeline import Pipeline

CHECKPOINTS = "checkpoints"
EVAL_BATCH_SIZE = 256
LOADER_LIMITS = 0.1  # share of the time waited for data from which on a person should hear of it
VERSIONS = ("fastkd", "torch", "torchvision", "ffcv", "numba", "numpy", "timm")


def build_run(pipeline: "Pipeline", *, out: Path | None = None, source: Path | None = None) -> tuple[Artifact, bool]:
    """Train the student of a pipeline, or find its RUN.

    Parameters
    ----------
    out
        Where the RUN goes; default: under `train.runs_dir`, by name and key.
    source
        The recipe file, kept in the RUN as it was given.
    """
    recipe = pipeline.recipe
    if recipe.log.tensorboard and pipeline.build:
        require_tensorboard()
    if pipeline.build:
        check_student(pipeline)
    inputs = run_key_fields(pipeline)
    path = out or Path(recipe.train.runs_dir) / f"{recipe.name}-{artifacts.key_of('RUN', inputs)[:8]}"
    if not pipeline.build and not path.exists():
        raise pipeline.missing("RUN", path)
    parents = {"DATASET": pipeline.dataset.key}
    if uses_subset(pipeline):
        parents["SUBSET"] = pipeline.subset.key
    if uses_labels(recipe):
        parents["LABELS"] = pipeline.labels.key
    with full_disk_explained(path.parent, "the next run goes on from the last checkpoint", setting="train.runs_dir"):
        return build_together(
            path,
            "RUN",
            inputs,
            lambda directory: _train(pipeline, directory, source),
            parents=parents,
            settings={"precision": pipeline.runtime.precision, "device": pipeline.runtime.device.type},
            force="train" in pipeline.force,
            resumable=True,
            scratch=CHECKPOINTS,
            sources=lambda: _sources(pipeline),
        )


def _sources(pipeline: "Pipeline") -> list[Artifact]:
    """Return the artifacts that a training reads."""
    sources = [pipeline.dataset]
    if uses_subset(pipeline):
        sources.append(pipeline.subset)
    if uses_labels(pipeline.recipe):
        sources.append(pipeline.labels)
    return sources


def _refuse_changed(pipeline: "Pipeline", epoch: int | None = None) -> None:
    """See that nothing that a training reads was changed; of LABELS, where an epoch is given, only the view it reads.

    Raises
    ------
    ArtifactError
        Names the file.
    """
    for source in _sources(pipeline):
        view = pipeline.recipe.view_of(epoch) if epoch is not None and source.manifest.kind == "LABELS" else None
        source.refuse_changed(*(() if view is None else labelling.view_names(source, view)))


def run_key_fields(pipeline: "Pipeline") -> dict[str, Any]:
    """Return what determines the student, building whatever comes before it.

    Precision, device and versions are recorded, not keyed.
    """
    recipe = pipeline.recipe
    inputs: dict[str, Any] = {
        "data": pipeline.dataset.key,
        "holdout_ratio": recipe.data.holdout_ratio,
        "view": pipeline.view_key_fields(recipe.data.input_px, varied=recipe.num_views is not None),
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
            "teacher": pipeline.teacher_key_fields,
            "loss": recipe.loss.model_dump(mode="json"),
            "labels": recipe.labels.model_dump(mode="json", include={"mode", "reshape", "topk"}),
        }
    elif recipe.loss.label_smoothing:
        inputs["loss"] = {"label_smoothing": recipe.loss.label_smoothing}
    if uses_subset(pipeline):
        inputs["subset"] = pipeline.subset.key
    if recipe.prune.dynamic:
        inputs["prune"] = recipe.prune.key_fields()
    if uses_labels(recipe):
        inputs["labels"]["key"] = pipeline.labels.key
    return inputs


def _unusual(train: recipes.Train) -> dict[str, Any]:
    """Return settings of the loop that bear on the student and are seldom used: where they are, alone."""
    settings = {name: getattr(train, name) for name in ("accumulate", "ema_decay", "sync_batchnorm")}
    usual = recipes.Train(epochs=1, batch_size=1)
    unusual: dict[str, Any] = {name: value for name, value in settings.items() if value != getattr(usual, name)}
    if train.progressive_px:
        unusual["progressive_px"] = sorted(train.progressive_px.items())
    return unusual


def _student_weights(recipe: recipes.Recipe) -> str | None:
    """Return what identifies the weights that a student starts from: a file's digest, an artifact's key, or a name."""
    weights = recipe.student.weights
    if weights is None:
        return None
    path = Path(weights)
    if path.is_file():
        return artifacts.file_digest(path) + (" (average)" if models.takes_average(path) else "")
    return artifacts.load(path).key if path.is_dir() else weights


def _train(pipeline: "Pipeline", directory: Path, source: Path | None) -> Built:
    """Train, from the last checkpoint on if there is one; evaluate once, and write everything that a RUN holds.

    All processes of a job are here at once; the leading one writes.
    """
    import fastkd.engine.evaluation  # noqa: F401 - torchmetrics takes seconds, for which scoring need not wait

    recipe, runtime, watch, world = pipeline.recipe, pipeline.runtime, pipeline.watch, current()
    console.heading(f"train: {recipe.name}: {recipe.student.model} on {runtime.device} in {runtime.precision}")
    key = artifacts.key_of("RUN", run_key_fields(pipeline))
    checkpoints = directory / CHECKPOINTS
    begun = world.is_main and checkpoints.exists()
    found = checkpoint.newest(checkpoints) if world.is_main else None
    if (name := decided_by_leader(lambda: found and found.file.name)) and not world.is_main:
        found = read_once_seen(checkpoints / name, checkpoint.read)
    if found and found.state["key"] != key:
        raise begun_otherwise(recipe, directory)
    world.check_equal("checkpoint to go on from", {"name": found and found.file.name})
    if world.is_main:
        if source is not None:
            shutil.copyfile(recipes.locate(source), directory / "recipe.yaml")
        (directory / "resolved.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
        _write_environment(pipeline, directory / "env.json", begun=found is not None)
    try:
        job = prepare(pipeline)
    except InputError:
        if not begun and world.is_main:
            shutil.rmtree(directory)
        raise
    # For what nets draw while they train: dropout.
    torch.manual_seed(derive_seed(recipe.seed, "train" if world.is_main else f"train {world.rank}"))
    before = found.state if found else None
    history = History(directory, key, watch, before, tensorboard=recipe.log.tensorboard, writes=world.is_main)
    if found:
        checkpoint.restore(found, job.student, job.state, job.running)
        console.say(
            f"train: going on with epoch {len(history.epochs) + 1}, step {history.epoch.steps + 1}, from the last "
            f"checkpoint; {history.earlier_s:.1f} s went into it before"
        )

    def save() -> None:
        _refuse_changed(pipeline)  # the steps since the last checkpoint were on the right data
        step = history.steps_before + history.epoch.steps
        checkpoint.save(checkpoints, step, job.student, job.state, job.running, history.state())

    if found:
        save()  # what was lost is charged to it, and not again
    with StopRequest() as stop:
        try:
            _train_epochs(pipeline, job, history, save, stop)
            save()  # evaluating and publishing may be broken off as well
        except StoppedError:
            if math.isfinite(history.epoch.unlogged):
                save()
            console.say("train: stopped; the same command goes on from the last checkpoint")
            raise stop.reason() from None
        if world.any_of(stop.requested):
            raise stop.reason()
    accuracy = {}
    epoch = recipe.train.epochs - 1
    with watch.on("evaluate"):
        if len(pipeline.holdout_ids):
            accuracy["holdout"] = _look(pipeline, job.result, history, "train", pipeline.holdout_ids, "holdout", epoch)
        val_ids = np.arange(pipeline.dataset.facts["counts"]["val"])
        accuracy["val"] = _look(pipeline, job.result, history, "val", val_ids, "val", epoch)
    history.close()
    if not world.is_main:
        return Built()

    _save_student(pipeline, job, directory)
    timing = _timing(pipeline, history.epochs)
    _write_json(directory / "timing.json", timing)
    facts = {"model": recipe.student.model, "top1": accuracy, "images_per_s": timing["images_per_s"]}
    if recipe.prune.dynamic:
        images = recipe.train.epochs * job.images_per_epoch
        facts["trained_share"] = sum(e["images"] for e in history.epochs) / images
        console.say(f"train: {recipe.prune.method} trained on {facts['trained_share']:.2%} of the images of all epochs")
    console.say(
        f"train: top-1 {accuracy['val']:.2%} on val; {timing['images_per_s']:,.0f} images/s, "
        f"data wait {timing['data_wait_share']:.1%}; this student took {timing['further_student_s']:.1f} s, "
        f"with all before it {timing['first_student_s']:.1f} s"
    )
    if timing["data_wait_share"] > LOADER_LIMITS:
        console.warn(
            f"train: the step waited for data; {LOADING_HELP}; python -m fastkd.bench step RECIPE tells what each step "
            "could reach"
        )
    if pipeline.warnings:
        facts[artifacts.WARNINGS] = pipeline.warnings
    return Built(facts=facts, earlier_s=history.earlier_s)


def begun_otherwise(recipe: recipes.Recipe, directory: Path) -> InputError:
    """Return the error about an unfinished RUN of another recipe, which says what differs in them."""
    phrases = []
    with contextlib.suppress(OSError, ValueError, TypeError, InputError):  # it was being written
        phrases = artifacts.differences(recipe.model_dump(mode="json"), recipes.read_yaml(directory / "resolved.yaml"))
    differs = f" ({'; '.join(phrases[:5])})" if phrases else ""
    return InputError(
        f"{directory}: was begun for another recipe, or with other settings{differs}; give those again to go on, "
        "choose another place, or begin anew with --force train"
    )


def _train_epochs(
    pipeline: "Pipeline", job: Job, history: History, save: Callable[[], None], stop: StopRequest
) -> None:
    """Train the epochs that are left, writing a checkpoint every now and then.

    Raises
    ------
    StoppedError
        Somebody asked to stop; `history` is up to date.
    """
    recipe, watch, train, world = pipeline.recipe, pipeline.watch, pipeline.recipe.train, current()
    images, stop_here, look = job.images_per_epoch, Vote(lambda: stop.requested), ""
    begun = len(history.epochs) * images + history.epoch.images
    with console.progress("train", train.epochs * images, begun=begun) as update:
        for number in range(len(history.epochs), train.epochs):
            epoch = history.epoch
            _refuse_changed(pipeline, number)
            with watch.on("train"):
                ids = job.epoch_ids(number, begun=epoch.steps > 0)
                lr_S = learning_rates(recipe.optim, train.epochs, number, job.steps_of(len(ids)))

            def on_log(
                epoch: Epoch, loss: float, number: int = number, lr_S: np.ndarray = lr_S, look: str = look
            ) -> None:
                wait = epoch.data_wait_s / epoch.wall_s
                history.write(
                    "steps",
                    epoch=number,
                    step=history.steps_before + epoch.steps,
                    loss=loss,
                    lr=lr_S[epoch.steps - 1],
                    data_wait_share=wait,
                )
                done = round((number + epoch.steps / len(lr_S)) * images)
                memory = f"memory {pipeline.runtime.memory_bytes() / 1e9:.2f} GB"
                update(done, f"epoch {number + 1}, loss {loss:.3f}, data wait {wait:.1%}{look}, {memory}")
                if epoch.steps < len(lr_S) and world.any_of(history.is_due(train.checkpoint_every_s)):
                    save()

            if epoch.steps < len(lr_S):
                with watch.on("train"):
                    train_epoch(
                        job.state,
                        job.batches(ids[epoch.steps * train.batch_size :], number),
                        job.teacher.live,
                        lr_S,
                        log_every_steps=recipe.log.every_steps,
                        on_log=on_log,
                        running=job.running,
                        epoch=epoch,
                        stop=stop_here,
                    )
            epoch.data_wait_s = world.mean(epoch.data_wait_s)
            history.end_epoch()
            every = train.eval_every_epochs
            if every and (number + 1) % every == 0 and number + 1 < train.epochs and len(pipeline.holdout_ids):
                with watch.on("evaluate"):
                    top1 = _look(pipeline, job.result, history, "train", pipeline.holdout_ids, "holdout", number)
                look = f", top-1 {top1:.2%}"
            if world.any_of(history.is_due(train.checkpoint_every_s)):
                save()
    stop_here.close()


def _look(
    pipeline: "Pipeline", net: nn.Module, history: History, split: str, ids: np.ndarray, name: str, epoch: int
) -> float:
    """Evaluate on a split; uncompiled, since compiling another graph costs more than one look saves.

    The processes deal out the batches. Batch norm's statistics are those of the leading one.
    """
    from fastkd.engine.evaluation import evaluate

    world = current()
    loader: Loader = pipeline.loader(split, min(EVAL_BATCH_SIZE, len(ids)))
    was_training = net.training
    net.eval()
    world.broadcast_tensors(net.buffers())
    mine = dealt_batches(ids, loader.batch_size, world.rank, world.size)
    top1 = evaluate(
        pipeline.runtime, net, loader.batches(mine, last="pad") if len(mine) else None, pipeline.num_classes
    )
    net.train(was_training)
    history.write("evaluate", epoch=epoch, split=name, top1=top1, images=len(ids))
    if name == "holdout":
        console.say(f"epoch {epoch + 1}: top-1 {top1:.2%} on the hold-out")
    return top1


def _save_student(pipeline: "Pipeline", job: Job, directory: Path) -> None:
    """Write the weights, and what one must know to use them."""
    models.save_weights(job.result.net, directory / "student.safetensors")
    normalisation = pipeline.normalisation
    described = {
        "model": pipeline.recipe.student.model,
        "num_classes": pipeline.num_classes,
        "classes": pipeline.dataset.facts["classes"],
        "input_hw": list(job.loader.image_hw),
        "crop_ratio": pipeline.crop_ratio,
        "stored": {name: pipeline.dataset.facts["options"][name] for name in STORED},
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "ema": job.state.average is not None,
    }
    _write_json(directory / "model.json", described)


def _timing(pipeline: "Pipeline", epochs: list[dict[str, float]]) -> dict[str, Any]:
    """Return what everything cost: first and further student, with the teacher's training on its own line."""
    own = pipeline.watch.seconds
    before = {name: cost for name, cost in pipeline.costs.items() if name not in ("teacher", "train")}
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
        "stored_bytes": _stored_bytes(pipeline),
        "teacher_training_s": pipeline.costs["teacher"].seconds if "teacher" in pipeline.costs else None,
        "data_wait_s": wait_s,
        "step_s": wall_s - wait_s,
        "data_wait_share": wait_s / wall_s,
        "images_per_s": sum(e["images"] for e in epochs) / wall_s,
        "epochs": epochs,
    }


def _stored_bytes(pipeline: "Pipeline") -> int:
    """Return the size of the stored logits that the student learned from."""
    if pipeline.recipe.teacher is None or pipeline.recipe.labels.mode == "online":
        return 0
    if uses_labels(pipeline.recipe):
        return pipeline.labels.facts["row_bytes"] * pipeline.labels.facts["count"] * (pipeline.recipe.num_views or 0)
    return pipeline.subset.manifest.files["logits.npy"].size


def environment(pipeline: "Pipeline") -> dict[str, Any]:
    """Return what a run was made with."""
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    runtime = pipeline.runtime
    return {
        "machine": doctor.machine(),
        "torch_threads": torch.get_num_threads(),
        "device": str(runtime.device),
        "processes": current().size,
        "gpu": runtime.gpu,
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "compile": runtime.compile,
        "versions": versions,
    }


def _write_environment(pipeline: "Pipeline", path: Path, *, begun: bool) -> None:
    """Write what a run is made with; of one that was begun with something else, that as well, under `earlier`."""
    now, earlier = environment(pipeline), []
    if begun:
        # It was being written at that moment, or is none of ours.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = before.pop("earlier")
            if before != now:
                earlier.append(before)
            if before["precision"] != now["precision"]:
                console.warn(f"train: was begun in {before['precision']}, and goes on in {now['precision']}")
    _write_json(path, {**now, "earlier": earlier})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
