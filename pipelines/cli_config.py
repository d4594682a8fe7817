"""The config of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gru_core.config import RunConfig


def resumed(output: str | None, resume: bool) -> str | None:
    """The request that a folder was started with: ``--output FOLDER --resume`` needs no config."""
    file = Path(output).expanduser() / "request.yaml" if output and resume else None
    return str(file) if file is not None and file.is_file() else None


def load(
    source: str | None,
    overrides: Sequence[str] | None,
    output: str | None = None,
    tracking_uri: str | None = None,
) -> RunConfig:
    """The checked config; options win over ``--set``, ``--set`` over the file."""
    from pipelines import settings

    config = settings.load(source, overrides or ())
    options = {"output.dir": output, "track.uri": tracking_uri}
    config = settings.with_values(config, {key: value for key, value in options.items() if value is not None})
    settings.check(config)
    return config
