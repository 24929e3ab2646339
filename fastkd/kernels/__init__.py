"""Numba kernels: arrays in, arrays out. They know no files, recipes or torch."""

from fastkd.kernels.mix import mix64
from fastkd.kernels.reshape import class_std, reshape_rows
from fastkd.kernels.scores import score_rows
from fastkd.kernels.selection import (
    medium_ranks,
    proportional_quotas,
    select_ranks,
    uniform_quotas,
)

__all__ = [
    "class_std",
    "medium_ranks",
    "mix64",
    "proportional_quotas",
    "reshape_rows",
    "score_rows",
    "select_ranks",
    "uniform_quotas",
]
