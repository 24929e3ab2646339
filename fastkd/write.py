"""``python -m fastkd.write WRITER OUT_DIR [key=value …]``: convert images to a data set."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastkd import cli, console
from fastkd.artifacts import WARNINGS
from fastkd.data.writer_api import load_writer, writer_names
from fastkd.errors import InputError
from fastkd.recipe import plain_yaml
from fastkd.stages.writing import write


def main(
    writer: Annotated[
        str, typer.Argument(metavar="WRITER", help="Name of a writer (below), or path of your own file.")
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Output: a new directory.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The writer's options.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data set.")] = False,
) -> cli.CommandResult:
    """See _help()."""
    console.heading(f"write {writer} → {out_dir}")
    with console.bars() as progress:
        artifact, written = write(writer, out_dir, _key_values(options or []), force=force, progress=progress)
    facts, counts = artifact.facts, artifact.facts["counts"]
    for text in facts.get(WARNINGS, ()):  # also if the data set is reused
        console.warn(text)
    size = artifact.bytes_on_disk
    done = f"written in {artifact.cost_s:.1f} s" if written else "reused: it was written before, with the same options"
    return cli.CommandResult.of(
        f"{artifact.path}: {counts['train']:,} train and {counts['val']:,} val images of {len(facts['classes'])} "
        f"classes, {size / 1e6:,.1f} MB; {done}",
        artifact,
        written,
        counts=counts,
        classes=facts["classes"],
        skipped=len(facts["skipped"]),
        bytes=size,
    )


def _key_values(words: list[str]) -> dict[str, Any]:
    """Parse key=value words; values are YAML 1.2: 32 is an integer, true a boolean, null None, no is text."""
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"{word!r}: expected KEY=VALUE")
        if key in options:
            raise InputError(f"{word!r}: {key} is given twice")
        try:
            parsed = plain_yaml.parse(value, word) if value else ""
        except InputError:  # a tag, or a colon in a path
            parsed = value
        # No option is a mapping: what YAML parses as one is text, such as a path.
        options[key] = parsed if isinstance(parsed, str | bool | int | float | list | None) else value
    return options


def _help() -> str:
    # "\n\n" keeps typer's markdown from joining the lines.
    shipped = "\n\n".join(f"- `{name}`: {(load_writer(name).doc or name).splitlines()[0]}" for name in writer_names())
    return f"""Convert images to a data set: train.beton, val.beton and a manifest.

Example: `python -m fastkd.write fashion_mnist data/fashion_mnist`

Example: `python -m fastkd.write image_folder data/pets root=~/pets max_resolution=256`

JSON keys: path, kind, key, built, cost_s, counts, classes, skipped, bytes.

Writers (`writers/NAME.py` describes the options of each):

{shipped}

Options of every writer: `mode=raw|jpg|smart`, `max_resolution=PIXELS`, `jpeg_quality=90`,
`smart_threshold_bytes=65536`, `background=none|white|black|mean|R,G,B` (behind transparent pixels),
`exif=ignore|apply` (orientation), `on_error=fail|skip` (unreadable images), `workers=0` (one per core)."""


if __name__ == "__main__":
    main.__doc__ = _help()
    cli.run(main)
