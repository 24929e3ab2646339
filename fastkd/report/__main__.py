"""``python -m fastkd.report RUN [RUN …]``: one page about runs, and its charts as PNG files."""

from pathlib import Path
from typing import Annotated

import typer

from fastkd import cli


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN …]", help="Directories that train printed.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it goes; default: beside the first RUN, as RUN.report.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option(help="Run student and teacher over val, for the accuracy on each class.")
    ] = True,
) -> cli.CommandResult:
    """Write report.html: accuracy, time, the selection, samples, and how to reproduce it; of several runs, compared.

    The page needs nothing else and no network. Runs that differ only in their seed are summed up as mean ± std. What
    needs the data, the teacher or the selection is left out where these are gone, and the page says so. A student that
    was exported is told of where it lies beside its RUN, or is given as well.

    JSON keys: path, runs.

    Example: python -m fastkd.report runs/quickstart-0123abcd

    Example: python -m fastkd.report runs/savings-quickstart/*-seed* --out quickstart-report
    """
    from fastkd.report import builder

    page = builder.report(runs, out, evaluate=evaluate)
    return cli.CommandResult(f"report: {page}", {"path": str(page), "runs": [str(run) for run in runs]})


if __name__ == "__main__":
    cli.run(main)
