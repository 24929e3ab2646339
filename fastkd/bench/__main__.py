"""``python -m fastkd.bench NAME …``: benchmarks to run on your machine."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastkd import cli, console, recipe
from fastkd.bench import busy_note, machine_line


class Reference(StrEnum):
    """How far the reference implementation is trained."""

    NONE = "none"
    MEASURE = "measure"
    FULL = "full"


def savings(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per column.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where runs, savings.json and savings.png go.")] = None,
    reference: Annotated[
        Reference,
        typer.Option(
            help="The reference implementation: omitted, timed for some steps and extrapolated, or trained completely."
        ),
    ] = Reference.MEASURE,
    breakdown: Annotated[
        bool, typer.Option(help="Also time one change at a time, from the reference to the recipe.")
    ] = True,
) -> cli.CommandResult:
    """Train the recipe's student and, in the same loop, vanilla KD's and the baselines'; print what each cost.

    Beside them stands how the field's reference code does it: torch's loader, float32, a live teacher.

    JSON: the contents of savings.json.

    Example: python -m fastkd.bench savings recipes/quickstart.yaml --seeds 3
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import savings as benchmark

    out = out or Path(resolved.train.runs_dir) / f"savings-{resolved.name}"
    report = benchmark.measure(
        resolved, out, seeds=seeds, source=Path(path), reference=reference.value, breakdown=breakdown
    )
    console.show(benchmark.table(report))
    if breakdown:
        from fastkd.bench.breakdown import table as breakdown_table

        console.show(breakdown_table(report["breakdown"]))
    teacher = report["teacher_training_s"]
    if teacher is not None:
        console.say(
            f"outside the table: training the teacher took {teacher:.1f} s (top-1 {report['teacher_top1']:.2%})"
        )
    console.say(
        f"outside the table: filling the compilers' caches took {report['cold_compile_s']:.1f} s, once per machine"
    )
    env = report["environment"]
    console.say(f"machine: {machine_line(env['machine'], env['gpu'])}, {env['precision']}")
    console.say(report["conclusion"])
    return cli.CommandResult(f"written: {out / 'savings.json'}, {out / 'savings.png'}", report)


def loader(
    out: Annotated[Path, typer.Option(help="Where loader.json and loader.png go.")] = Path("runs/bench-loader"),
    data: Annotated[
        Path | None, typer.Option(help="Directory of the data sets, reused if they exist. Default: temporary.")
    ] = None,
    small: Annotated[int, typer.Option(help="Number of images of 32×32.")] = 20_000,
    photos: Annotated[int, typer.Option(help="Number of JPEGs of ImageNet's sizes.")] = 600,
    repeats: Annotated[int, typer.Option(min=1, help="Timed epochs per pipeline, after one that is not.")] = 5,
    workers: Annotated[
        list[int] | None, typer.Option(help="Number of loader threads; repeatable. Default: 1, and one per core.")
    ] = None,
) -> cli.CommandResult:
    """Load the same images by fastkd's pipeline, FFCV's own and torch's DataLoader, on files and on arrays.

    Prints images/s, with views and without. Takes some minutes: the slowest pipeline goes through all images as well.

    JSON: the contents of loader.json.

    Example: python -m fastkd.bench loader --data data/bench
    """
    from fastkd.bench import loader as benchmark

    report = benchmark.measure(out, data=data, small=small, photos=photos, repeats=repeats, workers=workers or ())
    console.show(benchmark.table(report))
    console.say(f"machine: {benchmark.machine_line(report)}")
    return cli.CommandResult(f"written: {out / 'loader.json'}, {out / 'loader.png'}", report)


def cold(
    out: Annotated[Path, typer.Option(help="Where cold.json goes.")] = Path("runs/bench-cold"),
    data: Annotated[
        Path | None,
        typer.Option(help="Directory of the data sets, on a disk, reused if there. Default: temporary."),
    ] = None,
    small: Annotated[int, typer.Option(help="Number of images of 32×32.")] = 60_000,
    photos: Annotated[int, typer.Option(help="Number of JPEGs of ImageNet's sizes.")] = 1000,
) -> cli.CommandResult:
    """Tell what an epoch reads from the disk when nothing is in memory: all samples, half of them, an export of these.

    The page cache is emptied of the data before each epoch, as it is where data are larger than memory.

    JSON: the contents of cold.json.

    Example: python -m fastkd.bench cold --data data/bench
    """
    from fastkd.bench import cold as benchmark

    report = benchmark.measure(out, data=data, small=small, photos=photos)
    console.show(benchmark.table(report))
    console.say(
        "read: from the disk, by this process; in memory: after the epoch; in vain: pages without a byte of the "
        f"samples. The disk's read_ahead_kb is {report['read_ahead_kb'] or 'unknown'}"
    )
    console.say(f"machine: {machine_line(report['machine'], None)}")
    return cli.CommandResult(f"written: {out / 'cold.json'}", report)


