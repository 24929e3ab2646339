"""``python -m fastkd.bench NAME …``: benchmarks to run on your machine."""

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastkd import cli, console, recipe

if TYPE_CHECKING:
    from rich.table import Table

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")]
DataFolder = Annotated[
    Path | None, typer.Option(help="Folder of the data sets, reused if they exist. Default: temporary.")
]


class Reference(StrEnum):
    """How much of the reference implementation is run."""

    NONE = "none"
    MEASURE = "measure"
    FULL = "full"


def savings(
    path: RecipePath,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per variant.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the RUNs, savings.json and savings.png. Default: savings-NAME in train.runs_dir."),
    ] = None,
    reference: Annotated[
        Reference,
        typer.Option(
            help="The reference implementation: omitted, timed for some steps and extrapolated, or trained completely."
        ),
    ] = Reference.MEASURE,
    breakdown: Annotated[
        bool, typer.Option(help="Also time one change at a time, from the reference implementation to the recipe.")
    ] = True,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="timm|PATH",
            help="Also time another project's loop: timm's, or that of a checkout of MDSLR's code, which is imported "
            "and run. Repeatable.",
        ),
    ] = None,
) -> cli.CommandResult:
    """Train the recipe, vanilla KD and baselines in the same loop; print time and accuracy of each.

    The baselines are random selection, and all data for as many steps. The reference implementation uses torch's
    DataLoader and float32, and runs the teacher at every step.

    JSON: the contents of savings.json.

    Example: python -m fastkd.bench savings recipes/quickstart.yaml --seeds 3
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import savings as benchmark
    from fastkd.bench.breakdown import table as breakdown_table
    from fastkd.bench.savings_report import notes, table

    out = out or _default_folder("savings", resolved)
    report = benchmark.measure(
        resolved,
        out,
        seeds=seeds,
        source=Path(path),
        reference=reference.value,
        breakdown=breakdown,
        peers=peer or (),
    )
    tables = [table(report), *([breakdown_table(report["breakdown"])] if breakdown else [])]
    return _result(report, tables, notes(report), out / "savings.json", out / "savings.png")


def plan(
    path: RecipePath,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of interleaved measurements of each rate.")] = 3,
    gpus: Annotated[int, typer.Option(min=1, help="Number of devices per node to predict for.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes to predict for.")] = 1,
    node_gb_s: Annotated[
        float,
        typer.Option(min=0.001, help="GB/s between two devices of a node, per direction (NVLink of an H100: 450)."),
    ] = 450.0,
    network_gb_s: Annotated[
        float, typer.Option(min=0.001, help="GB/s from a device to other nodes (InfiniBand with 400 Gb/s: 50).")
    ] = 50.0,
    cores_per_gpu: Annotated[
        int, typer.Option(min=1, help="Loader threads per device (cores of a DGX H100: 14).")
    ] = 14,
    out: Annotated[
        Path | None, typer.Option(help="Folder of plan.json and plan.png. Default: plan-NAME in train.runs_dir.")
    ] = None,
) -> cli.CommandResult:
    """Predict the time of vanilla KD and of the recipe, also at other keep ratios and numbers of views.

    Measures rates for about a minute, after compiling, and prints how long that takes; nothing is trained. For several
    devices, one step is measured here at the batch size of one device, and the time of an all-reduce that does not
    overlap with it is added: an upper bound, computed and never checked on GPUs.

    JSON: the contents of plan.json.

    Example: python -m fastkd.bench plan recipes/rn50_r18.yaml --gpus 8 --nodes 2
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import plan as benchmark
    from fastkd.bench.scaling import Cluster

    cluster = Cluster(gpus, nodes, node_gb_s, network_gb_s, cores_per_gpu) if gpus * nodes > 1 else None
    out = out or benchmark.default_folder(resolved, cluster)
    report = benchmark.measure(resolved, out, repeats=repeats, cluster=cluster)
    return _result(report, [benchmark.table(report)], benchmark.notes(report), out / "plan.json", out / "plan.png")


