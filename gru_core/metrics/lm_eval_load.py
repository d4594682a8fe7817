"""Tasks of lm-eval by name: found, read with local files in place of hub data sets where they are given, and refused
where they would need more than a language model that answers greedily, or run code that is not lm-eval's own."""

from __future__ import annotations

import difflib
import importlib.util
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gru_core.config import LmEvalConfig
from gru_core.errors import ConfigError, InputError
from gru_core.metrics.lm_eval_closed import FetchedCode, closed
from gru_core.metrics.lm_eval_files import local_task, refuse_code

PREFERRED = ("acc", "acc_norm", "exact_match")
"""A task's score is the first of these that it has, else its first metric where higher is better, else its first."""
FEWSHOT_SEED = 1234
"""Of the choice of examples, as lm-eval's own command line has it."""
FETCHES = "measures with code that would be fetched from the hub, which is never done"
GREEDY = ("until", "do_sample", "temperature", "top_p", "top_k")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Loaded:
    """One task, or a group of them, ready to be asked; lm-eval's objects.

    Attributes:
        tasks: name to task; of a group every task below it.
        groups: name to group, itself and those below it; empty for a single task.
        main: the metric that is its score.
        higher: whether more of it is better.
    """

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    main: str
    higher: bool


_lock = threading.RLock()
_loaded: dict[str, Loaded] = {}
_all: dict[Path | None, Any] = {}


def load(name: str, config: LmEvalConfig) -> Loaded:
    """Reads a task or group with its data; the second time in a process it is there already.

    Raises:
        InputError: lm-eval is not installed, there is no such task, its data set cannot be had, or it cannot be run
            as the config or this adapter has it.
    """
    check_installed(name)
    key = json.dumps([name, asdict(config)], sort_keys=True)
    with _lock:
        if key not in _loaded:
            with closed():
                _loaded[key] = _load(name, config)
        return _loaded[key]


def check_installed(name: str) -> None:
    """InputError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f'lm_eval:{name} needs the package lm-eval: pip install "gru-unlearning[eval]"')


def main_metric(higher: Mapping[str, bool]) -> str:
    """The metric that is a task's score, of metric to whether higher is better; see :data:`PREFERRED`."""
    better = (metric for metric, more in higher.items() if more)
    return next((metric for metric in PREFERRED if metric in higher), next(better, next(iter(higher))))


def directions(item: Any) -> dict[str, bool]:
    """Metrics of a task, or those that a group has of all its tasks, with whether higher is better."""
    if hasattr(item, "higher_is_better"):
        return {metric: bool(more) for metric, more in item.higher_is_better().items()}
    below: dict[str, bool] = {}
    for task in item.get_all_tasks():
        below |= directions(task)
    return {each.metric: below.get(each.metric, False) for each in item.aggregate_metric_list or ()}


# ---------------------------------------------------------------------------------------------------- reading


def _load(name: str, config: LmEvalConfig) -> Loaded:
    manager = _manager(name, config)
    index = manager.task_index
    below = list(_below(name, index))
    if index[name].kind.name == "TAG":
        raise InputError(f"lm_eval:{name} is a tag and has no score of its own (its tasks: {_some(index[name].tags)})")
    before = {task: index[task] for task in config.data}
    try:
        index |= {task: local_task(index[task], file) for task, file in config.data.items()}
        found = manager.load([name])
    except InputError:
        raise
    except Exception as error:  # of any of the libraries below lm-eval; texts of rows may stand in their messages
        raise _not_loaded(name, [task for task in below if task not in config.data], error) from None
    finally:
        index |= before  # it may serve other tasks, with other data
    tasks, groups = found["tasks"], found.get("groups", {})
    higher = directions(groups.get(name) or tasks[name])
    if not higher:
        raise InputError(f"lm_eval:{name} is a group without a score of its own (its tasks: {_some(tasks)})")
    for task in tasks.values():
        _check(name, task)
        _examples(name, task, config)
    main = main_metric(higher)
    return Loaded(name, tasks, groups, main, higher[main])