def step(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Further batch sizes; default: half, twice, four times the recipe's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each way is timed, in turn.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Where step.json goes.")] = None,
) -> cli.CommandResult:
    """Time the student's step and the teacher's forward pass in each precision and layout; say which to use here.

    JSON: what step.json holds.

    Example: python -m fastkd.bench step recipes/quickstart.yaml
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import step as benchmark

    out = out or Path(resolved.train.runs_dir) / f"step-{resolved.name}"
    report = benchmark.measure(resolved, out, batch_sizes=batch_size or (), repeats=repeats)
    console.show(benchmark.table(report))
    for sentence in report["advice"]:
        console.say(sentence)
    console.say(f"machine: {machine_line(report['machine'], report['gpu'])}, {report['threads']} threads")
    return cli.CommandResult(f"written: {out / 'step.json'}, {out / 'step.png'}", report)


def plan(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each rate is measured, in turn.")] = 3,
    gpus: Annotated[int, typer.Option(min=1, help="Predict for so many devices a node.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="And so many nodes.")] = 1,
    node_gb_s: Annotated[
        float, typer.Option(min=0.001, help="GB/s from device to device in a node, each way: an H100's NVLink.")
    ] = 450.0,
    network_gb_s: Annotated[
        float, typer.Option(min=0.001, help="GB/s from a device to other nodes: 400 Gb/s InfiniBand.")
    ] = 50.0,
    cores_per_gpu: Annotated[int, typer.Option(min=1, help="Loader threads a device: as in a DGX H100.")] = 14,
    out: Annotated[Path | None, typer.Option(help="Where plan.json goes.")] = None,
) -> cli.CommandResult:
    """Measure for a minute and predict what vanilla KD and the recipe would take, at other keep ratios and views too.

    For several devices, one is measured here at its share of the batch, and an all-reduce added that nothing hides:
    an upper bound, by arithmetic that has never been checked on GPUs.

    JSON: what plan.json holds.

    Example: python -m fastkd.bench plan recipes/rn50_r18.yaml --gpus 8 --nodes 2
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import plan as benchmark
    from fastkd.bench.scaling import Cluster

    cluster = Cluster(gpus, nodes, node_gb_s, network_gb_s, cores_per_gpu) if gpus * nodes > 1 else None
    out = out or benchmark.out_of(resolved, cluster)
    report = benchmark.measure(resolved, out, repeats=repeats, cluster=cluster)
    console.show(benchmark.table(report))
    rates = report["measured"]
    if several := report["cluster"]:
        one = several["one_device"]
        console.say(
            f"measured here, at a device's {several['local_batch']} images of each batch, images/s: student "
            f"{one['step']:,.0f}, with a live teacher {one['vanilla_step']:,.0f}; teacher scoring {one['score']:,.0f}, "
            f"labelling {one['label']:,.0f}"
        )
        console.say(
            f"predicted of all {gpus * nodes}: student {rates['step']:,.0f}, {rates['step'] / one['step']:.1f} times "
            f"one. To add up {several['gradient_bytes'] / 1e6:,.1f} MB of gradients takes "
            f"{1e3 * several['all_reduce_s']:.2f} ms of a step, as if the backward pass hid none of it: an upper "
            "bound. Never checked on GPUs"
        )
        console.say(several["loading"])
    else:
        console.say(
            f"measured, images/s: student {rates['step']:,.0f}, with a live teacher {rates['vanilla_step']:,.0f}; "
            f"teacher scoring {rates['score']:,.0f}, labelling {rates['label']:,.0f}; "
            f"evaluating {rates['evaluate']:,.0f}"
        )
        console.say(f"the limit is {report['limit']}")
    console.say(
        f"outside the table: training the teacher. Each row pays for {report['sizes']['epochs']} epochs; "
        "the recipe's precision, batch and loader"
    )
    console.say(f"machine: {machine_line(report['machine'], report['gpu'])}, {report['precision']}")
    return cli.CommandResult(f"written: {out / 'plan.json'}, {out / 'plan.png'}", report)


