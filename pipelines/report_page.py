"""``gru report``: one self-contained page about a run or a search, for people who were not there."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gru_core.errors import InputError, StorageError, unknown
from pipelines import frontier, report, report_facts, report_models, report_pictures, report_source, report_text
from pipelines.report_source import Source, Told
from pipelines.report_words import FAMILIES
from pipelines.stores import hide
from pipelines.tracking import reason

Say = Callable[[str], None]
Document = dict[str, Any]
NAME = "report.html"
MARK = b'<meta name="generator" content="gru report">'
"""What tells a page of ours, which may be replaced, from a file that somebody else made."""


def run(
    source: str, *, tracking_uri: str | None = None, output: str | None = None, point: str | None = None, say: Say
) -> Document:
    """Reads what was recorded, writes the page, and adds it to the MLflow run where there is one.

    The same records give the same page, byte for byte: its dates are the run's.

    Args:
        source: folder of a run, a trial or a search, or id or name of its MLflow run.
        output: the file; None: ``report.html`` in the folder, or ``report-NAME.html`` here where there is none.
        point: ``TRIAL:STEP``, the point of a search that is shown; None: the knee.

    Returns:
        All that the page says (:func:`describe`), with ``report``, its path, and ``in_mlflow``, whether it is there.

    Raises:
        InputError: no such run, search or point; an output that cannot be a file. Nothing was written.
        StorageError: the page cannot be written.
    """
    say(f"reading {source}")
    read = report_source.read(source, tracking_uri)
    path = _target(output, read)
    document, pictures = describe(read, point, say)
    _write(path, page(document, pictures))
    return {**document, "report": str(path), "in_mlflow": _publish(read, path, say)}


def describe(source: Source, point: str | None, say: Say) -> tuple[Document, Document]:
    """What the page says, and its pictures.

    Returns:
        ``{kind, name, lead, outcome, data, models, parameters, settings, frontier, point, step, scores, robustness,
        course, limits, environment, config, make, folder, run_id}``; and picture name to SVG.

    Raises:
        InputError: no such point.
    """
    if point is not None and not source.is_search:
        raise InputError("--point: this is a run and not a search, which alone has points to choose from")
    found, points = _frontier(source) if source.is_search else (None, [])
    chosen = _choose(found, points, point) if found is not None else None
    told = _subject(source, chosen)
    step = chosen["step"] if chosen else None if source.is_search else report_facts.last_step(told)
    document: Document = {
        "kind": "search" if source.is_search else "run",
        "name": _clean(source.told.name),
        "subject": told.name,
        "lead": report_text.lead(told, step, found),
        "outcome": report_facts.status(source.told, source.is_search),
        "subject_outcome": report_facts.status(told, False),
        "data": report_facts.data(told),
        "models": _models(source, told, say),
        "parameters": report_facts.counted(told),
        "settings": report_facts.settings_of(told),
        "frontier": found,
        "point": chosen,
        "step": step,
        "scores": report_facts.scores(told, step),
        "robustness": report_facts.robustness(told, step),
        "course": report_facts.course(told, step),
        "environment": report_facts.environment(source),
        "config": told.config,
        "make": _make(source, told, chosen),
        "folder": str(source.found.folder) if source.found.folder else None,
        "run_id": source.found.run_id,
    }
    document["limits"] = report_text.limits(told, step, document)
    return document, _pictures(document, points)


def _frontier(source: Source) -> tuple[Document, list[dict[str, Any]]]:
    """As ``gru frontier`` computes it."""
    trials = [frontier.trial_of(each.record, each.run_id) for each in source.trials]
    found, points = frontier.summarise(source.told.name, trials)
    if source.found.folder:
        found["folder"] = str(source.found.folder)
    return found, points


def _choose(found: Document, points: list[dict[str, Any]], point: str | None) -> dict[str, Any] | None:
    if point is None:
        return found["knee"]
    name, colon, text = point.rpartition(":")
    if not colon or not text.isascii() or not text.isdigit():
        raise InputError(f"--point: got {point!r}, allowed: TRIAL:STEP, such as rectified-003:40")
    steps = {each["step"]: each for each in points if each["trial"] == name}
    if not steps:
        raise unknown("trial", name, {each["trial"] for each in points})
    if int(text) not in steps:
        raise InputError(f"--point: got step {text} of {name}, evaluated: {', '.join(map(str, steps))}")
    return steps[int(text)]


def _subject(source: Source, chosen: Mapping[str, Any] | None) -> Told:
    """The run whose scores and settings are shown."""
    if not source.is_search:
        return source.told
    if chosen is not None:
        return source.whole(next(each for each in source.trials if each.name == chosen["trial"]))
    return source.trials[0] if source.trials else source.told


def _models(source: Source, told: Told, say: Say) -> list[Document]:
    params = told.record.params
    paths = {
        "Starting model": params.get("model.path"),
        "Retain model, which never saw the rows to forget": params.get("retain_model"),
    }
    if not source.is_search and told.folder is not None and (told.folder / "model").is_dir():
        adapter = "Unlearned adapter, which needs the starting model"
        paths[adapter if params.get("model.lora.rank") else "Unlearned model"] = str(told.folder / "model")
    described = ((title, report_models.describe(str(path), say)) for title, path in paths.items() if path)
    return [{"title": title, **found} for title, found in described if found]


def _make(source: Source, told: Told, chosen: Mapping[str, Any] | None) -> Document:
    """Commands that make the model again, and a sentence where there are none."""
    params, trial = told.record.params, source.is_search
    if trial and chosen is None:
        return {"commands": [], "note": "There is no evaluated point to make again."}
    steps, schedule = params.get("unlearn.steps"), params.get("unlearn.schedule", "constant")
    short = chosen is not None and chosen["step"] != steps
    if short and schedule != "constant":
        return {
            "commands": [],
            "note": f"No command ends at this step: the learning rate follows a {schedule} schedule over {steps} "
            "steps, so that a shorter run takes other steps.",
        }
    if told.folder is not None and (told.folder / "config.yaml").is_file():
        config, commands, note = str(told.folder / "config.yaml"), [], ""
    elif told.run_id is not None:
        words = ["mlflow", "artifacts", "download", "--run-id", told.run_id, "--artifact-path", "config.yaml"]
        config, commands = "config.yaml", [[*words, "--dst-path", "."]]
        note = "The folder is gone; its config is an artifact of the MLflow run (MLFLOW_TRACKING_URI names the store)."
    else:
        return {"commands": [], "note": "The folder holds no config.yaml to run again."}
    ends = ["--set", f"unlearn.steps={chosen['step']}"] if chosen and short else []
    plain = re.sub(r"[^\w.-]+", "-", source.told.name)
    again = ["gru", "unlearn", "-c", config, *ends, "--output", f"runs/{plain}-{'chosen' if trial else 'again'}"]
    return {"commands": [shlex.join(words) for words in (*commands, again)], "note": note}


def _pictures(document: Document, points: list[dict[str, Any]]) -> Document:
    """Whatever there is something to draw for."""
    series, chosen = document["course"]["series"], document["step"] if document["point"] else None
    found: Document = {}
    if points:
        found["frontier"] = report_pictures.frontier(document["frontier"], points, document["point"])
    if series["unlearning"]:
        found["scores"] = report_pictures.scores(series, chosen)
    if series["forget_loss"]:
        found["losses"] = report_pictures.losses(series, chosen)
    if series["cosine"]:
        found["conflicts"] = report_pictures.conflicts(series, chosen)
    for name in document["robustness"]["curves"]:
        found[name] = report_pictures.relearning(document["robustness"], name)
    if document["robustness"]["bits"]:
        found["bits"] = report_pictures.few_bits(document["robustness"])
    return found


# ------------------------------------------------------------------------------------------------ the page


def page(document: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The page as HTML: everything but our own pictures and style is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("pipelines"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"score": _score, "date": _date, "duration": _duration, "setting": _setting}
    environment.filters |= {"count": lambda n: f"{n:,}", "plain": report_text.plain, "percent": report_text.percent}
    assert environment.loader is not None
    style = Markup(environment.loader.get_source(environment, "report.css")[0])
    drawn = {name: Markup(svg) for name, svg in pictures.items()}
    verdict = report_text.verdict(document["frontier"]) if document["frontier"] else ""
    return environment.get_template("report.html").render(
        **document, pictures=drawn, style=style, verdict=verdict, family_words=FAMILIES,
        shown=report.varied(document["frontier"]["frontier"]) if document["frontier"] else [],
    ).lstrip()  # fmt: skip


def _score(value: float | None) -> str:
    """Four digits behind the point where that shows the value, else powers of ten."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _setting(value: Any) -> str:
    """A setting as YAML has it, in few digits; a share of 1.0 does not read as one row."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = report.number(value)
    return f"{text}.0" if isinstance(value, float) and text.lstrip("-").isdigit() else text


def _date(time_ms: int | None) -> str:
    if time_ms is None:
        return "not recorded"
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _clean(name: str) -> str:
    """A name that can be written: without halves of characters."""
    return name.encode("utf-8", "replace").decode()


# ------------------------------------------------------------------------------------------------ out


def _target(output: str | None, source: Source) -> Path:
    if output is None and source.found.folder is not None:
        return source.found.folder / NAME
    plain = re.sub(r"[^\w.-]+", "-", source.told.name)  # whoever can write to the store chose the name
    path = Path(output if output is not None else f"report-{plain}.html").expanduser()
    if path.is_dir() or not path.name:
        raise InputError(f"--output: got {output!r}, a folder, allowed: a file, such as report.html")
    if path.exists() and MARK not in path.read_bytes()[:200]:
        raise InputError(f"--output: {path} exists and is no page of gru; allowed: a new file")
    return path


def _write(path: Path, text: str) -> None:
    """The whole page, or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8", errors="replace")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"the report cannot be written to {path}: {error.strerror or error}") from error


def _publish(source: Source, path: Path, say: Say) -> bool:
    """Whether the page is an artifact of the MLflow run; a store that is away costs a line, not the page."""
    found = source.found
    if found.store is None:
        for note in found.notes:
            say(note)
        return False
    if found.run_id is None:
        say(f"the {'search' if source.is_search else 'run'} is not in MLflow at {hide(found.uri)}, nor is the report")
        return False
    try:
        found.store.upload(found.run_id, path)
    except Exception as error:  # each kind of artifact store has errors of its own
        say(f"MLflow at {hide(found.uri)} did not take the report: {reason(error)}; `gru report` again delivers it")
        return False
    return True


def lines(document: Mapping[str, Any]) -> list[str]:
    """For a terminal."""
    out = [*document["lead"], *document["make"]["commands"]]
    out.append(f"report: {document['report']}{' (and in MLflow)' if document['in_mlflow'] else ' (not in MLflow)'}")
    return out