def _manager(name: str, config: LmEvalConfig) -> Any:
    """An index of tasks that holds ``name`` and all below it: of the folders that are called like it where that is
    enough, for reading all of lm-eval's 14,000 files takes half a minute.

    Raises:
        InputError: no such task, with the nearest name.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    own = [Path(config.include_path).expanduser()] if config.include_path else []
    for folder in own:
        refuse_code(folder)
    wanted = (name, *config.data)
    parts = [task.split("_") for task in wanted]
    guesses = {root / "_".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}
    folders = sorted(folder for folder in guesses if folder.is_dir())
    manager = TaskManager(include_defaults=False, include_path=[*folders, *own]) if folders or own else None
    if manager is None or not all(_complete(task, manager.task_index) for task in wanted):
        whose = own[0] if own else None
        manager = _all[whose] = _all.get(whose) or TaskManager(include_path=own or None)
        for task in wanted:
            if task not in manager.task_index:
                near = difflib.get_close_matches(task, manager.all_tasks, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"unknown lm-eval task {task!r}{hint} (all of them: lm-eval ls tasks)")
    for entry in manager.task_index.values():
        if own and entry.yaml_path and entry.yaml_path.is_relative_to(own[0]):
            entry.yaml_path = None  # what was read without resolving Python functions is all that is used
    return manager


def _members(entry: Any) -> Iterator[str]:
    """Names of tasks, groups and tags right below an entry of the index."""
    if entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        yield from _named((entry.cfg or {}).get("task"))


def _named(items: Any) -> Iterator[str]:
    for item in items if isinstance(items, list) else ():
        if isinstance(item, str):
            yield item
        elif isinstance(item.get("task"), list):  # a group that stands within its parent
            yield from _named(item["task"])
        else:
            yield item.get("group") or item["task"]


def _complete(name: str, index: Mapping[str, Any]) -> bool:
    return name in index and all(_complete(each, index) for each in _members(index[name]))


def _below(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """Tasks at the ends below ``name``."""
    members = list(_members(index[name])) if name in index else []
    if not members:
        yield name
    for member in members:
        yield from _below(member, index)


def _some(names: Iterable[str], most: int = 3) -> str:
    chosen = sorted(names)
    return ", ".join(chosen[:most]) + (f", ... {len(chosen)} in all" if len(chosen) > most else "")


def _not_loaded(name: str, tasks: list[str], error: Exception) -> InputError:
    kind = type(error).__name__
    if isinstance(error, FetchedCode):
        return InputError(f"lm_eval:{name} {FETCHES}")
    if isinstance(error, ImportError):
        return InputError(f"lm_eval:{name} needs a further package ({kind}: {error.name or 'see lm-eval'})")
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("datasets", "huggingface_hub", "httpx"):
        return InputError(
            f"lm_eval:{name}: the data set of {_some(tasks)} cannot be loaded from the hub ({kind}); give local files: "
            f"evaluate.lm_eval.data: {{{tasks[0] if tasks else name}: FILE}} with rows {{question, choices, answer}}"
        )
    return InputError(f"lm_eval:{name} cannot be read: its files and its data do not go together ({kind})")


# --------------------------------------------------------------------------------------------------- checking


def _check(name: str, task: Any) -> None:
    """Refuses what the adapter cannot do."""

    def refuse(why: str) -> InputError:
        own = "" if task.task_name == name else f" (task {task.task_name})"
        return InputError(f"lm_eval:{name}{own} {why}")

    if getattr(task, "MULTIMODAL", False):
        raise refuse("asks about images or sound, only text can be asked")
    if getattr(task, "UNSAFE_CODE", False):
        raise refuse("runs code that the model writes, which is never done")
    known = getattr(task, "_metric_fn_list", {})
    if task.get_config("process_results") is None and any(function is None for function in known.values()):
        raise refuse(FETCHES)
    if task.OUTPUT_TYPE != "generate_until":
        return
    options = task.config.generation_kwargs or {}
    if options.get("do_sample") or float(options.get("temperature") or 0.0) > 0:
        raise refuse("samples its answers; only greedy answers can be given")
    if odd := [key for key in options if key not in (*GREEDY, *LENGTHS)]:
        raise refuse(f"generates with {odd[0]!r}; known are {', '.join((*GREEDY, *LENGTHS))}")


def _examples(name: str, task: Any, config: LmEvalConfig) -> None:
    """Sets the number of answered examples, as lm-eval's command line does: a task that is defined with none keeps
    none, one that does not say has none unless they are asked for."""
    asked, default = config.num_fewshot, task.get_config("num_fewshot")
    if asked is None or default == 0:
        task.set_config(key="num_fewshot", value=default or 0)
        return
    shots, split = task.fewshot_cfg, task.get_config
    apart = split("training_split") or (split("validation_split") and split("test_split"))
    if asked and shots.split is None and shots.samples is None and not apart:
        allowed = f"null or 0: {task.task_name} has no rows besides those it asks about"
        raise ConfigError("evaluate.lm_eval.num_fewshot", asked, allowed)
    task.set_config(key="num_fewshot", value=asked)
