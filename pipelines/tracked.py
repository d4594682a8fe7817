"""Where the runs of a search stand: in MLflow, or in the journals of its folder; and the frontier back to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gru_core.config import TrackConfig
from gru_core.errors import InputError
from pipelines import journal
from pipelines.courier import deliver_all, folders
from pipelines.delivery import Delivery, remembered
from pipelines.stores import check, hide, resolve_uri, sqlite_file
from pipelines.tracking import Mlflow, Point, reason

Say = Callable[[str], None]
NOTE = "mlflow.note.content"
TITLE = "### Frontier"


@dataclass
class Found:
    """The runs of one search."""

    name: str
    uri: str
    folder: Path | None = None
    store: Mlflow | None = None
    """None where the store cannot be reached."""
    run_id: str | None = None
    """The parent run."""
    records: list[tuple[journal.Record, str | None]] = field(default_factory=list)
    """Each trial, with its MLflow run."""
    time_ms: int = 0
    """When the last evaluation was recorded."""
    notes: list[str] = field(default_factory=list)


def gather(source: str, tracking_uri: str | None, *, sync: bool, say: Say) -> Found:
    """Finds a search by its folder, or by id or name of its MLflow run, and reads its trials.

    MLflow is read first. Where it cannot be reached, or holds fewer evaluations than the folder's journals,
    the journals are read, and a note says so. A single run counts as a search of one trial.

    Raises:
        InputError: as :func:`locate`.
    """
    found = locate(source, tracking_uri, sync=sync, say=say)
    if found.store is not None and found.run_id is not None:
        found.records, found.time_ms = _read(found.store, found.run_id)
    if found.folder is not None:
        _complete(found)
    return found


def locate(source: str, tracking_uri: str | None, *, sync: bool, say: Say) -> Found:
    """Finds a run or a search by its folder, or by id or name of its MLflow run; reads no trials.

    Of one in shared storage (``s3://bucket/folder``) the records are copied to ``frontier-FOLDER`` in the working
    folder first.

    Raises:
        InputError: there is none, or a store that cannot be reached and is needed.
    """
    folder = _copied(source) if "://" in source else Path(source)
    if not (folder / journal.NAME).is_file():
        if folder.is_dir():
            raise InputError(f"{source} is no search folder: it has no {journal.NAME}")
        if sync:
            raise InputError(f"--sync delivers a search folder, and {source!r} is none")
        return _from_name(source, resolve_uri(TrackConfig(uri=tracking_uri)))
    track = _track(folder, tracking_uri)
    found = Found(journal.load(folder).name or folder.name, str(track.uri), folder)
    try:
        _connect(found, track.experiment, sync=sync, say=say)
    except InputError as error:
        if sync or tracking_uri:
            raise
        found.store = None
        found.notes.append(f"{error}: read from the journals in {folder}")
    return found


def _copied(uri: str) -> Path:
    from pipelines.mirror import Mirror

    folder = Path(f"frontier-{uri.partition('?')[0].rstrip('/').rpartition('/')[2]}")
    copy = Mirror(uri, folder)
    assert copy.storage is not None
    if copy.storage.read(journal.NAME) is None:
        raise InputError(f"{copy.storage} holds no search: it has no {journal.NAME}")
    copy.resume()
    return folder


def _from_name(source: str, uri: str) -> Found:
    check(uri)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise InputError(f"no search folder {source!r}, and no MLflow database {file}")
    store = Mlflow(uri)
    run_id = store.find(source)
    return Found(store.record(run_id)[0].name, uri, None, store, run_id)


def _track(folder: Path, given: str | None) -> TrackConfig:
    """Store and experiment of a folder: as given, as its ``mlflow.json`` says, as its config says."""
    from pipelines import settings

    stored = remembered(folder)
    config = folder / "config.yaml"
    track = settings.load(str(config)).track if config.is_file() else TrackConfig()
    experiment = stored.get("experiment", track.experiment)
    if given or "uri" not in stored:
        return TrackConfig(resolve_uri(TrackConfig(uri=given) if given else track), experiment)
    # Files hold the address without user and password: take the same one with them where the environment has it.
    choices = [resolve_uri(TrackConfig()), resolve_uri(track)]
    return TrackConfig(next((uri for uri in choices if hide(uri) == stored["uri"]), stored["uri"]), experiment)


def _connect(found: Found, experiment: str, *, sync: bool, say: Say) -> None:
    """Opens the store and finds the parent run, after delivering what is missing where ``sync`` asks for it."""
    assert found.folder is not None
    check(found.uri)
    file = sqlite_file(found.uri)
    if file is not None and not file.exists() and not sync:
        raise InputError(f"the MLflow database {file} is not there")
    found.store = Mlflow(found.uri)
    if sync:
        delivery = Delivery(found.store, experiment)
        try:
            count, refused = deliver_all(delivery, found.folder)
        except Exception as error:
            raise InputError(f"MLflow at {hide(found.uri)} went away while delivering: {reason(error)}") from None
        found.notes += [*delivery.notes, *refused]
        found.run_id = delivery.run_id(found.folder)
        say(f"delivered {count} journal lines to MLflow at {hide(found.uri)}")
        return
    stored = remembered(found.folder)
    run_id = stored.get("run_id") if stored.get("uri") == hide(found.uri) else None
    if run_id is not None and found.store.tags(run_id) is not None:
        found.run_id = run_id
    else:
        found.notes.append(f"not in MLflow at {hide(found.uri)} (--sync delivers it): read from the journals")


def _read(store: Mlflow, run_id: str) -> tuple[list[tuple[journal.Record, str | None]], int]:
    """The trials under a run, or the run itself where it has none, and the time of the last evaluation."""
    read = [(store.record(each), each) for each in store.children(run_id) or [run_id]]
    return [(record, each) for (record, _), each in read], max(time for (_, time), _ in read)


def _complete(found: Found) -> None:
    """Takes the journals where they know of more evaluations than MLflow does."""
    assert found.folder is not None
    trials = folders(found.folder)
    local = [journal.load(each) for each in trials[1:] or trials]
    ours = sum(len(journal.evaluated(record.metrics)) for record in local)
    theirs = sum(len(journal.evaluated(record.metrics)) for record, _ in found.records)
    if ours > theirs:
        if found.run_id is not None:
            found.notes.append(
                f"MLflow has {theirs} of {ours} evaluations (--sync delivers the rest): read from the journals"
            )
        by_name = {record.tags.get("gru.trial") or record.name: run_id for record, run_id in found.records}
        found.records = [(each, by_name.get(each.tags.get("gru.trial") or each.name)) for each in local]


def publish(
    found: Found,
    document: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    runs: Mapping[str, str | None],
    say: Say,
) -> None:
    """Logs hypervolumes and files on the parent run, and frontier membership and knee as tags of the trials.

    Repeating it with the same points changes nothing. A store that fails costs a line, not the frontier.
    """
    assert found.store is not None
    assert found.run_id is not None
    values = {f"hypervolume/{family}": volume for family, volume in document["hypervolume"].items()}
    values |= {f"hypervolume/gain_{key}": value for key, value in document["gain"].items()}
    values["points"] = len(points)
    metrics: list[Point] = [(key, 0, float(value), found.time_ms) for key, value in values.items()]
    best = {point["trial"] for point in points if point["on_frontier"]}
    knees = {point["trial"] for point in points if point["knee"]}
    tags = {"gru.comparable": "true" if document["comparable"] else "false"}
    try:
        written = (found.store.tags(found.run_id) or {}).get(NOTE, "")
        if not written or written.startswith(TITLE):  # a description that somebody wrote stays
            tags[NOTE] = describe(document)
        found.store.log(found.run_id, metrics=metrics, tags=tags)
        for trial, run_id in runs.items():
            if run_id is not None:
                marks = {"gru.on_frontier": trial in best, "gru.knee": trial in knees}
                found.store.log(run_id, tags={key: "true" if value else "false" for key, value in marks.items()})
        for path in document["artifacts"].values():
            found.store.upload(found.run_id, Path(path))
    except Exception as error:
        say(f"MLflow at {hide(found.uri)} did not take the frontier in full: {reason(error)}")


def describe(document: Mapping[str, Any]) -> str:
    """The frontier in Markdown, for the description of the parent run."""
    knee = document["knee"]
    lines = [f"{TITLE}", "", "| family | trials | collapsed | points | hypervolume |", "|---|---|---|---|---|"]
    for family, row in document["families"].items():
        cells = (family, row["trials"], row["collapsed"], row["points"], f"{row['hypervolume']:.3f}")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", f"{len(document['frontier'])} points on the frontier of all families."]
    if knee:
        lines.append(
            f"Knee: {knee['trial']}, step {knee['step']}: unlearning {knee['unlearning']:.3f}, "
            f"retention {knee['retention']:.3f}."
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in document["notes"])])
