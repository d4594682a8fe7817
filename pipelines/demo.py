"""``gru demo``: a search on built-in data that needs no network, no GPU and no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import journal, report, settings
from pipelines.console import Say
from pipelines.output import examine

STUDY = "demo"
TAG = "gru.demo"
"""Tag of a search that ``gru demo`` ran: its folder is the demo's own."""


def run(
    overrides: Sequence[str] = (), output: str | None = None, tracking_uri: str | None = None, *, say: Say
) -> dict[str, Any]:
    """Prepares both models (cached), searches, and says what the picture shows.

    An earlier demo in the output folder (``runs/demo``) is replaced; anything else is left alone, a search or a
    run with the demo's config included.

    Returns:
        The document of ``pipelines.search.run`` and ``verdict``, a sentence on the hypervolumes.

    Raises:
        InputError: a bad override, or an output folder that holds something other than a demo.
    """
    config = settings.load(STUDY, overrides)
    options = {"output.dir": output, "track.uri": tracking_uri}
    config = settings.with_values(config, {key: value for key, value in options.items() if value is not None})
    settings.check(config)
    overwrite = _own(Path(config.output.dir).expanduser())
    examine(Path(config.output.dir), overwrite=overwrite, resume=False)

    say("demo: a small model learns fictitious authors, and then has to forget some of them")
    from pipelines import search

    document = search.run(config, overwrite=overwrite, resume=False, say=say, tags={TAG: "true"})
    volumes: Mapping[str, float] = document["hypervolume"]
    each = config.search.trials // len(volumes)
    return {**document, "verdict": report.best(volumes, each, document.get("comparable", True))}


def _own(folder: Path) -> bool:
    """Whether the folder holds an earlier demo, by the first line of its journal."""
    try:
        first = journal.head(folder)
    except (OSError, ValueError):
        return False
    return first is not None and first.get("tags", {}).get(TAG) == "true"


def lines(document: Mapping[str, Any]) -> list[str]:
    """The end of a demo, for people."""
    shown = report.search(document)
    return [*shown[:-1], document["verdict"], shown[-1]]
