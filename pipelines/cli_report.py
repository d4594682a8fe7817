"""``gru report``: a page about a run or a search, for people who were not there."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipelines import console
from pipelines.options import JsonOption, TrackingOption, VerboseOption


def report(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SEARCH", help="Folder of a run, a trial or a search, or its MLflow run.")
    ],
    output: Annotated[str | None, typer.Option(metavar="FILE", help="The page (report.html in the folder).")] = None,
    point: Annotated[
        str | None, typer.Option(metavar="TRIAL:STEP", help="Point of a search to report on; default: the knee.")
    ] = None,
    tracking_uri: TrackingOption = None, as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """A page on a run or a search, for people who were not there."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        from pipelines import report_page as module

        return module.run(source, tracking_uri=tracking_uri, output=output, point=point, say=say)

    def show(document: dict[str, Any]) -> list[str]:
        from pipelines import report_page as module

        return module.lines(document)

    console.run(as_json, work, show)
