"""``gru requests``: its options."""

from __future__ import annotations

from typing import Any

from pipelines import cli_config, console
from pipelines.options import (
    ConfigOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    ResumeOption,
    SetOption,
    TrackingOption,
    VerboseOption,
)


def requests(
    source: ConfigOption = None, overrides: SetOption = None, output: OutputOption = None,
    overwrite: OverwriteOption = False, resume: ResumeOption = False, tracking_uri: TrackingOption = None,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """Several forget sets, each from the start or in sequence."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        config = cli_config.load(source or cli_config.resumed(output, resume), overrides, output, tracking_uri)
        from pipelines import requests as module

        return module.run(config, overwrite=overwrite, resume=resume, say=say)

    def show(document: dict[str, Any]) -> list[str]:
        from pipelines import requests_files

        return requests_files.lines(document)

    console.run(as_json, work, show)
