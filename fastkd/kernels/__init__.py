"""Numba kernels: arrays in, arrays out. They know no files, recipes or torch."""

from fastkd.kernels.agreement import Agreement, agreement, chance_limits
from fastkd.kernels.cells import class_cells, principal_axes, project
from fastkd.kernels.cut import cut_views
from fastkd.kernels.gather import gather_rows
from fastkd.kernels.hashing import hash64
from fastkd.kernels.inclusion import SystematicSample, inclusion_probabilities, systematic_sample
from fastkd.kernels.reshape import class_std, reshape_rows, reshape_to_half
from fastkd.kernels.scores import Scores, score_logits
from fastkd.kernels.selection import (
    beta_draw,
    class_ranks,
    coverage_strata,
    floored_quotas,
    infobatch_weights,
    largest_losses,
    proportional_quotas,
    select_ranks,
    uniform_quotas,
    window_ranks,
)
from fastkd.kernels.topk import topk_rows
from fastkd.kernels.views import FAMILIES, draw_views

__all__ = [
    "FAMILIES",
    "Agreement",
    "Scores",
    "SystematicSample",
    "agreement",
    "beta_draw",
    "chance_limits",
    "class_cells",
    "class_ranks",
    "class_std",
    "coverage_strata",
    "cut_views",
    "draw_views",
    "floored_quotas",
    "gather_rows",
    "hash64",
    "inclusion_probabilities",
    "infobatch_weights",
    "largest_losses",
    "principal_axes",
    "project",
    "proportional_quotas",
    "reshape_rows",
    "reshape_to_half",
    "score_logits",
    "select_ranks",
    "systematic_sample",
    "topk_rows",
    "uniform_quotas",
    "window_ranks",
]
