"""MLflow as a store of experiments, runs and histories: the one place that imports mlflow.

Runs never talk to MLflow; they write journals (``pipelines.journal``), which ``pipelines.courier`` delivers
from the driver. A metric that stands in MLflow with the same key, step, value and time is not stored twice.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gru_core.errors import InputError
from pipelines import journal
from pipelines.stores import check, hide, resolve_uri, sqlite_file

__all__ = ["Mlflow", "check", "hide", "resolve_uri"]

Point = tuple[str, int, float, int]
"""A metric: key, step, value, time in milliseconds."""

KEY = "gru.key"
PARENT = "mlflow.parentRunId"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Lets MLflow's pages open on runs and curves, not on the tools for language model applications."""
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for every run that ends
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # alembic and store messages while a database is made
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # delivery tries again by itself; MLflow would for minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Mlflow:
    """A tracking store: experiments, runs, histories.

    Args:
        uri: from :func:`resolve_uri`. Nothing is sent before the first call.
    """

    def __init__(self, uri: str) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        for noisy in ("alembic", "urllib3.connectionpool"):
            if logging.getLogger(noisy).level == logging.NOTSET:
                logging.getLogger(noisy).setLevel(logging.ERROR)
        from mlflow import MlflowClient

        self.uri = uri
        if (file := sqlite_file(uri)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.client = MlflowClient(tracking_uri=uri)
        except Exception as error:
            raise InputError(f"the MLflow store {hide(uri)} cannot be opened: {reason(error)}") from None

    def ensure_experiment(self, name: str) -> str:
        """The id of the experiment, created where missing. Call it once, in the driver.

        A database store keeps artifacts in the folder ``mlartifacts`` next to its file; a server decides itself.

        Raises:
            InputError: the experiment was deleted, or the store refuses.
        """
        try:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                return self._create(name)
        except Exception as error:
            raise InputError(f"MLflow at {hide(self.uri)}: experiment {name!r}: {reason(error)}") from None
        if found.lifecycle_stage != "active":
            where = f"MLflow at {hide(self.uri)}"
            raise InputError(f"{where}: experiment {name!r} was deleted; restore it or set track.experiment")
        return found.experiment_id

    def _create(self, name: str) -> str:
        location = None
        if not self.uri.startswith(("http", "databricks")):
            base = sqlite_file(self.uri)
            location = ((base.parent if base else Path.cwd()) / "mlartifacts").as_uri()
        from mlflow.exceptions import MlflowException

        try:
            return self.client.create_experiment(name, artifact_location=location, tags=KIND)
        except MlflowException:
            found = self.client.get_experiment_by_name(name)  # somebody else was faster
            if found is None:
                raise
            return found.experiment_id

    def find(self, name: str) -> str:
        """The id of the run with this id or, failing that, the newest one with this name.

        Raises:
            InputError: there is none.
        """
        from mlflow.exceptions import MlflowException

        if re.fullmatch(r"[0-9a-f]{32}", name):
            with suppress(MlflowException):
                return self.client.get_run(name).info.run_id
        experiments = [each.experiment_id for each in self.client.search_experiments()]
        quoted = name.replace("'", "\\'")
        runs = self.client.search_runs(
            experiments, f"attributes.run_name = '{quoted}'", max_results=50, order_by=["attributes.start_time DESC"]
        )
        parents = [run.info.run_id for run in runs if PARENT not in run.data.tags]
        if not parents:
            raise InputError(
                f"no search folder {name!r}, and no run with this id or name in MLflow at {hide(self.uri)}"
            )
        return parents[0]

    def by_key(self, experiment_id: str, key: str) -> str | None:
        """The id of the run that was made from the journal with this key."""
        runs = self.client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def tags(self, run_id: str) -> dict[str, str] | None:
        """The run's tags; None where the run is not there, or deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run.data.tags if run.info.lifecycle_stage == "active" else None

    def children(self, run_id: str) -> list[str]:
        """Ids of the runs under a parent run, oldest first."""
        experiment = self.client.get_run(run_id).info.experiment_id
        found: list[str] = []
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [experiment], f"tags.`{PARENT}` = '{run_id}'", max_results=1000,
                order_by=["attributes.start_time ASC"], page_token=token,
            )  # fmt: skip
            found += [run.info.run_id for run in page]
            token = page.token
            if not token:
                return found

    def record(self, run_id: str, prefix: str = "eval/") -> tuple[journal.Record, int]:
        """A run as its journal would tell it (metrics under ``prefix`` only), and the time of its last metric."""
        run = self.client.get_run(run_id)
        metrics: dict[int, dict[str, float]] = {}
        last = 0
        for key in sorted(key for key in run.data.metrics if key.startswith(prefix)):
            for metric in sorted(self.client.get_metric_history(run_id, key), key=lambda each: each.timestamp):
                metrics.setdefault(metric.step, {})[key] = metric.value
                last = max(last, metric.timestamp)
        tags = {key: value for key, value in run.data.tags.items() if key.startswith("gru.")}
        params = {key: value_of(text) for key, text in run.data.params.items()}
        record = journal.Record(run.info.run_name, tags, params, dict(sorted(metrics.items())), tags.get("gru.status"))
        return record, last

    def times(self, run_id: str) -> tuple[int | None, int | None]:
        """Start and end of a run, milliseconds since 1970; None where it has none yet."""
        info = self.client.get_run(run_id).info
        return info.start_time, info.end_time

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Point] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Logs metrics, parameters and tags in as few requests as MLflow allows.

        Returns:
            Names of parameters that were cut to MLflow's length.
        """
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH
        from mlflow.utils.validation import MAX_PARAMS_TAGS_PER_BATCH as SOME

        texts = {key_of(key): text_of(value) for key, value in (params or {}).items()}
        cut = [key for key, text in texts.items() if len(text) > MAX_PARAM_VAL_LENGTH]
        for part in chunks(list(texts.items()), SOME):
            self.client.log_batch(run_id, params=[Param(key, text[:MAX_PARAM_VAL_LENGTH]) for key, text in part])
        for tag_part in chunks(list((tags or {}).items()), SOME):
            self.client.log_batch(run_id, tags=[RunTag(key_of(k), v[:MAX_TAG_VAL_LENGTH]) for k, v in tag_part])
        for some in chunks(list(metrics), MAX_METRICS_PER_BATCH):
            batch = [Metric(key_of(key), value, time_ms, step) for key, step, value, time_ms in some]
            self.client.log_batch(run_id, metrics=batch)
        return cut

    def upload(self, run_id: str, path: Path, under: str | None = None) -> None:
        """Stores a file, or a folder with all that is in it, as an artifact."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), artifact_path=f"{under}/{path.name}" if under else path.name)
        else:
            self.client.log_artifact(run_id, str(path), artifact_path=under)


def chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    """Parts of at most ``size`` items, in order."""
    return (items[start : start + size] for start in range(0, len(items), size))


def key_of(key: str) -> str:
    """A key of parameter, metric or tag in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]


def text_of(value: Any) -> str:
    """A parameter as text, spelt as in the YAML config."""
    return value if isinstance(value, str) else json.dumps(value)


def value_of(text: str) -> journal.Scalar:
    """A parameter's text as the value it was."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool | None) else text


def reason(error: BaseException) -> str:
    """The first line of an error, short and without credentials."""
    lines = hide(str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
