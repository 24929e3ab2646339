"""Writing .beton files in supervised processes.

FFCV's own writer hangs if a sample raises, a worker is killed or the disk is full; it leaves a segment in /dev/shm, and
an incomplete file loads without an error. Here the caller (`write_betons`) supervises one child process, which forks
workers.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data import isolated_process
from fastkd.data.ffcv_format import STORED
from fastkd.data.indexing import indexing_reported
from fastkd.data.isolated_process import Report
from fastkd.data.notices import MAX_NAMES, Found, in_lines, listed
from fastkd.data.split_writer import Split, SplitJob, UnreadableError, found_in_both, found_two_labels, write_split
from fastkd.data.writer_api import MapDataset, Writer, WriterOptions, load_writer
from fastkd.errors import FastkdError, InputError

SPLITS = ("train", "val")
Progress = Callable[..., None]
"""``progress(split, done, total)``; with `info`, a text, if an image takes long; while a source is indexed,
``progress("index", done, total, info, unit)``."""
MAX_UNREADABLE = 100
"""Number of unreadable samples that an error lists."""
MIN_STD = 1e-3
"""A channel with a smaller standard deviation (a quarter of one of 256 levels) counts as constant."""


@dataclass(frozen=True)
class Written:
    """The result of `write_betons`.

    Attributes
    ----------
    found : list of Found
        Notices about the images of all splits, and about images that occur in both.
    """

    classes: list[str]
    splits: dict[str, Split]
    found: list[Found]

    @property
    def std(self) -> list[float]:
        """The standard deviations to normalise by: 1 for a constant channel, whose pixels become about 0."""
        return usable_std(self.splits["train"].std)

    @property
    def warnings(self) -> list[str]:
        """One warning per kind of notice, with the number of images and up to five names."""
        texts = []
        skipped = [one for split in self.splits.values() for one in split.skipped]
        if skipped:
            names = [f"{one['split']} {one['description'] or one['index']}: {one['reason']}" for one in skipped]
            counts = " and ".join(f"{len(split.skipped):,} of {name}" for name, split in self.splits.items())
            texts.append(f"left out {counts}, which cannot be read (on_error=skip): {listed(names, len(names))}")
        texts += [found.warning for found in self.found if not found.quiet]
        constant = [
            channel
            for channel, std in zip(("red", "green", "blue"), self.splits["train"].std, strict=True)
            if std < MIN_STD
        ]
        if constant:
            texts.append(
                f"{', '.join(constant)}: constant or nearly so over all of train. The standard deviation is recorded "
                "as 1, so that normalised pixels are about 0; inspect the images"
            )
        return texts

    @property
    def notes(self) -> list[str]:
        """One line per kind of notice that is no warning."""
        return [found.warning for found in self.found if found.quiet]


def usable_std(std: Sequence[float]) -> list[float]:
    """Return the standard deviations for normalisation: 1 for a constant channel."""
    return [float(value) if value >= MIN_STD else 1.0 for value in std]


def write_betons(writer: Writer, options: WriterOptions, directory: Path, progress: Progress | None = None) -> Written:
    """Write ``train.beton`` and ``val.beton`` of a writer's source into `directory`.

    The files are written in a separate process. The caller does not hang and leaves no files behind if that process
    or a worker fails, or the disk is full.

    Raises
    ------
    InputError
        The source is missing or invalid: a corrupt image, a wrong label, a class without samples ….
    FastkdError
        The disk is full, a process was killed, reading a sample did not end, or the writer raised another error.
    """
    request = (writer.name, options.model_dump(mode="json"), str(directory))
    try:
        return isolated_process.call(
            "the writing process",
            "fastkd.data.beton_writer:write_here",
            request,
            lambda report: progress(*report) if progress else None,
        )
    except BaseException:
        for split in SPLITS:
            (directory / f"{split}.beton").unlink(missing_ok=True)
        raise


def write_here(request: tuple[str, dict[str, Any], str], report: Report) -> Written:
    """Read the source and write its splits, in this process and in workers forked from it.

    Parameters
    ----------
    request
        Name of the writer, its options, and the output directory.
    report
        Called with the arguments of a `Progress`.
    """
    name, values, directory = request
    writer = load_writer(name)
    options = writer.options(values)
    try:
        with indexing_reported(lambda *index: report(index)):
            source = writer.read(options)
    except FastkdError:
        raise
    except BaseException as error:
        raise FastkdError(f"writer {name}: read() failed: {isolated_process.describe_error(error)[1]}") from error
    datasets, classes = _check_source(name, source)
    jobs: dict[str, SplitJob] = {}
    splits: dict[str, Split] = {}
    unreadable: list[str] = []
    for split in SPLITS:
        file = Path(directory) / f"{split}.beton"
        try:
            jobs[split], splits[split] = write_split(file, split, datasets[split], len(classes), options, report)
        except UnreadableError as error:
            unreadable += error.samples
            continue
        if split == "train":
            _refuse_empty(name, classes, splits[split])
    if unreadable:
        raise InputError(_unreadable_text(unreadable, sum(len(datasets[split]) for split in SPLITS)))
    digests = {split: job.records["digest"].copy().view("V16").reshape(-1) for split, job in jobs.items()}
    in_both = (jobs["val"].records["state"] == STORED) & np.isin(digests["val"], digests["train"])
    found = _merged([one for split in splits.values() for one in split.found])
    found += _merged([one for job in jobs.values() for one in found_two_labels(job, classes)])
    return Written(classes, splits, found + found_in_both(jobs["val"], in_both))


def _refuse_empty(name: str, classes: list[str], train: Split) -> None:
    """Refuse classes without a sample to train on."""
    if not (empty := [classes[k] for k, n in enumerate(train.class_counts) if n == 0]):
        return
    left_out = len(train.skipped)
    hint = f" ({left_out:,} samples of train were left out, as they cannot be read)" if left_out else ""
    raise InputError(
        f"writer {name}: no sample in train of {listed([repr(one) for one in empty], len(empty))}: "
        f"every class needs at least one{hint}; leave such classes out of the class names"
    )


def _unreadable_text(samples: Sequence[str], total: int) -> str:
    """Return the message that lists the samples that cannot be read."""
    if len(samples) == 1:
        return f"{samples[0]}; replace or delete it, or leave such samples out with on_error=skip"
    return (
        f"{len(samples):,} of {total:,} images cannot be read; replace or delete them, "
        f"or leave such samples out with on_error=skip:{in_lines(samples, MAX_UNREADABLE)}"
    )


def _check_source(name: str, source: Any) -> tuple[Mapping[str, MapDataset], list[str]]:
    def wrong(what: str) -> InputError:
        return InputError(f"writer {name}: read() returned {what}")

    if not (isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping)):
        raise wrong(f"{type(source).__name__}; expected ({{'train': …, 'val': …}}, class names)")
    datasets, classes = source[0], list(source[1])
    if unknown := [str(s) for s in datasets if s not in SPLITS]:
        raise wrong(f"the unknown split {', '.join(map(repr, unknown))}; the splits are 'train' and 'val'")
    for split in SPLITS:
        if split not in datasets:
            raise wrong(f"no split {split!r}; both 'train' and 'val' are needed")
        if not isinstance(datasets[split], MapDataset):
            raise wrong(f"a {split!r} of type {type(datasets[split]).__name__}, without __len__ and __getitem__")
        if len(datasets[split]) == 0:
            raise wrong(f"an empty split {split!r}")
    return datasets, check_classes(name, classes)


def check_classes(name: str, classes: Sequence[Any]) -> list[str]:
    """Validate class names.

    Parameters
    ----------
    name
        Name of the writer.
    classes
        At least two strings of valid Unicode, not blank, without control characters and line breaks. No two may differ
        only in surrounding whitespace or in the composition of accents.
    """

    def wrong(what: str) -> InputError:
        return InputError(f"writer {name}: read() returned the class names {shown}: {what}")

    shown = f"[{listed([ascii(c) if isinstance(c, str) else repr(c)[:80] for c in classes[:5]], len(classes))}]"
    if len(classes) < 2:
        raise wrong("expected at least two")
    seen: dict[str, str] = {}
    for c in classes:
        if not isinstance(c, str):
            raise wrong(f"{repr(c)[:80]} is of type {type(c).__name__}; expected each to be a str")
        if not c.strip():
            raise wrong(f"{c!r} is empty; give each class a name")
        bad = next((x for x in c if unicodedata.category(x) in ("Cc", "Cs", "Zl", "Zp")), None)
        if bad is not None:
            invalid = unicodedata.category(bad) == "Cs"
            what = "not valid Unicode (a byte that is not UTF-8?)" if invalid else "a control character or line break"
            raise wrong(f"{bad!a} in {c!a} is {what}; rename the class")
        look = unicodedata.normalize("NFC", c.strip())
        if look in seen:
            raise wrong(f"{seen[look]!a} and {c!a} look the same; expected all different")
        seen[look] = c
    return [str(c) for c in classes]


def _merged(found: Sequence[Found]) -> list[Found]:
    """Merge the notices of each kind over the splits, in the order of the kinds."""
    merged: dict[str, Found] = {}
    for one in found:
        if one.kind in merged:
            before = merged[one.kind]
            names = (before.names + one.names)[:MAX_NAMES]
            one = replace(one, counts=before.counts | one.counts, names=names)
        merged[one.kind] = one
    return list(merged.values())
