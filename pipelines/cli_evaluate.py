"""``gru evaluate``: its options, and which of them go together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gru_core.errors import InputError
from pipelines import console
from pipelines.options import (
    ConfigOption,
    JsonOption,
    OverwriteOption,
    ResumeOption,
    SetOption,
    TrackingOption,
    VerboseOption,
)


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id; default: the config's.")
    ] = None,
    source: ConfigOption = None, overrides: SetOption = None,
    benchmark: Annotated[str | None, typer.Option(metavar="NAME", help="The benchmark (benchmark.name).")] = None,
    retain_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that never saw the forget set (retain_model).")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Metrics; default: all that the benchmark has rows for.")
    ] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="Write prompts, answers and generations too.")] = False,
    log: Annotated[str | None, typer.Option("--from-log", metavar="FILE", help="A published log, not a model.")] = None,
    retain_log: Annotated[str | None, typer.Option(metavar="FILE", help="from-log: that of the retain model.")] = None,
    start_log: Annotated[
        str | None, typer.Option(metavar="FILE", help="from-log: that of the model before unlearning.")
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Output folder.")] = "evaluation",
    overwrite: OverwriteOption = False, resume: ResumeOption = False,
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Record it in this MLflow experiment, beside its runs.")
    ] = None,
    tracking_uri: TrackingOption = None, as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """A model's scores on a benchmark, or those of a published log."""
    console.quiet(verbose)
    of_model = {
        "--benchmark": benchmark,
        "--retain-model": retain_model,
        "--metrics": metrics,
        "--with-text": with_text,
        "--resume": resume,
    }
    of_log = {"--retain-log": retain_log, "--start-log": start_log}
    _together(model or source, log, of_model | {"MODEL": model}, of_log)
    if tracking_uri is not None and experiment is None:
        raise InputError("--tracking-uri: only with --experiment, which says where to record")

    def work(say: console.Say) -> dict[str, Any]:
        from pipelines import evaluate as module
        from pipelines import settings

        config = settings.load(source, overrides or ())
        values = {
            "model.path": model, "retain_model": retain_model, "benchmark.name": benchmark, "output.dir": output,
            "track.experiment": experiment, "track.uri": tracking_uri,
        }  # fmt: skip
        config = settings.with_values(config, {key: value for key, value in values.items() if value is not None})
        track = experiment is not None
        if log is not None:
            return module.from_log(log, retain_log, start_log, config, track=track, overwrite=overwrite, say=say)
        names = [name.strip() for name in metrics.split(",") if name.strip()] if metrics is not None else None
        return module.run(config, names, with_text=with_text, track=track, overwrite=overwrite, resume=resume, say=say)

    from pipelines import report

    console.run(as_json, work, report.evaluated)


def _together(model: str | None, log: str | None, of_model: dict[str, Any], of_log: dict[str, Any]) -> None:
    """Either a model or a log, with the options of that one."""
    if model is None and log is None:
        raise InputError("evaluate: got neither MODEL nor --from-log, allowed: one of them, or -c with a model.path")
    wrong = [option for option, value in (of_log if log is None else of_model).items() if value]
    if wrong:
        raise InputError(f"{wrong[0]}: {'only' if log is None else 'not'} with --from-log")
