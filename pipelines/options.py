"""Options that several commands share, and the groups that the commands stand in."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gru_core.errors import ConfigError, unknown

EXAMPLES = {
    "demo": "gru demo",
    "doctor": "gru doctor",
    "prepare": "gru prepare -c tofu_small",
    "plan": "gru plan -c tofu_llama32_1b --gpus 8 --gpu-memory 80",
    "unlearn": "gru unlearn -c demo --set rectify.strength=2 --output runs/one",
    "search": "gru search -c study.yaml --resume",
    "requests": "gru requests -c muse_news_sustainability --output runs/requests",
    "frontier": "gru frontier runs/demo",
    "report": "gru report runs/one",
    "evaluate": "gru evaluate runs/one/model -c tofu_small --json",
    "export": "gru export runs/one --output models/one",
    "submit": "gru submit --address http://head:8265 -- search -c study.yaml",
    "ui": "gru ui --port 5001",
}


class Commands(TyperGroup):
    """A group whose unknown commands are our own one-line error."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begins with."""
        if args and args[0] not in self.commands:
            raise unknown("command", args[0], (n for n, c in self.commands.items() if not c.hidden))
        return super().resolve_command(ctx, args)


class SubmitCommands(TyperGroup):
    """``status`` and ``stop``; anything else is the command line of the job."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The sub-command, or the hidden one that submits."""
        if args and args[0] not in ("status", "stop"):
            return "run", self.commands["run"], args
        return super().resolve_command(ctx, args)


ConfigOption = Annotated[
    str | None, typer.Option("-c", "--config", metavar="FILE", help="YAML file, or the name of a shipped study.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a config key, such as rectify.strength=2; repeatable."),
]
OutputOption = Annotated[str | None, typer.Option("--output", metavar="DIR", help="Output folder (output.dir).")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue what is in the output folder.")]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URI", help="MLflow store or server (track.uri).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document; progress goes to stderr.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the libraries' own lines, and tracebacks of failures.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="Ray cluster; default: RAY_ADDRESS.")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id that submit printed.")]


def _port(text: str | int) -> int:
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise ConfigError("--port", text, "1 to 65535")
    return port


PortOption = Annotated[int, typer.Option("--port", metavar="N", parser=_port, help="Port to listen on.")]
