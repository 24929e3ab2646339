"""Verify the artifacts of a recipe, and compare stored labels with what its teacher computes."""

import numpy as np

from fastkd import console
from fastkd.artifacts.inventory import check_artifact
from fastkd.data.row_store import StoredRows
from fastkd.pipeline import Pipeline
from fastkd.recipe import Recipe
from fastkd.stages.checking import Comparison, RowChecker
from fastkd.stages.label_format import label_format, open_view


def check_recipe(recipe: Recipe, *, pairs: int = 256, seed: int = 0) -> list[Comparison]:
    """Verify every artifact of a recipe, and compare stored rows with what the teacher computes from the same views.

    Parameters
    ----------
    pairs : int
        Number of (sample, view) pairs to draw from the rows of the SUBSET, and the same number from the LABELS.
    seed : int
        Seed of the draw.

    Raises
    ------
    InputError
        An artifact that the recipe needs has not been built yet.
    ArtifactError
        An artifact is damaged, or rows differ from the teacher's; names the worst row.
    """
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    pipeline = Pipeline(recipe, build=False)
    check_artifact(pipeline.dataset.path)
    if recipe.teacher is None:
        return []
    images = pipeline.images
    imported = recipe.teacher.logits is not None
    has_teacher = (images.export is None or recipe.teacher.recipe is None) and not imported
    if has_teacher and pipeline.teacher_run:
        check_artifact(pipeline.teacher_run.path)
    if not pipeline.needs("prune"):
        return []
    if not images.export:
        check_artifact(pipeline.scores.path)
    subset = check_artifact(pipeline.subset.path)
    labels = check_artifact(pipeline.labels.path) if recipe.uses_labels else None
    if not has_teacher:
        console.say(
            "the logits were made elsewhere: there is no teacher to compare them with"
            if imported
            else "the teacher is not part of an export, so stored labels are not compared with it; to compare "
            "them, give teacher.recipe=null, teacher.model and teacher.weights"
        )
        return []
    ids_M = np.asarray(subset.array("indices.npy"))
    sigma_K = np.asarray(subset.array("class_std.npy"))
    checker = RowChecker(images, pipeline.teacher, pipeline.runtime, sigma_K, recipe.labels.strength)
    rows, dense = StoredRows(ids_M, [subset.array("logits.npy")]), label_format(images.num_classes, None, 1.0)
    precision: dict[int | None, str] = {None: str(subset.manifest.settings["precision"])}
    found = [checker.compare(subset, dense, precision, ids_M, lambda view: rows, pairs=pairs, seed=seed)]
    if labels:
        precisions: dict[int | None, str] = {v: str(one["precision"]) for v, one in enumerate(labels.facts["each"])}
        form = pipeline.label_format

        def opened(view: int | None) -> StoredRows:
            assert view is not None
            return open_view(labels, ids_M, view)

        found.append(checker.compare(labels, form, precisions, ids_M, opened, pairs=pairs, seed=seed))
    return found