def step(
    path: RecipePath,
    overrides: Overrides = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Other batch sizes; repeatable. Default: half, twice and four times the recipe's."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of interleaved measurements of each variant.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder of step.json and step.png. Default: step-NAME in train.runs_dir.")
    ] = None,
) -> cli.CommandResult:
    """Time the student's step and the teacher's forward pass for each precision and memory format; recommend settings.

    JSON: the contents of step.json.

    Example: python -m fastkd.bench step recipes/quickstart.yaml
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import step as benchmark

    out = out or _default_folder("step", resolved)
    report = benchmark.measure(resolved, out, batch_sizes=batch_size or (), repeats=repeats)
    return _result(report, [benchmark.table(report)], benchmark.notes(report), out / "step.json", out / "step.png")


def scale(
    path: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[
        list[int] | None,
        typer.Option(help="Number of processes; repeatable. Default: 1, 2, 4, 8, at most one per device."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measurements of 2 s per round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds over all numbers of processes.")] = 2,
    out: Annotated[
        Path | None, typer.Option(help="Folder of scale.json and scale.png. Default: scale-NAME in train.runs_dir.")
    ] = None,
) -> cli.CommandResult:
    """Time training with several numbers of processes under torchrun; print images/s, data wait and efficiency.

    JSON: the contents of scale.json.

    Example: python -m fastkd.bench scale recipes/quickstart.yaml --processes 1 --processes 2
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import scale as benchmark

    out = out or _default_folder("scale", resolved)
    report = benchmark.measure(path, overrides or (), out, processes=processes or (), repeats=repeats, rounds=rounds)
    return _result(report, [benchmark.table(report)], benchmark.notes(report), out / "scale.json", out / "scale.png")


def loader(
    out: Annotated[Path, typer.Option(help="Folder of loader.json and loader.png.")] = Path("runs/bench-loader"),
    data: DataFolder = None,
    small: Annotated[int, typer.Option(help="Number of images of 32×32.")] = 20_000,
    photos: Annotated[int, typer.Option(help="Number of JPEGs with ImageNet's sizes.")] = 600,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed epochs per loader, after an untimed one.")] = 5,
    workers: Annotated[
        list[int] | None, typer.Option(help="Number of loader threads; repeatable. Default: 1, and one per core.")
    ] = None,
) -> cli.CommandResult:
    """Time loading the same images with fastkd's loader, FFCV's own and torch's DataLoader, from files and from arrays.

    Prints images/s, with and without augmentation. Takes some minutes.

    JSON: the contents of loader.json.

    Example: python -m fastkd.bench loader --data data/bench
    """
    from fastkd.bench import loader as benchmark

    report = benchmark.measure(out, data=data, small=small, photos=photos, repeats=repeats, workers=workers or ())
    return _result(report, [benchmark.table(report)], benchmark.notes(report), out / "loader.json", out / "loader.png")


def cold(
    out: Annotated[Path, typer.Option(help="Folder of cold.json.")] = Path("runs/bench-cold"),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data sets, on a disk; reused if they exist. Default: temporary."),
    ] = None,
    small: Annotated[int, typer.Option(help="Number of images of 32×32.")] = 60_000,
    photos: Annotated[int, typer.Option(help="Number of JPEGs with ImageNet's sizes.")] = 1000,
) -> cli.CommandResult:
    """Measure the bytes that an epoch reads from the disk with a cold page cache: all samples, half, an exported half.

    The data are dropped from the page cache before each epoch, as if they were larger than memory.

    JSON: the contents of cold.json.

    Example: python -m fastkd.bench cold --data data/bench
    """
    from fastkd.bench import cold as benchmark

    report = benchmark.measure(out, data=data, small=small, photos=photos)
    return _result(report, [benchmark.table(report)], benchmark.notes(report), out / "cold.json")


