"""``gru demo``: a search on built-in data that needs no network, no GPU and no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import report, settings
from pipelines.console import Say
from pipelines.output import examine, is_result

STUDY = "demo"


def run(
    overrides: Sequence[str] = (), output: str | None = None, tracking_uri: str | None = None, *, say: Say
) -> dict[str, Any]:
    """Prepares both models (cached), searches, and says what the picture shows.

    The output folder is the demo's own (``runs/demo``): an earlier demo in it is replaced, anything else is
    left alone.

    Returns:
        The document of ``pipelines.search.run`` and ``verdict``, a sentence on the hypervolumes.

    Raises:
        InputError: a bad override, or an output folder that holds something other than a demo.
    """
    config = settings.load(STUDY, overrides)
    options = {"output.dir": output, "track.uri": tracking_uri}
    config = settings.with_values(config, {key: value for key, value in options.items() if value is not None})
    settings.check(config)
    overwrite = _own(config)
    examine(Path(config.output.dir), overwrite=overwrite, resume=False)

    say("demo: a small model learns fictitious authors, and then has to forget some of them")
    from pipelines import prepare, search

    prepare.run(config, say=say)
    document = search.run(config, overwrite=overwrite, resume=False, say=say)
    volumes: Mapping[str, float] = document["hypervolume"]
    each = config.search.trials // len(volumes)
    return {**document, "verdict": report.best(volumes, each, document.get("comparable", True))}


def _own(config: RunConfig) -> bool:
    """Whether the output folder holds an earlier demo: a result whose config names the demo's experiment."""
    folder = Path(config.output.dir)
    if not is_result(folder):
        return False
    try:
        earlier = settings.load(str(folder / "config.yaml"))
    except InputError:
        return False
    return earlier.track.experiment == config.track.experiment and earlier.benchmark.name == config.benchmark.name


def lines(document: Mapping[str, Any]) -> list[str]:
    """The end of a demo, for people."""
    shown = report.search(document)
    return [*shown[:-1], document["verdict"], shown[-1]]
