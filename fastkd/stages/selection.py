"""Selection methods: one function ``select_NAME`` for each line of the table `fastkd.recipe.tables.METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fastkd.artifacts import open_array
from fastkd.errors import InputError
from fastkd.kernels import (
    Scores,
    SystematicSample,
    beta_draw,
    class_ranks,
    coverage_strata,
    floored_quotas,
    hash64,
    proportional_quotas,
    select_ranks,
    uniform_quotas,
    window_ranks,
)
from fastkd.recipe import Prune
from fastkd.recipe.tables import SCORES
from fastkd.stages.stratified import difficulty_probabilities, logit_points, stratified_sample


@dataclass
class Pool:
    """The samples to select from, and everything that methods may use.

    Attributes
    ----------
    difficulty : float32 [N]
        The score, with the sign that makes the hardest sample have the largest value.
    labels, ids : int64 [N]
        Class labels and sample ids, in ascending order of ids.
    num_classes
        Number of classes, K.
    settings
        The recipe's section ``prune``.
    logits : floating point [R, K]
        The teacher's logits; may be a memory map.
    rows : int64 [N]
        The samples' rows in `logits`.
    """

    difficulty: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    num_classes: int
    settings: Prune
    logits: np.ndarray
    rows: np.ndarray

    @cached_property
    def draw(self) -> np.ndarray:
        """A random number of each sample, which depends on its id and the seed alone (uint64 [N])."""
        return hash64(self.ids, self.settings.seed, "prune")

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of samples of each class (int64 [K])."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def quotas(self) -> np.ndarray:
        """Number of samples to keep of each class (int64 [K])."""
        quotas = proportional_quotas if self.settings.quota == "proportional" else uniform_quotas
        quota_K = quotas(self.counts, self.settings.keep_ratio)
        return floored_quotas(quota_K, self.counts, self.settings.min_per_class)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Inclusion probability of each sample by its difficulty (float64 [N])."""
        if self.settings.quota == "global":
            keep = np.array([round(self.settings.keep_ratio * len(self.ids))])
            return difficulty_probabilities(self.difficulty, np.zeros_like(self.labels), keep, self.settings)
        return difficulty_probabilities(self.difficulty, self.labels, self.quotas, self.settings)

    @cached_property
    def stratified(self) -> SystematicSample:
        """A systematic sample that is spread over the logits and over difficulty in each class."""
        points_ND = logit_points(self.logits, self.rows, self.draw)
        return stratified_sample(
            self.probabilities,
            self.difficulty,
            self.labels,
            points_ND,
            self.draw,
            self.num_classes,
            self.settings.seed,
            by_class=self.settings.quota != "global",
        )

    def smallest(self, value_N: np.ndarray) -> np.ndarray:
        """Return the positions of the smallest values of each class, up to its quota, ascending (int64 [M])."""
        return select_ranks(value_N, self.labels, np.zeros_like(self.quotas), self.quotas)

    def window(self, centre: float) -> np.ndarray:
        """Return the positions of a window of difficulty ranks in each class, ascending (int64 [M]).

        Parameters
        ----------
        centre
            0 for the easiest samples, 1 for the hardest.
        """
        first_K = window_ranks(self.counts, self.quotas, centre)
        return select_ranks(self.difficulty, self.labels, first_K, self.quotas)


def select(pool: Pool) -> np.ndarray:
    """Return the positions to keep, by the method of the recipe, ascending (int64 [M])."""
    method: Callable[[Pool], np.ndarray] = globals()[f"select_{pool.settings.method}"]
    return method(pool)


def difficulty(scores: Scores, settings: Prune) -> np.ndarray:
    """Return the score of a recipe, with the sign that makes the hardest sample have the largest (float32 [N])."""
    name = settings.score if settings.scored else "cross_entropy"
    value_N = getattr(scores, name).astype(np.float32)
    return -value_N if SCORES[name] < 0 else value_N


def select_medium(pool: Pool) -> np.ndarray:
    """Keep a window around the median difficulty of each class (MDSLR, ICLR 2025)."""
    return pool.window(pool.settings.window_centre)


def select_easy(pool: Pool) -> np.ndarray:
    """Keep the easiest samples of each class."""
    return pool.window(0.0)


def select_hard(pool: Pool) -> np.ndarray:
    """Keep the hardest samples of each class."""
    return pool.window(1.0)


def select_random(pool: Pool) -> np.ndarray:
    """Keep random samples of each class."""
    return pool.smallest(pool.draw)


def select_beta(pool: Pool) -> np.ndarray:
    """Draw difficulty ranks of each class from a Beta density; see `fastkd.kernels.beta_draw`."""
    rank_N = class_ranks(pool.difficulty, pool.labels, pool.num_classes)
    settings, count_N = pool.settings, pool.counts[pool.labels]
    return pool.smallest(beta_draw(rank_N, count_N, pool.draw, settings.beta_mode, settings.beta_concentration))


def select_random_unbalanced(pool: Pool) -> np.ndarray:
    """Keep random samples regardless of their class, then apply ``min_per_class``."""
    keep = round(pool.settings.keep_ratio * len(pool.ids))
    return _with_floor(pool, np.sort(np.argsort(pool.draw)[:keep]), np.zeros(len(pool.ids), np.bool_))


