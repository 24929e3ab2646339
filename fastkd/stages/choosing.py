"""choose: adopt a selection method by trial trainings of the student (``prune.method: auto``) → CHOICE.

The members are the methods of `fastkd.recipe.tables.AUTO_MEMBERS`; one of them is `FALLBACK`, stratified random.

- Diagnostics, without training: members whose selection has much less of the teacher's entropy than all data, or
  starves a class, are dropped.
- Short trainings, each with its learning rate decayed to the end, of the same seeds for all members. They are ranked by
  their mean top-1 on the hold-out. (The divergence from the teacher is less noisy, but ranks otherwise; see LOG.md.)
- The first of them against the fallback, in trainings of full length with seeds that were not used before. It is
  adopted if the one-sided 95 % confidence bound of its difference in top-1 on the hold-out is above 0.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.table import Table

from fastkd import console
from fastkd.artifacts import Artifact, Built
from fastkd.comparison import Difference
from fastkd.errors import InputError
from fastkd.recipe import Prune, Recipe
from fastkd.recipe.baselines import in_epochs
from fastkd.recipe.tables import AUTO_MEMBERS
from fastkd.stages.distributed_build import build_together, decided_by_main
from fastkd.stages.images import ImageSource
from fastkd.stages.pruning import selection_key_fields
from fastkd.stages.row_scores import chunk_rows, score_chunks
from fastkd.stages.run_files import write_json
from fastkd.stages.selection import Pool, difficulty, select
from fastkd.stages.store import ArtifactStore

FALLBACK = "stratified"
SHORT = 1 / 3
"""Length of short trainings, relative to the recipe's."""
SHORT_SEEDS = range(1_000_000, 1_000_003)
FULL_SEEDS = range(2_000_000, 2_000_020)
LEAST_PAIRS = 3
LEAST_ENTROPY, LEAST_CLASS_SHARE = 0.5, 0.2
"""Smallest mean entropy of the teacher on a selection, and smallest share of a class, relative to all data."""
STUDENTS = "students"

TrainMember = Callable[[Recipe, Path], tuple[Artifact, bool]]
"""Trains the student of a recipe, or finds it, at a path."""


def build_choice(
    store: ArtifactStore,
    images: ImageSource,
    scores: Artifact,
    recipe: Recipe,
    run_fields: Mapping[str, Any],
    train: TrainMember,
) -> tuple[Artifact, bool]:
    """Build or find the CHOICE of a recipe. All processes of a job build it.

    Parameters
    ----------
    run_fields
        Key fields of a RUN of the recipe, without those of its selection. All but the seed determine the CHOICE.
    train
        Trains one student.

    Returns
    -------
    choice, built
        `built` is False if it existed. Facts: `adopted` (name of the member), `prune` (its settings), `trainings`.

    Raises
    ------
    InputError
        ``prune.auto_budget`` is less than the shortest procedure needs.
    """
    fields = {
        **{name: value for name, value in run_fields.items() if name != "seed"},
        "scores": scores.key,
        "view_seed": recipe.labels.view_seed,
        "auto_budget": recipe.prune.auto_budget,
        "members": {name: selection_key_fields(one) for name, one in members(recipe.prune).items()},
    }
    path = store.artifact_path("CHOICE", fields)

    def fill(directory: Path) -> Built:
        return _Trial(recipe, images, scores, train, directory).run()

    return build_together(
        path,
        "CHOICE",
        fields,
        fill,
        parents={"DATASET": images.dataset.key, "SCORES": scores.key},
        settings={"data": str(images.dataset.path.absolute()), "student": recipe.student.model},
        force="choose" in store.force,
        resumable=True,
        scratch=STUDENTS,
        sources=lambda: [scores],
    )


def adopted(recipe: Recipe, choice: Artifact) -> Recipe:
    """Return the recipe with the method that a CHOICE adopts, drawn by the recipe's seed."""
    prune = Prune(**choice.facts["prune"]).model_copy(update={"seed": recipe.prune.seed})
    return recipe.model_copy(update={"prune": prune})


def members(prune: Prune) -> dict[str, Prune]:
    """Return the settings of each member, with the recipe's ratio and quota; without those that do not allow them."""
    common = prune.model_dump(include={"keep_ratio", "quota", "min_per_class", "score"})
    found = {}
    for name, settings in AUTO_MEMBERS.items():
        try:
            found[name] = Prune(**common | settings)
        except ValidationError:  # such as ccs, which cannot keep as many
            continue
    return found


