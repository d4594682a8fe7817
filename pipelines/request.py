"""The command line behind ``gru submit --``, understood and checked on the client."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from gru_core.config import RunConfig
from gru_core.errors import InputError, unknown
from pipelines import package, requests, settings
from pipelines.stores import resolve_uri

COMMANDS = ("search", "unlearn", "requests", "prepare", "demo")


@dataclass(frozen=True)
class Request:
    """A command line, understood.

    Attributes:
        config: paths as the job needs them: absolute output folder, resolved tracking URI.
        shared_output: the output folder was given relative to the client's working folder.
        flags: words that go on to the job's command as they are.
    """

    command: str
    config: RunConfig
    shared_output: bool
    flags: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"submit {self.prog}: {message}")


def parse(arguments: list[str]) -> Request:
    """The command line behind ``gru submit --``, with its config resolved and its names checked.

    ``demo`` becomes the search that it is. Options win over ``--set``, ``--set`` over the file.

    Raises:
        InputError: a command that is no job, an unknown option, or a bad config.
    """
    if not arguments or arguments[0] not in COMMANDS:
        raise unknown("command for a job", arguments[0] if arguments else "", COMMANDS)
    command, *words = arguments
    parser = _Parser(prog=command, add_help=False, allow_abbrev=False)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    if command != "demo":
        parser.add_argument("-c", "--config", metavar="FILE")
    if command != "prepare":
        parser.add_argument("--output", metavar="DIR")
        parser.add_argument("--tracking-uri", metavar="URI")
        parser.add_argument("--overwrite", action="store_true")
        parser.add_argument("--resume", action="store_true")
    given = vars(parser.parse_args(words))
    source = "demo" if command == "demo" else given["config"]
    config = settings.load(source, given["overrides"])
    options = {"output.dir": given.get("output"), "track.uri": given.get("tracking_uri")}
    config = settings.with_values(config, {key: value for key, value in options.items() if value is not None})
    settings.check(config)
    if command == "requests":
        requests.check_settings(config)
        config = settings.with_values(config, {"benchmark.split": config.requests.splits[0]})  # each sets its own
    else:  # of the data, only what this command reads goes along
        config = settings.with_values(config, {"requests.splits": [], "requests.passes": None})
    folder = Path(config.output.dir).expanduser()
    absolute = {
        "output.dir": os.path.abspath(folder),  # noqa: PTH100 (resolve() would follow links)
        "track.uri": resolve_uri(config.track),
    }
    flags = tuple(f"--{name}" for name in ("overwrite", "resume", "json", "verbose") if given.get(name))
    resolved = settings.with_values(config, absolute)
    return Request("search" if command == "demo" else command, resolved, not folder.is_absolute(), flags)


def check_data(request: Request) -> None:
    """Loads the benchmark where its files are here, and checks what only the rows can tell.

    Raises:
        InputError: a missing or malformed file, metrics or a retain size that the rows cannot give.
    """
    from gru_core.benchmarks import load_benchmark, retain_subset
    from gru_core.metrics import check_metrics
    from gru_core.objectives import build_objective
    from gru_core.rectify import build_rule

    config = request.config
    build_objective(config.unlearn)
    build_rule(config.rectify)
    inputs = list(package.find_inputs(config))  # refuses missing files and folders
    local = config.benchmark.name not in ("tofu", "muse", "wmdp") or config.benchmark.data_dir is not None
    data = [item for item in inputs if item.key.startswith("benchmark.")]
    if not local or not all(item.files for item in data):
        return  # rows on a hub or only on the cluster: the job itself checks them
    for split in config.requests.splits or (config.benchmark.split,):
        benchmark = load_benchmark(replace(config.benchmark, split=split))
        if request.command != "prepare":
            check_metrics(config.evaluate, config.retain_model is not None, benchmark)
            retain_subset(benchmark, config.retain, config.train.seed)
