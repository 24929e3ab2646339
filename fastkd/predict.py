"""``python -m fastkd.predict RUN IMAGES…``: classify images with a trained student."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from fastkd import cli, console
from fastkd.errors import InputError

if TYPE_CHECKING:
    from fastkd.stages.predicting import Prediction


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a RUN, or of an exported student.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print for each image.")] = 3,
    model: cli.UserModel = None,
) -> cli.CommandResult:
    """Classify images: print the most probable classes of each.

    Images are decoded, cropped and resized as in the evaluation of the student. If an image cannot be read, an error is
    printed, the others are still classified, and the exit code is 2.

    JSON keys: model, images (for each: image, and top or error).

    Example: python -m fastkd.predict runs/quickstart-01234567 boot.png photos/ --top 5
    """
    from fastkd.stages.predicting import find_images, predict
    from fastkd.stages.trained_student import open_student

    student = open_student(run, model)
    files = find_images(images)
    table = Table(title=f"predict: {student.described['model']}", title_justify="left")
    table.add_column("image", overflow="fold")
    count = min(top, len(student.classes))
    for place in range(count):
        table.add_column(f"{place + 1}.", overflow="fold")
        table.add_column("", justify="right")
    results: list[dict[str, Any]] = []
    broken = 0
    for prediction in predict(student, files):
        if prediction.logits is None:
            broken += 1
            console.error(f"{prediction.path}: {prediction.error}")
            results.append({"image": str(prediction.path), "error": str(prediction.error)})
            continue
        best = _best(prediction, student.classes, count)
        results.append({"image": str(prediction.path), "top": best})
        cells = [cell for one in best for cell in (one["class"], f"{one['probability']:.2%}")]
        table.add_row(*map(escape, (str(prediction.path), *cells)))
    if broken < len(files):
        console.show(table)
    return cli.CommandResult(
        f"predict: {len(files) - broken} of {len(files)} images classified by {student.described['model']}",
        {"model": student.described["model"], "images": results},
        InputError(f"{broken} of {len(files)} images could not be read") if broken else None,
    )


def _best(prediction: "Prediction", classes: list[str], count: int) -> list[dict[str, Any]]:
    probabilities = prediction.probabilities
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": classes[i], "index": int(i), "probability": float(probabilities[i])} for i in best]


if __name__ == "__main__":
    cli.run(main)