def scale(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    processes: Annotated[
        list[int] | None, typer.Option(help="How many processes; may be repeated. Default: 1, 2, 4 … one per device.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How many segments of 2 s each number has in a round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="How often each number has its turn.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where scale.json and scale.png go.")] = None,
) -> cli.CommandResult:
    """Train by more and more processes, as torchrun starts them; print images/s, stall and efficiency.

    JSON: what scale.json holds.

    Example: python -m fastkd.bench scale recipes/quickstart.yaml --processes 1 --processes 2
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import scale as benchmark

    out = out or Path(resolved.train.runs_dir) / f"scale-{resolved.name}"
    report = benchmark.measure(path, overrides or (), out, processes=processes or (), repeats=repeats, rounds=rounds)
    console.show(benchmark.table(report))
    console.say(
        f"each step averages {report['gradient_bytes'] / 1e6:,.1f} MB of gradients over the processes; efficiency: "
        "images/s over those of the fewest processes, for each process"
    )
    console.say(
        f"machine: {machine_line(report['machine'], report['gpu'])}, {report['precision']}; "
        f"torch threads a process: {report['threads']}"
    )
    return cli.CommandResult(f"written: {out / 'scale.json'}, {out / 'scale.png'}", report)


def labels(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Changes to the recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where labels.json goes.")] = None,
) -> cli.CommandResult:
    """Print what each way to store the teacher's logits takes on disk, and what it changes in the KD loss.

    JSON: what labels.json holds.

    Example: python -m fastkd.bench labels recipes/quickstart.yaml
    """
    resolved = recipe.load(path, overrides or ())
    from fastkd.bench import labels as benchmark

    out = out or Path(resolved.train.runs_dir) / f"labels-{resolved.name}"
    report = benchmark.measure(resolved, out)
    console.show(benchmark.table(report))
    console.say(
        f"{report['rows']:,} kept rows, against float32; the loss without its weight alpha. At the start: for a "
        f"student that gives all classes alike, whose loss is {report['loss_start']:.2f}; at the end: for one that "
        "gives the teacher's own softmax. Gradient: the share of a student's first one."
    )
    return cli.CommandResult(f"written: {out / 'labels.json'}", report)


def prune(
    out: Annotated[Path, typer.Option(help="Where prune.json goes.")] = Path("runs/bench-prune"),
    data: Annotated[Path | None, typer.Option(help="Keep the logits here, or find them; default: made anew.")] = None,
    samples: Annotated[int, typer.Option(help="How many rows of logits.")] = 100_000,
    classes: Annotated[int, typer.Option(help="How many logits a row.")] = 1000,
    dtype: Annotated[str, typer.Option(help="How they are stored: float16 or float32.")] = "float16",
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed, after two runs that are not.")] = 7,
) -> cli.CommandResult:
    """Score and select from logits on disk by fastkd, by torch and as the reference does; print times and memory.

    JSON: what prune.json holds.

    Example: python -m fastkd.bench prune --samples 1281167
    """
    from fastkd.bench import prune as benchmark

    report = benchmark.measure(out, data=data, samples=samples, classes=classes, dtype=dtype, repeats=repeats)
    console.show(benchmark.table(report))
    console.show(benchmark.growth_table(report))
    looped, cpu, versions = report["reference"], report["machine"], report["versions"]
    console.say(
        f"medium, proportional, keep {report['keep_ratio']}; from the page cache; memory: what a run holds at most "
        f"beyond that. fastkd gives six scores, torch two of them; both keep the same samples but for "
        f"{1 - report['kept_in_common']:.2%}"
    )
    console.say(
        f"the reference loop, without its scoring: measured {looped['seconds'][-1]:.2f} s for "
        f"{looped['samples'][-1]:,} samples, time growing with their number to the power of {looped['growth']:.2f}; "
        f"extrapolated as linear to {report['samples']:,}"
    )
    libraries = f"numba {versions['numba']}, torch {versions['torch']}"
    console.say(f"machine: {cpu['cpu']}, {cpu['cores']} cores{busy_note(cpu)}, {libraries}")
    return cli.CommandResult(f"written: {out / 'prune.json'}", report)


def synthetic(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of photos: a new one.")],
    count: Annotated[int, typer.Option(help="How many photos to train on, 0.11 MB each.")] = 5000,
    val: Annotated[int, typer.Option(help="How many to evaluate on.")] = 500,
    classes: Annotated[int, typer.Option(help="How many classes.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="What the photos are drawn from.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="How many photos are drawn at a time; 0: one per core.")] = 0,
) -> cli.CommandResult:
    """Write textured JPEGs as large as ImageNet's into OUT/train and OUT/val: photos for any bench, from nowhere.

    JSON keys: path, train, val, classes.

    Example: python -m fastkd.bench synthetic data/photos --count 10000 --classes 100
    """
    from fastkd.bench import synthetic as benchmark

    benchmark.make(out, count, val=val, classes=classes, seed=seed, threads=threads)
    root, dataset = shlex.quote(str(out)), shlex.quote(f"{out}-dataset")
    console.say(f"as a data set: python -m fastkd.write image_folder {dataset} root={root}")
    return cli.CommandResult(
        f"written: {out}, {count:,} train and {val:,} val photos of {classes} classes",
        {"path": str(out), "train": count, "val": val, "classes": classes},
    )


if __name__ == "__main__":
    cli.run(savings, plan, step, scale, loader, cold, labels, prune, synthetic, named=True)
