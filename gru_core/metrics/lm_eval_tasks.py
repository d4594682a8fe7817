"""Tasks of EleutherAI's lm-eval as metrics, ``lm_eval:TASK``: WMDP (arXiv 2403.03218), MMLU (arXiv 2009.03300), and
what else it knows. Needs the extra ``eval``.

The score is the task's accuracy (``acc``, else ``acc_norm``, ``exact_match``, its first metric where higher is better,
its first). Behind ``lm_eval:TASK/`` stand ``stderr`` (its standard error, where there is a formula for it), the task's
other metrics by name, of a group the score of each task and group below it, and for multiple choice ``chance``: what
guessing scores, 0.25 with four choices. As ``evaluate.unlearning`` that is where forgetting ends, unless there is a
retain model. Prompts are lm-eval's, without a chat template.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from gru_core.benchmarks.base import Benchmark
from gru_core.config import EvaluateConfig
from gru_core.errors import InputError
from gru_core.metrics.base import mean
from gru_core.metrics.lm_eval_closed import closed
from gru_core.metrics.lm_eval_files import check_data
from gru_core.metrics.lm_eval_load import FEWSHOT_SEED, Loaded, check_installed, directions, load, main_metric
from gru_core.metrics.subject import CHANCE, ModelMetric, Subject

PREFIX = "lm_eval:"
EXAMPLE = f"{PREFIX}TASK"


def metric(name: str) -> ModelMetric:
    """The metric of a task or group of lm-eval, such as ``wmdp_bio``.

    Raises:
        InputError: the name is empty.
    """
    if not name:
        raise InputError(f"metric {PREFIX!r}: the name of an lm-eval task is missing, such as {PREFIX}wmdp_bio")

    def run(subject: Subject) -> Mapping[str, float]:
        return _run(name, subject)

    def check(config: EvaluateConfig, benchmark: Benchmark | None) -> None:
        _check(name, config, benchmark)

    return ModelMetric("either", run, check)


def _check(name: str, config: EvaluateConfig, benchmark: Benchmark | None) -> None:
    """Before there is a benchmark only what takes no time; then the task is read, with its data."""
    check_installed(name)
    check_data(config.lm_eval.data)
    if benchmark is None:
        return
    loaded = load(name, config.lm_eval)
    for key, used in (("unlearning", config.unlearning), ("retention", config.retention)):
        if used == f"{PREFIX}{name}" and not loaded.higher:
            raise InputError(f"evaluate.{key}: {used} measures {loaded.main}, needed: a task where higher is better")


def _run(name: str, subject: Subject) -> dict[str, float]:
    """Asks the model; the same on every rank."""
    loaded = load(name, subject.config.lm_eval)
    tasks = {key: fresh(task) for key, task in loaded.tasks.items()}
    with closed():
        from lm_eval.evaluator import evaluate

        from gru_core.metrics.lm_eval_model import Adapter

        try:
            found = evaluate(
                lm=Adapter(subject, f"{PREFIX}{name}"), task_dict={"tasks": tasks, "groups": loaded.groups},
                limit=subject.config.lm_eval.limit, bootstrap_iters=1, log_samples=False,
            )  # fmt: skip
        except (InputError, RuntimeError, MemoryError):
            raise
        except Exception as error:  # of lm-eval and what it calls; their messages may hold what stands in a row
            raise RuntimeError(f"{PREFIX}{name}: lm-eval failed ({type(error).__name__})") from None
    return scores(loaded, found["results"], tasks)


def scores(loaded: Loaded, results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's results under this project's names; see the top of the file.

    Args:
        results: task or group to ``METRIC,FILTER`` to number, as lm-eval has it.
        tasks: the tasks that were asked, with their requests.
    """
    own, name = _numbers(results[loaded.name]), f"{PREFIX}{loaded.name}"
    worst = 0.0 if loaded.higher else sys.float_info.max  # of a diverged model: finite, and as bad as can be
    out = {name: own.pop(loaded.main, worst)}
    extra = {"stderr": own.pop(f"{loaded.main}_stderr", None), CHANCE: _chance(loaded, tasks), **own}
    for child, item in {**loaded.tasks, **loaded.groups}.items():
        if child != loaded.name and (metrics := directions(item)):
            extra[child] = _numbers(results[child]).get(main_metric(metrics))
    return out | {f"{name}/{label}": number for label, number in extra.items() if number is not None}


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a result by metric; where an answer is read in several ways, those of the first by the
    metric's name and those of another with the way behind it."""
    out: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, way = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            out[re.sub(r"[^\w.-]", "_", f"{metric}.{way}" if metric in out else metric)] = float(value)
    return out


def _chance(loaded: Loaded, tasks: Mapping[str, Any]) -> float | None:
    """Accuracy of guessing, weighted over tasks as their accuracies are; None where not all offer choices."""
    if loaded.main not in ("acc", "acc_norm") or any(t.OUTPUT_TYPE != "multiple_choice" for t in tasks.values()):
        return None
    rows: list[list[float]] = []
    for task in tasks.values():
        choices = Counter(request.doc_id for request in task.instances)
        twice = 2 if "acc_mutual_info" in task.higher_is_better() else 1  # each choice is asked without context, too
        rows.append([twice / n for n in choices.values()])
    group = loaded.groups.get(loaded.name)
    if group is None or next(a for a in group.aggregate_metric_list if a.metric == loaded.main).weight_by_size:
        return mean([value for each in rows for value in each])
    return mean([mean(each) for each in rows])


def fresh(task: Any) -> Any:
    """A task to ask once: requests are kept in it, and each evaluation draws the same examples."""
    own = copy.copy(task)
    if hasattr(own, "sampler"):
        own.sampler = copy.copy(own.sampler)
    own.set_fewshot_seed(seed=FEWSHOT_SEED)
    return own
