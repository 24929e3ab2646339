"""Whether the device computes what the CPU computes: batches, teacher logits, stored rows, losses and steps."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.bench.breakdown import changed
from fastkd.bench.gpu import recipes
from fastkd.bench.gpu.recipes import LARGE_RAW, SMALL, TITLES
from fastkd.bench.gpu.rows import Row, Settings
from fastkd.bench.gpu.speed import NOT_CAPTURED, kinds_of_step, lacks_graph
from fastkd.bench.workbench import Workbench
from fastkd.data.loader import Batch
from fastkd.engine.epoch import train_epoch
from fastkd.engine.losses import loss_function
from fastkd.engine.prefetch import prefetch_to_device
from fastkd.engine.runtime import Runtime
from fastkd.engine.schedule import learning_rates
from fastkd.errors import ArtifactError
from fastkd.pipeline import Pipeline
from fastkd.recipe import Loss, Recipe
from fastkd.recipe.tables import LOSSES
from fastkd.stages.checking import TOLERANCE
from fastkd.stages.training_setup import TrainingSetup, prepare
from fastkd.verification import check_recipe

BATCHES, IMAGES, STEPS_COMPARED = 20, 64, 8
LOSS_TOLERANCE = 1e-4
"""Relative error of losses and of their gradients, computed in float32 from the same logits."""
STEP_TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1, "fp16": 2e-1}
"""Relative difference of the losses of the first steps to those of the CPU in float32, by precision. In fp16 the first
update may be skipped, if its gradients overflow. Chosen without a GPU."""


def agreement(settings: Settings) -> Iterator[Row]:
    """Compare the device with the CPU."""
    for name in (SMALL, LARGE_RAW):
        yield _batches(name, settings)
    yield from _losses(settings)
    recipe = recipes.load(SMALL, settings, compile=False)
    yield from _logits(recipe, settings)
    yield from _stored_rows(recipe)
    yield from _steps(settings)


# --- the loader ---------------------------------------------------------------------------------------------------


def _batches(name: str, settings: Settings) -> Row:
    """Count the batches that differ, in images, labels, ids or rows, between the loader and the device."""
    bench = Workbench(recipes.load(name, settings, compile=False))
    try:
        runtime = bench.pipeline.runtime
        rng = np.random.default_rng(0)
        for array in bench.rows.arrays:
            array[:] = rng.random(array.shape)
        setup = bench.setup(runtime)
        ids = setup.epoch_ids(0)
        with closing(setup.batches(ids, 0)) as batches:
            expected = [[t.clone() for t in _tensors(one)] for one in itertools.islice(batches, BATCHES)]
        with closing(prefetch_to_device(setup.batches(ids, 0), runtime)) as batches:
            found = [[t.cpu().clone() for t in one.tensors()] for one in itertools.islice(batches, BATCHES)]
    finally:
        bench.close()
    different = sum(not all(map(torch.equal, a, b)) for a, b in zip(expected, found, strict=True))
    return Row(
        f"batches on the device that differ from the loader's, of {len(found)}, {TITLES[name]}", different, most=0
    )


def _tensors(batch: Batch) -> Sequence[Tensor]:
    return (batch.images, batch.labels, batch.sample_ids, *batch.stored)


# --- losses -------------------------------------------------------------------------------------------------------


def _losses(settings: Settings) -> Iterator[Row]:
    """Compare each loss and its gradient on random logits with float64 on the CPU."""
    device = Runtime.choose(settings.device, "fp32", channels_last=True, compile=False).device
    generator = torch.Generator().manual_seed(0)
    student_BK, teacher_BK = (4 * torch.randn(256, 100, generator=generator) for _ in range(2))
    labels_B = torch.randint(0, 100, (256,), generator=generator)
    for name in LOSSES:
        loss = loss_function(Loss(name=name), has_teacher=True)

        def computed(dtype: torch.dtype, where: torch.device, loss: Any = loss) -> tuple[Tensor, Tensor]:
            z_BK = student_BK.detach().to(where, dtype).requires_grad_()
            loss_B = loss(z_BK, labels_B.to(where), teacher_BK.to(where, dtype))
            loss_B.sum().backward()
            return loss_B.detach().cpu().double(), z_BK.grad.cpu().double()  # type: ignore[union-attr]

        pairs = zip(computed(torch.float32, device), computed(torch.float64, torch.device("cpu")), strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        yield Row(f"error of the loss {name} and its gradient", error, most=LOSS_TOLERANCE)


# --- the teacher ----------------------------------------------------------------------------------------------------


def _logits(recipe: Recipe, settings: Settings) -> Iterator[Row]:
    """Compare the logits of the trained teacher, in each precision, with float32 on the CPU."""
    pipeline = Pipeline(recipe)
    net, images = pipeline.teacher.net, pipeline.images
    loader = images.loader("train", IMAGES)
    with closing(loader.batches(images.train_ids[:IMAGES], last="pad")) as batches:
        pixels = next(iter(batches)).images.clone()

    def logits(runtime: Runtime) -> Tensor:
        moved = runtime.to_device(net)
        with torch.inference_mode(), runtime.autocast():
            return moved(pixels.to(runtime.device)).float().cpu()

    expected = logits(Runtime.choose("cpu", "fp32", channels_last=True, compile=False))
    for precision in ("fp32", "bf16", *(("fp16",) if settings.device.startswith("cuda") else ())):
        runtime = Runtime.choose(settings.device, precision, channels_last=True, compile=False)
        error_B = (logits(runtime) - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
        title = f"error of the teacher's logits in {runtime.arithmetic}, relative to the largest of their row"
        yield Row(title, float(error_B.max()), most=TOLERANCE[runtime.arithmetic])


def _stored_rows(recipe: Recipe) -> Iterator[Row]:
    """Compare rows that the device has scored and labelled with the CPU."""
    _ = Pipeline(recipe).training_inputs  # builds them
    on_cpu = changed(recipe, train={"device": "cpu", "precision": "fp32"})
    try:
        compared = check_recipe(on_cpu)
    except ArtifactError as error:
        yield Row("error of stored rows against the CPU", None, error=str(error))
        return
    for what, found in zip(("scores", "labels"), compared, strict=True):
        yield Row(f"error of stored rows ({what}) against the CPU", found.worst_error, most=found.allowed)


# --- steps ----------------------------------------------------------------------------------------------------------


def _steps(settings: Settings) -> Iterator[Row]:
    """Compare the losses of the first steps with those of the CPU in float32."""
    expected, _ = _first_losses(recipes.load(SMALL, settings, device="cpu", precision="fp32", compile=False))
    for precision in ("fp32", "bf16", *(("fp16",) if settings.device.startswith("cuda") else ())):
        for how, step in kinds_of_step(settings).items():
            title = f"difference of the losses of the first {STEPS_COMPARED} steps, {precision}, {how}"
            try:
                found, setup = _first_losses(recipes.load(SMALL, settings, precision=precision, **step))
            except RuntimeError as error:  # of CUDA or of the compiler
                yield Row(title, None, error=f"{type(error).__name__}: {str(error)[:500]}")
                continue
            difference = float(np.max(np.abs(found / expected - 1)))
            reason = NOT_CAPTURED if lacks_graph(setup, step) else ""
            most = STEP_TOLERANCE[setup.state.runtime.arithmetic]
            yield Row(title, difference, most=most, error=reason, facts={"losses": found.tolist()})


def _first_losses(recipe: Recipe) -> tuple[np.ndarray, TrainingSetup]:
    """Train for some steps; return their losses (float64 [S]), and the training."""
    setup = prepare(Pipeline(recipe).training_inputs)
    losses: list[float] = []
    train_epoch(
        setup.state,
        _first_batches(setup),
        setup.teacher.live,
        learning_rates(recipe.optim, recipe.train.epochs, 0, setup.steps_of(len(setup.ids)))[:STEPS_COMPARED],
        log_every_steps=1,
        on_log=lambda epoch, loss: losses.append(loss),
    )
    return np.array(losses), setup


def _first_batches(setup: TrainingSetup) -> Any:
    with closing(setup.batches(setup.epoch_ids(0), 0)) as batches:
        yield from itertools.islice(batches, STEPS_COMPARED)