def short_epochs(epochs: int) -> int:
    """Return the number of epochs of a short training."""
    return max(1, round(SHORT * epochs))


def pairs(budget: float, count: int, epochs: int) -> int:
    """Return the number of pairs of full trainings that the budget leaves after short ones of `count` members.

    Raises
    ------
    InputError
        It leaves too few.
    """
    short = count * len(SHORT_SEEDS) * short_epochs(epochs) / epochs
    if (left := int((budget - short) / 2 + 1e-9)) < LEAST_PAIRS:
        raise InputError(
            f"prune.auto_budget={budget:g} trainings: short ones of {count} methods take {short:.1f}, and "
            f"{LEAST_PAIRS} pairs of full length {2 * LEAST_PAIRS}; give {short + 2 * LEAST_PAIRS:.1f} or more"
        )
    return min(left, len(FULL_SEEDS))


def judge(member: Sequence[float], fallback: Sequence[float]) -> tuple[bool, Difference]:
    """Return whether a member is adopted, and its difference to the fallback (top-1 of the same seeds, 0…1)."""
    difference = Difference.of(member, fallback)
    assert difference is not None
    return difference.lower95 > 0, difference


def _log_softmax(z_NK: np.ndarray, temperature: float) -> np.ndarray:
    z_NK = z_NK.astype(np.float64) / temperature
    z_NK -= z_NK.max(axis=1, keepdims=True)
    return z_NK - np.log(np.exp(z_NK).sum(axis=1, keepdims=True))


@dataclass
class _Trial:
    """The trainings of one CHOICE.

    Attributes
    ----------
    directory
        Where the CHOICE is built; the students are in `STUDENTS` until it is published.
    trainings
        Work so far, in trainings of full length.
    earlier_s
        Cost of the students that an interrupted build has trained (s).
    """

    recipe: Recipe
    images: ImageSource
    scores: Artifact
    train: TrainMember
    directory: Path
    trainings: float = 0.0
    earlier_s: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Built:
        """Choose, and write choice.json."""
        found = members(self.recipe.prune)
        count = pairs(self.recipe.prune.auto_budget, len(found), self.recipe.train.epochs)
        console.heading(f"choose: {len(found)} selection methods, compared by training {self.recipe.student.model}")
        self.record = {"fallback": FALLBACK, "members": {name: one.key_fields() for name, one in found.items()}}
        left = self._diagnosed(found)
        finalist = self._finalist({name: found[name] for name in left})
        name = self._compared(finalist, found, count) if finalist != FALLBACK else FALLBACK
        chosen = found[name].model_dump(mode="json", exclude={"seed"}, exclude_defaults=True)
        facts = {"adopted": name, "prune": chosen, "trainings": round(self.trainings, 2)}
        write_json(self.directory / "choice.json", self.record | facts)
        console.say(f"choose: {self._reason(name, finalist)}")
        return Built(facts=facts, earlier_s=self.earlier_s)

    def _diagnosed(self, found: Mapping[str, Prune]) -> list[str]:
        """Return the members that are worth a training, by what they select."""
        diagnostics = decided_by_main(lambda: diagnose(self.scores, self.images, found, self.recipe.loss.temperature))
        dropped = {
            name: one
            for name, one in diagnostics.items()
            if name != FALLBACK and (one["entropy"] < LEAST_ENTROPY or one["least_class_share"] < LEAST_CLASS_SHARE)
        }
        for name, one in dropped.items():
            console.say(
                f"choose: {name} is left out: it keeps {one['entropy']:.0%} of the teacher's entropy, and "
                f"{one['least_class_share']:.0%} of the smallest class, relative to random selection"
            )
        self.record |= {"diagnostics": diagnostics, "dropped": list(dropped)}
        return [name for name in found if name not in dropped]

    def _finalist(self, alive: Mapping[str, Prune]) -> str:
        """Return the member with the highest mean top-1 after short trainings."""
        epochs = short_epochs(self.recipe.train.epochs)
        found = {name: [self._top1(name, prune, seed, epochs) for seed in SHORT_SEEDS] for name, prune in alive.items()}
        self.record["short"] = {"epochs": epochs, "seeds": list(SHORT_SEEDS), "top1": found}
        ranked = sorted(found, key=lambda name: -statistics.mean(found[name]))
        console.show(_table(epochs, {name: found[name] for name in ranked}))
        return ranked[0]

    def _compared(self, finalist: str, found: Mapping[str, Prune], count: int) -> str:
        """Return the finalist if it beats the fallback in full trainings, else the fallback."""
        top1: dict[str, list[float]] = {finalist: [], FALLBACK: []}
        for seed in FULL_SEEDS[:count]:
            for name, reached in top1.items():
                reached.append(self._top1(name, found[name], seed, self.recipe.train.epochs))
        better, difference = judge(top1[finalist], top1[FALLBACK])
        self.record["final"] = {
            "seeds": list(FULL_SEEDS[:count]),
            "top1": top1,
            "difference": difference.mean,
            "lower95": difference.lower95,
        }
        return finalist if better else FALLBACK

    def _reason(self, name: str, finalist: str) -> str:
        if finalist == FALLBACK:
            return f"{FALLBACK} is used: the short trainings rank it first"
        final = self.record["final"]
        verb = "is adopted" if name == finalist else f"is not adopted, {FALLBACK} is used"
        return (
            f"{finalist} {verb}: {final['difference']:+.2f} points of top-1 on the hold-out in {len(final['seeds'])} "
            f"pairs of full trainings, above {final['lower95']:+.2f} with 95 % confidence"
        )

    def _top1(self, name: str, prune: Prune, seed: int, epochs: int) -> float:
        """Train the student of a member and a seed, which draws the selection too; return its top-1 on the hold-out."""
        recipe = self.recipe if epochs == self.recipe.train.epochs else in_epochs(self.recipe, epochs)
        recipe = recipe.model_copy(update={"seed": seed, "prune": prune.model_copy(update={"seed": seed})})
        console.say(f"choose: training with {name}, {epochs} epoch{'s' * (epochs > 1)}, seed {seed}")
        with console.brief():
            run, built = self.train(recipe, self.directory / STUDENTS / f"{name}-{epochs}-{seed}")
        self.trainings += epochs / self.recipe.train.epochs
        self.earlier_s += 0.0 if built else run.cost_s
        return float(run.facts["top1"]["holdout"])