def select_ccs(pool: Pool) -> np.ndarray:
    """Keep the same number of samples from each stratum of difficulty (`fastkd.kernels.coverage_strata`).

    ``min_per_class`` is applied afterwards; samples that the method drops as too hard are added last. With
    ``class_balanced``, it selects within each class instead, up to the class's quota.
    """
    settings, N = pool.settings, len(pool.ids)
    if settings.class_balanced:
        return _class_balanced_ccs(pool)
    keep, drop_ratio = round(settings.keep_ratio * N), settings.drop_ratio
    kept = coverage_strata(pool.difficulty, pool.draw, keep, drop_ratio=drop_ratio, strata=settings.strata)
    hardest_N = np.zeros(N, np.bool_)
    hardest_N[np.argsort(pool.difficulty, kind="stable")[N - round(drop_ratio * N) :]] = True
    return _with_floor(pool, kept, hardest_N)


def _class_balanced_ccs(pool: Pool) -> np.ndarray:
    """Keep the same number of samples from each stratum of difficulty of each class."""
    kept = []
    for c, keep in enumerate(pool.quotas.tolist()):
        members = np.flatnonzero(pool.labels == c)
        if keep:
            settings, draw = pool.settings, pool.draw[members]
            at = coverage_strata(
                pool.difficulty[members], draw, keep, drop_ratio=settings.drop_ratio, strata=settings.strata
            )
            kept.append(members[at])
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)


def select_stratified(pool: Pool) -> np.ndarray:
    """Keep a systematic sample of each class, ordered by cells of similar logits and by difficulty.

    The logits are standardised by row, as by ``labels.reshape``, and projected onto their 16 principal components; each
    class is divided into up to 16 cells by k-means. The samples are ordered by class, by cell along a tour of
    neighbours, and by difficulty, alternately up and down. Sample i is kept if ⌊Π_i + U⌋ > ⌊Π_{i−1} + U⌋, where Π is
    the cumulative inclusion probability and U uniform in 0 … 1 (see `fastkd.kernels.systematic_sample`): numbers by
    class and probabilities are exact, and neighbours are rarely kept together, so that means over the subset of what
    depends on cell and difficulty vary less than over random samples. With ``quota: global``, ``min_per_class`` is
    applied afterwards.
    """
    kept = np.flatnonzero(pool.stratified.kept())
    if pool.settings.quota == "global":
        return _with_floor(pool, kept, np.zeros(len(pool.ids), np.bool_))
    return kept


def select_list(pool: Pool) -> np.ndarray:
    """Keep the samples that the user's file lists."""
    return listed_rows(pool.ids, pool.settings)


def _with_floor(pool: Pool, kept: np.ndarray, last_N: np.ndarray) -> np.ndarray:
    """Apply ``min_per_class`` to a selection that ignores classes.

    Samples are added in the order of the draw, those in `last_N` (bool [N]) after all others; if a class must shrink,
    the last in this order are removed.
    """
    settings, N = pool.settings, len(pool.ids)
    if not settings.min_per_class:
        return kept
    is_left_out_N, place_N = np.ones(N, np.bool_), np.empty(N, np.int64)
    is_left_out_N[kept] = False
    place_N[np.lexsort((pool.draw, last_N & is_left_out_N, is_left_out_N))] = np.arange(N)
    quota_K = np.bincount(pool.labels[kept], minlength=pool.num_classes)
    quota_K = floored_quotas(quota_K, pool.counts, settings.min_per_class)
    return select_ranks(place_N, pool.labels, np.zeros_like(quota_K), quota_K)


def most_kept(settings: Prune, train_ids: np.ndarray, num_classes: int) -> int:
    """Return the largest number of samples that a recipe can keep of `train_ids` (int64 [N]), for any scores."""
    if settings.method == "list":
        return len(listed_rows(train_ids, settings))
    N = len(train_ids)
    most = max(round(settings.keep_ratio * N), min(N, settings.min_per_class * num_classes))
    if not most:
        raise keeps_none(settings, N)
    return most


def keeps_none(settings: Prune, count: int) -> InputError:
    """Return the error for a selection that keeps nothing."""
    return InputError(f"prune.keep_ratio={settings.keep_ratio} of {count} samples keeps none; raise it")


def listed_rows(ids_N: np.ndarray, settings: Prune) -> np.ndarray:
    """Return the positions, in ascending ids (int64 [N]), of the samples that the user's file lists (int64 [M])."""
    path = Path(str(settings.ids))
    listed = open_array(path)
    if listed.ndim != 1 or listed.dtype.kind not in "iu" or not len(listed):
        raise InputError(f"prune.ids={path}: expected integer sample ids [M], got {listed.dtype} {list(listed.shape)}")
    listed = np.sort(listed.astype(np.int64))
    if (repeated := listed[1:][np.diff(listed) == 0]).size:
        raise InputError(f"prune.ids={path}: sample id {repeated[0]} occurs more than once")
    at = np.minimum(np.searchsorted(ids_N, listed), len(ids_N) - 1)
    if (strangers := listed[ids_N[at] != listed]).size:
        raise InputError(
            f"prune.ids={path}: {len(strangers)} ids are not training samples, the first {strangers[0]}: there are "
            f"{len(ids_N):,} of {ids_N[0]} … {ids_N[-1]}, without the hold-out"
        )
    return at
