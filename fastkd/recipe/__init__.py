"""Recipes: YAML files, ``a.b=c`` overrides, and frozen, validated models. Unknown keys are errors."""

from fastkd.recipe.paths import HUB, LocalPath, model_name
from fastkd.recipe.read import dump, load, locate, merged, nested, read_yaml, schema, settings_of
from fastkd.recipe.schema import PLACES, Recipe
from fastkd.recipe.sections import (
    Data,
    Labels,
    Log,
    Loss,
    Optim,
    Prune,
    Score,
    Section,
    Student,
    Train,
    View,
)
from fastkd.recipe.teacher import Member, Teacher

__all__ = [
    "HUB",
    "PLACES",
    "Data",
    "Labels",
    "LocalPath",
    "Log",
    "Loss",
    "Member",
    "Optim",
    "Prune",
    "Recipe",
    "Score",
    "Section",
    "Student",
    "Teacher",
    "Train",
    "View",
    "dump",
    "load",
    "locate",
    "merged",
    "model_name",
    "nested",
    "read_yaml",
    "schema",
    "settings_of",
]