def diagnose(
    scores: Artifact, images: ImageSource, found: Mapping[str, Prune], temperature: float
) -> dict[str, dict[str, float]]:
    """Return what each selection keeps, relative to random selection of as many samples.

    Returns
    -------
    dict
        Of each member: `entropy`, the mean entropy of the teacher at T = `temperature` on the kept samples; and
        `least_class_share`, the smallest share of a class that is kept.
    """
    z_NK, y_N, ids_T = scores.array("logits.npy"), np.asarray(scores.array("labels.npy")), images.train_ids
    step = chunk_rows(z_NK)
    entropy_T = np.concatenate(
        [_entropy(z_NK[ids_T[first : first + step]], temperature) for first in range(0, len(ids_T), step)]
    )
    measures, y_T = score_chunks(z_NK, y_N), y_N[ids_T]
    count_K = np.bincount(y_T, minlength=images.num_classes)
    result = {}
    for name, prune in found.items():
        pool = Pool(difficulty(measures, prune)[ids_T], y_T, ids_T, images.num_classes, prune, z_NK, ids_T)
        kept = select(pool)
        share_K = np.bincount(y_T[kept], minlength=images.num_classes) / np.maximum(count_K, 1)
        result[name] = {
            "entropy": float(entropy_T[kept].mean() / max(entropy_T.mean(), 1e-12)),
            "least_class_share": float(share_K[count_K > 0].min() / (len(kept) / len(ids_T))),
        }
    return result


def _entropy(z_NK: np.ndarray, temperature: float) -> np.ndarray:
    log_p_NK = _log_softmax(z_NK, temperature)
    return -(np.exp(log_p_NK) * log_p_NK).sum(axis=1)


def _table(epochs: int, found: Mapping[str, Sequence[float]]) -> Table:
    """Return a table of the accuracy after short trainings."""
    title = f"{epochs} epoch{'s' * (epochs > 1)}, {len(SHORT_SEEDS)} seeds"
    grid = Table(title=title, title_justify="left")
    grid.add_column("method")
    grid.add_column("top-1 on the hold-out (%)", justify="right")
    for name, values in found.items():
        grid.add_row(name, f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}")
    return grid
