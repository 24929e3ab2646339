"""``python -m fastkd.report RUN [RUN …]``: an HTML report on runs, and its charts as PNG files."""

from pathlib import Path
from typing import Annotated

import typer

from fastkd import cli


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN …]", help="Directories of RUNs.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output directory. Default: RUN.report, beside the first RUN.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option(help="Run student and teacher on val, for the accuracy of each class.")
    ] = True,
) -> cli.CommandResult:
    """Write report.html: accuracy, time, selection, samples, and how to reproduce a run; several runs are compared.

    The page is a single file and needs no network. Runs that differ only in their seed are reported as mean ± std.
    Sections that need the data set, the teacher or the SUBSET are left out if these are missing, with a note. Exported
    students are listed if they are beside their RUN, or are given as arguments.

    JSON keys: path, runs.

    Example: python -m fastkd.report runs/quickstart-0123abcd

    Example: python -m fastkd.report runs/savings-quickstart/*-seed* --out quickstart-report
    """
    from fastkd.report import builder

    page = builder.report(runs, out, evaluate=evaluate)
    return cli.CommandResult(f"report: {page}", {"path": str(page), "runs": [str(run) for run in runs]})


if __name__ == "__main__":
    cli.run(main)
