"""The ``gru`` command: options in, one function called, a short table or one JSON document out.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (Ctrl-C, SIGTERM).
Heavy libraries are imported inside the commands, so
that ``gru --help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipelines import cli_config, cli_report, console, exits, stopping
from pipelines.cli_evaluate import evaluate
from pipelines.cli_requests import requests
from pipelines.cli_submit import submit_app
from pipelines.options import (
    EXAMPLES,
    AddressOption,
    Commands,
    ConfigOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    PortOption,
    ResumeOption,
    SetOption,
    TrackingOption,
    VerboseOption,
)

app = typer.Typer(
    cls=Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Make a language model forget, keep the rest of it, and see what that costs.",
    epilog="\b\nExamples:\n" + "\n".join(f"  {example}" for example in EXAMPLES.values()),
)  # fmt: skip


def _command(name: str) -> dict[str, Any]:
    return {"name": name, "epilog": f"Example: {EXAMPLES[name]}"}


_run = console.run


_resumed, _load = cli_config.resumed, cli_config.load


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Make a language model forget, keep the rest of it, and see what that costs."""
    if version:
        from importlib.metadata import version as installed

        print(installed("gru-unlearning"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command(**_command("demo"))
def demo(
    overrides: SetOption = None, output: OutputOption = None, tracking_uri: TrackingOption = None,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """Search the trade-off on built-in data, in minutes."""
    console.quiet(verbose)
    from pipelines import demo as module

    _run(as_json, lambda say: module.run(overrides or (), output, tracking_uri, say=say), module.lines)


@app.command(**_command("doctor"))
def doctor(
    address: AddressOption = None, tracking_uri: TrackingOption = None,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """What is installed and reachable, with fixes."""
    console.quiet(verbose)
    from pipelines import doctor as module

    result = _run(as_json, lambda say: module.run(address=address, tracking_uri=tracking_uri), module.lines)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command(**_command("prepare"))
def prepare(
    source: ConfigOption = None, overrides: SetOption = None, as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """Make and cache the target and the retain model."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        config = _load(source, overrides)
        from pipelines import prepare as module

        made = module.run(config, say=say)
        return {"target": str(made.target), "retain": str(made.retain), "cached": made.cached}

    from pipelines import report

    _run(as_json, work, report.prepared)


@app.command(**_command("plan"))
def plan(
    source: ConfigOption = None, overrides: SetOption = None,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", help="Workers, a GPU each.")] = None,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", metavar="GIB", help="Memory of a GPU.")] = 80.0,
    gpu_flops: Annotated[
        float, typer.Option("--gpu-flops", metavar="N", help="Dense FLOP/s of a GPU; default: H100, bf16.")
    ] = 989e12,
    utilisation: Annotated[float, typer.Option("--utilisation", metavar="X", help="Share of them reached.")] = 0.4,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", metavar="GB/S", help="Sent by a GPU; default: 450 to 8, else 50.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens of a row.")] = None,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """Memory, communication and time of a run, without weights."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        config = _load(source, overrides)
        from pipelines import plan as module

        device = module.Device(gpu_memory, gpu_flops, utilisation, bandwidth)
        return module.run(config, gpus=gpus, device=device, tokens=tokens)

    def show(document: dict[str, Any]) -> list[str]:
        from pipelines import plan as module

        return module.lines(document)

    _run(as_json, work, show)


@app.command(**_command("unlearn"))
def unlearn(
    source: ConfigOption = None, overrides: SetOption = None, output: OutputOption = None,
    overwrite: OverwriteOption = False, resume: ResumeOption = False, tracking_uri: TrackingOption = None,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """One run: a model that forgot, and its scores."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        config = _load(source or _resumed(output, resume), overrides, output, tracking_uri)
        from pipelines import unlearn as module

        return module.run(config, overwrite=overwrite, resume=resume, say=say)

    from pipelines import report

    _run(as_json, work, report.run)


@app.command(**_command("search"))
def search(
    source: ConfigOption = None, overrides: SetOption = None, output: OutputOption = None,
    overwrite: OverwriteOption = False, resume: ResumeOption = False, tracking_uri: TrackingOption = None,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """Many runs: the frontier of forgetting and keeping."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        config = _load(source or _resumed(output, resume), overrides, output, tracking_uri)
        from pipelines import search as module

        return module.run(config, overwrite=overwrite, resume=resume, say=say)

    from pipelines import report

    _run(as_json, work, report.search)


@app.command(**_command("frontier"))
def frontier(
    study: Annotated[str, typer.Argument(metavar="SEARCH", help="Output folder or MLflow run id of a search.")],
    tracking_uri: TrackingOption = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="Where the files go.")] = None,
    sync: Annotated[bool, typer.Option("--sync", help="Deliver local records that MLflow lacks first.")] = False,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """A search's table and pictures, from its tracked runs."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        from pipelines import frontier as module

        out = Path(output) if output is not None else None
        return module.build(study, tracking_uri=tracking_uri, out=out, sync=sync, say=say)

    from pipelines import report

    _run(as_json, work, report.search)


app.command(**_command("requests"))(requests)
app.command(**_command("report"))(cli_report.report)
app.command(**_command("evaluate"))(evaluate)
app.add_typer(submit_app, name="submit")


@app.command(**_command("export"))
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run or a trial, or its output.storage.")],
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="New folder (RUN/export).")] = None,
    step: Annotated[int | None, typer.Option("--step", metavar="N", help="The checkpoint after this step.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="With an adapter: the model it is merged into.")] = False,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """A run's model, or a checkpoint's, as one Hugging Face folder."""
    console.quiet(verbose)

    def work(say: console.Say) -> dict[str, Any]:
        from pipelines import export as module

        return module.run(run, to=output, step=step, merged=merged, say=say)

    from pipelines import report

    _run(as_json, work, report.exported)


@app.command(**_command("ui"))
def ui(
    port: PortOption = 5000,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    tracking_uri: TrackingOption = None, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """MLflow in the browser, over the recorded runs."""
    console.quiet(verbose)
    from pipelines import ui as module

    module.run(tracking_uri=tracking_uri, host=host, port=port, say=print)


def _stop(number: int, frame: Any) -> None:
    """SIGTERM (``gru submit stop``, a batch system's time limit) asks a run for a checkpoint; where nothing runs that
    could write one, or at the second time, it does what Ctrl-C does at that moment."""
    if stopping.ask():
        return
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt):
        interrupt(signal.SIGINT, frame)
    else:  # a process in the background may be deaf to Ctrl-C
        raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: runs one command and exits with its code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    given = list(sys.argv[1:] if arguments is None else arguments)
    exits.guarded(lambda: typer.main.get_command(app).main(given, prog_name="gru", standalone_mode=False))
