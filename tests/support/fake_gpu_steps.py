"""The steps of a recipe on a fake GPU (see `fake_gpu`): ``python fake_gpu_steps.py RECIPE [OVERRIDE ...]`` prints JSON.

Networks have random weights, and one batch in pinned memory is trained on again and again. Of each of the last steps:
the kernels and graphs that the host launches, its asynchronous copies, the times it waits for the device, and its
microseconds (median). With compilation also the Triton kernels, and the compute capability that they were compiled for.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from fake_gpu import Counts
from tiny_training import Batch

from fastkd import models, recipe
from fastkd.engine.cuda_graph import step_graph
from fastkd.engine.ema import ModelEma, NoEma
from fastkd.engine.epoch import train_epoch
from fastkd.engine.losses import loss_function
from fastkd.engine.runtime import Runtime
from fastkd.engine.step import ClipGradNorm, LossModule, TrainState
from fastkd.stages.label_format import decoder, format_of, view_files

CLASSES = {"cifar100": 100, "rn50": 1000}
"""Classes by the beginning of a recipe's name; 10 for the others."""
STEPS = 300


def state_of(loaded: recipe.Recipe, classes: int) -> TrainState:
    """Return the state of a training that has not begun, as `fastkd.stages.training_setup` makes it."""
    train = loaded.train
    mode = train.compile and train.compile_mode
    runtime = Runtime.choose("cuda", train.precision, channels_last=train.channels_last, compile=mode)
    net = models.Normalised(models.build(loaded.student.model, classes), models.Normalisation((0.5,) * 3, (0.25,) * 3))
    student = runtime.to_device(net).train()
    loss = loss_function(loaded.loss, has_teacher=loaded.teacher is not None)
    module = LossModule(student, loss, decoder(format_of(loaded, classes)) if loaded.teacher else lambda rows: None)
    graph = step_graph(train.cuda_graph, runtime)
    return TrainState(
        runtime,
        runtime.compiled(module),
        runtime.optimizer(loaded.optim, student.parameters(), capturable=graph.active),
        runtime.scaler(),
        accumulate=train.accumulate,
        clip=ClipGradNorm(loaded.optim.clip_norm),
        ema=ModelEma(student, train.ema_decay) if train.ema_decay else NoEma(),
        graph=graph,
    )


def batch_of(loaded: recipe.Recipe, classes: int) -> Batch:
    """Return a batch as the loader's: uint8 images [B, 3, H, W] in channels_last order, labels, ids and stored rows."""
    count, px = loaded.train.batch_size, loaded.data.input_px or 32
    files = view_files(format_of(loaded, classes), 0) if loaded.teacher else ()
    return Batch(
        torch.zeros(count, px, px, 3, dtype=torch.uint8).pin_memory().permute(0, 3, 1, 2),
        torch.zeros(count, dtype=torch.int64).pin_memory(),
        torch.arange(count).pin_memory(),
        count,
        tuple(torch.from_numpy(np.zeros((count, width), dtype)).pin_memory() for _, dtype, width in files),
    )


def kernels() -> dict[str, list[str]]:
    """Return the targets of the Triton kernels in the cache: those of their PTX."""
    found: dict[str, list[str]] = {}
    for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.ptx"):
        for target in re.findall(r"^\.target (\w+)", path.read_text(), re.MULTILINE):
            found.setdefault(target, []).append(path.stem)
    return found


def main(path: str, *overrides: str) -> None:
    """Run steps, and print what each of the second half has cost."""
    loaded = recipe.load(path, overrides)
    classes = next((count for name, count in CLASSES.items() if Path(path).stem.startswith(name)), 10)
    state, batch = state_of(loaded, classes), batch_of(loaded, classes)
    marks: list[tuple[Counts, float]] = []

    def marked() -> Iterator[Batch]:
        for _ in range(STEPS):
            marks.append((Counts.now(), time.perf_counter()))
            yield batch

    train_epoch(state, marked(), None, np.full(STEPS, 0.125), log_every_steps=10**6, on_log=lambda *noted: None)
    pairs = list(zip(marks[STEPS // 2 :], marks[STEPS // 2 + 1 :], strict=False))
    counts = [after[0].since(before[0]) for before, after in pairs]
    costs = {key: sorted({getattr(one, key) for one in counts}) for key in Counts._fields}
    host_us = 1e6 * float(np.median([after[1] - before[1] for before, after in pairs]))
    compiled = {target: len(names) for target, names in kernels().items()} if state.runtime.compile else {}
    print(json.dumps({**costs, "host_us": round(host_us, 1), "graph": state.graph.active, "kernels": compiled}))


if __name__ == "__main__":
    main(*sys.argv[1:])
