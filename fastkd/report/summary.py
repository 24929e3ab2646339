"""The head of a report: title, figures and conclusions, of one variant or of several that are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastkd.console import clock
from fastkd.report.runs import Group, RunFacts, Stat, noise_points


class Tile(NamedTuple):
    """A figure at the head of the page, with its unit or spread, and what it is."""

    figure: str
    unit: str
    label: str


@dataclass(frozen=True)
class Summary:
    """What stands above the sections of a page.

    Attributes
    ----------
    networks
        Names of teacher and student, where all groups share them; a teacher of None was not used.
    """

    title: str
    networks: tuple[str | None, str] | None
    tiles: list[Tile]
    conclusions: list[str]


def summarised(groups: Sequence[Group], teacher_top1: float | None = None) -> Summary:
    """Summarise one group, or compare several.

    Parameters
    ----------
    teacher_top1
        The top-1 on val of the teacher of all groups (0…1). None: unknown, or they have several.
    """
    names = list(dict.fromkeys(str(group.first_run.resolved["name"]) for group in groups))
    networks = list(dict.fromkeys(_networks(group.first_run) for group in groups))
    shared = networks[0] if len(networks) == 1 else None
    if len(groups) == 1:
        title, tiles, conclusions = groups[0].title, _tiles_of(groups[0], teacher_top1), []
    else:
        title = (
            " compared with ".join(group.title for group in groups) if len(groups) == 2 else f"{len(groups)} variants"
        )
        tiles, conclusions = _tiles_compared(groups, teacher_top1), _conclusions(groups)
    return Summary(f"{', '.join(names)}: {title}", shared, tiles, conclusions)


def _networks(run: RunFacts) -> tuple[str | None, str]:
    teacher, student = run.resolved["teacher"], str(run.resolved["student"]["model"])
    if not teacher:
        return None, student
    recorded = run.artifact.manifest.inputs.get("teacher", {})
    return str(recorded.get("model") or teacher["model"] or "a teacher"), student


def _top1(group: Group, label: str) -> Tile:
    figure, unit = percent(group.top1).split(" ", 1)
    return Tile(figure, unit, label)


def _tiles_of(group: Group, teacher_top1: float | None) -> list[Tile]:
    """Return the figures of one group."""
    seeds = f", mean ± std of {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    speed = Tile(f"{group.images_per_s.mean:,.0f}", "", "images/s while training")
    top1 = _top1(group, f"top-1 on val{seeds}{_teacher(teacher_top1)}")
    if not group.first_run.resolved["teacher"]:
        writing = ", including writing the data set" if group.first_s.mean > group.further_s.mean else ""
        return [top1, Tile(clock(group.first_s.mean), "", f"wall time{writing}"), speed]
    return [
        top1,
        Tile(clock(group.further_s.mean), _around(group.further_s), "each additional student"),
        Tile(clock(group.first_s.mean), _around(group.first_s), "the first student"),
        speed,
    ]


def _tiles_compared(groups: Sequence[Group], teacher_top1: float | None) -> list[Tile]:
    """Return the best figure of several groups in each respect, and who has it."""
    best, *_, worst = by_top1(groups)
    gap = 100 * (best.top1.mean - worst.top1.mean)
    tiles = [
        _top1(best, f"highest top-1 on val: {best.title}{_teacher(teacher_top1)}"),
        Tile(f"{gap:.2f}", "points", f"between the highest and the lowest top-1: {worst.title}"),
    ]
    if len({str(group.first_run.machine) for group in groups}) > 1:
        return tiles
    for name, label in (("further_s", "an additional student"), ("first_s", "the first student")):
        fastest = min(groups, key=lambda group: getattr(group, name).mean)
        time: Stat = getattr(fastest, name)
        tiles.append(Tile(clock(time.mean), _around(time), f"shortest time of {label}: {fastest.title}"))
    return tiles


def _conclusions(groups: Sequence[Group]) -> list[str]:
    """Return what the comparison says: who is most accurate, and what the best variant costs beside vanilla KD."""
    noise = noise_points(groups)
    best, second, *_ = by_top1(groups)
    gap = 100 * (best.top1.mean - second.top1.mean)
    least = f"differences below {noise:.1f} points are noise"
    found = [
        f"The top-1 of {best.title} is the highest, {gap:.2f} points above {second.title}; {least}."
        if gap >= noise
        else f"The top-1 of {best.title} is the highest, but {second.title} is only {gap:.2f} points below: {least}."
    ]
    other = next((group for group in by_top1(groups) if not group.is_vanilla), best)
    vanilla = next((group for group in groups if group.is_baseline_of(other)), None)
    if compared := conclusion(other, vanilla):
        found.append(compared)
    if any(len(group.runs) == 1 for group in groups):
        found.append("One seed is not enough to compare accuracies.")
    return found


def conclusion(subject: Group, vanilla: Group | None) -> str:
    """Return how a group compares with vanilla KD; empty if there is no comparable run of it."""
    if vanilla is None or vanilla is subject:
        return ""
    gap = 100 * (subject.top1.mean - vanilla.top1.mean)
    points = f"{gap:+.2f}".replace("-", "−")
    if subject.first_run.machine != vanilla.first_run.machine:
        return (
            "Times are not compared: vanilla KD ran on another machine or in another precision. The top-1 of "
            f"{subject.title} differs from its by {points} points."
        )
    additional, first = (getattr(subject, n).mean / getattr(vanilla, n).mean for n in ("further_s", "first_s"))
    return (
        f"Relative to vanilla KD, an additional student of {subject.title} takes {additional:.2f} of the time "
        f"({1 / additional:.1f}×), the first student, with all stages before it, {first:.2f} ({1 / first:.1f}×), and "
        f"its top-1 differs by {points} points."
    )


def by_top1(groups: Sequence[Group]) -> list[Group]:
    """Sort groups by their top-1, the highest first."""
    return sorted(groups, key=lambda group: -group.top1.mean)


def busy_note(groups: Sequence[Group]) -> str:
    """Name the runs that started on a busy machine; empty if there are none."""
    busy = [run for group in groups for run in group.runs if run.timing.get("busy")]
    if not busy:
        return ""
    named = ", ".join(f"{run.path.name} (load {run.timing.get('load_at_start', '?')})" for run in busy[:5])
    more = f" and {len(busy) - 5} more" if len(busy) > 5 else ""
    return (
        f"The machine was busy when {named}{more} started, with a load above its number of cores: times are too long."
    )


def percent(stat: Stat) -> str:
    """Format an accuracy in percent: 88.35 %, or 88.35 ± 0.12 % for several seeds."""
    return f"{100 * stat.mean:.2f}" + (f" ± {100 * stat.std:.2f}" if stat.std is not None else "") + " %"


def spread(stat: Stat, form: str = "{:.1f}", scale: float = 1.0) -> str:
    """Format mean ± standard deviation."""
    return form.format(scale * stat.mean) + (f" ± {form.format(scale * stat.std)}" if stat.std is not None else "")


def _around(stat: Stat) -> str:
    return f"± {clock(stat.std)}" if stat.std is not None else ""


def _teacher(top1: float | None) -> str:
    return "" if top1 is None else f"; the teacher has {100 * top1:.2f} %"