def labels(
    path: RecipePath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of labels.json. Default: labels-NAME in train.runs_dir.")
    ] = None,
) -> cli.CommandResult:
    """Print the disk space of each format of stored labels, and its error in the KD loss.

    JSON: the contents of labels.json.

    Example: python -m fastkd.bench labels recipes/quickstart.yaml
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import labels as benchmark

    out = out or _default_folder("labels", resolved)
    report = benchmark.measure(resolved, out)
    return _result(report, [benchmark.table(report)], benchmark.notes(report), out / "labels.json")


def prune(
    out: Annotated[Path, typer.Option(help="Folder of prune.json.")] = Path("runs/bench-prune"),
    data: Annotated[
        Path | None, typer.Option(help="Folder of the logits, reused if they exist. Default: temporary.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of rows of logits.")] = 100_000,
    classes: Annotated[int, typer.Option(help="Number of logits per row.")] = 1000,
    dtype: Annotated[str, typer.Option(help="Data type of the logits: float16 or float32.")] = "float16",
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed runs, after two untimed ones.")] = 7,
) -> cli.CommandResult:
    """Time scoring and selecting from stored logits with fastkd, torch and the Python loop of the reference code.

    Also the whole command `fastkd.prune --logits`, with its memory, beside a copy of the rows that it keeps.

    JSON: the contents of prune.json.

    Example: python -m fastkd.bench prune --samples 1281167
    """
    from fastkd.bench import prune as benchmark
    from fastkd.bench.prune_command import command_table

    report = benchmark.measure(out, data=data, samples=samples, classes=classes, dtype=dtype, repeats=repeats)
    tables = [benchmark.table(report), command_table(report), benchmark.growth_table(report)]
    return _result(report, tables, benchmark.notes(report), out / "prune.json")


def synthetic(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the photos; must not exist.")],
    count: Annotated[int, typer.Option(help="Number of training photos, of 0.11 MB each.")] = 5000,
    val: Annotated[int, typer.Option(help="Number of validation photos.")] = 500,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the photos.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Number of threads; 0: one per core.")] = 0,
) -> cli.CommandResult:
    """Generate textured JPEGs with the sizes of ImageNet's in OUT/train and OUT/val, for benchmarks without data.

    JSON keys: path, train, val, classes.

    Example: python -m fastkd.bench synthetic data/photos --count 10000 --classes 100
    """
    from fastkd.bench import synthetic as benchmark

    benchmark.make(out, count, val=val, classes=classes, seed=seed, threads=threads)
    root, dataset = shlex.quote(str(out)), shlex.quote(f"{out}-dataset")
    console.say(f"to make a data set: python -m fastkd.write image_folder {dataset} root={root}")
    return cli.CommandResult(
        f"written: {out}, {count:,} train and {val:,} val photos of {classes} classes",
        {"path": str(out), "train": count, "val": val, "classes": classes},
    )


def gpu(
    out: Annotated[Path, typer.Option(help="Folder of the data, and of gpu.json and gpu.md.")] = Path("runs/bench-gpu"),
    parts: Annotated[str | None, typer.Option(metavar="PART,…", help="Parts to run. Default: all.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run parts that succeeded before again.")] = False,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time of all parts on one GPU; more lets `steps` time more combinations.")
    ] = 20.0,
    device: Annotated[str, typer.Option(help="As train.device.")] = "cuda",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny data and networks, to try all parts; the figures mean nothing.")
    ] = False,
) -> cli.CommandResult:
    """Check what a GPU computes, and measure how fast: the first command to run on a new one.

    The parts, in their order:

    - `data`: write the data sets: Fashion-MNIST (random images if it is not installed) and synthetic photos;
    - `agreement`: batches, teacher logits, stored rows, losses and first steps, compared with the CPU;
    - `feeding`, `teacher`: step, scoring and labelling with their loaders, compared with a batch on the device;
    - `savings`, `savings-large`: ResNet-20 → ResNet-8x4 at 32 px and ResNet-50 → ResNet-18 at 160 px, compared with
      vanilla KD and the reference implementation;
    - `memory`: peak memory, and its growth over epochs;
    - `plan`: the predictions of `bench plan`, compared with these students;
    - `tests`: `pytest -m gpu`, in a clone;
    - `steps`: the step for each precision, memory format, kind of compilation and batch size, until its time is over;
    - `processes`: two processes with NCCL, if there are two GPUs.

    Each part runs in a process of its own, for a limited time. The command continues after a failed part, and then
    exits with 1; when it is run again, only parts that have not succeeded run. Missed goals of speed are not failures.

    JSON: the contents of gpu.json.

    Example: python -m fastkd.bench gpu
    """
    from fastkd.bench.gpu import report as gpu_report
    from fastkd.bench.gpu import run
    from fastkd.errors import FastkdError

    chosen = [name for name in (parts or "").split(",") if name]
    report = run.measure(out, parts=chosen, fresh=fresh, device=device, tiny=tiny, minutes=minutes)
    console.show(gpu_report.table(report))
    for note in gpu_report.notes(report):
        console.say(note)
    error = FastkdError(f"failed: {', '.join(report['failed'])}") if report["failed"] else None
    return cli.CommandResult(f"written: {out / 'gpu.json'}, {out / 'gpu.md'}", report, error)


def _default_folder(name: str, resolved: recipe.Recipe) -> Path:
    return Path(resolved.train.runs_dir) / f"{name}-{resolved.name}"


def _result(report: dict[str, Any], tables: Sequence["Table"], notes: Sequence[str], *files: Path) -> cli.CommandResult:
    """Print tables and notes, and return the command's result."""
    for table in tables:
        console.show(table)
    for note in notes:
        console.say(note)
    return cli.CommandResult(f"written: {', '.join(map(str, files))}", report)


if __name__ == "__main__":
    cli.run(savings, plan, step, scale, loader, cold, labels, prune, synthetic, gpu, named=True)
