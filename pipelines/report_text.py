"""The sentences of a report: what came out, in two lines, and what the numbers do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines import report
from pipelines.report_source import Told

Document = Mapping[str, Any]
FEW = 5
"""Runs of a family below which a difference between families says nothing."""


def percent(share: float) -> str:
    """A share in whole percent; one that is not quite nothing, or not quite all, does not read as if it were."""
    if 0 < share < 0.005:
        return "less than 1%"
    if 0.995 < share < 1:
        return "more than 99%"
    return f"{share:.0%}"


def plain(metric: object) -> str:
    """A metric's name without underscores."""
    return str(metric).replace("_", " ")


def lead(told: Told, step: int | None, found: Document | None) -> list[str]:
    """What came out, for whoever reads nothing else."""
    lines = []
    if found is not None:
        trials = sum(row["trials"] for row in found["families"].values())
        many = len(found["families"])
        lines.append(
            f"{trials} runs with different settings, in {many} {'family' if many == 1 else 'families'}, show what "
            f"forgetting costs. Shown here is one point of them: run {told.name}, after step {step}."
            if step is not None
            else f"{trials} runs were recorded; none was evaluated yet, so that nothing can be said."
        )
    elif step is None:
        lines.append("The run was not evaluated yet, so that nothing can be said.")
    if told.record.status in ("collapsed", "non_finite"):
        lines.append(f"{'That' if found is not None else 'The'} run {_ENDED[told.record.status]}")
    if step is not None:
        lines.append(_result(told, step))
    return lines


_ENDED = {
    "collapsed": "collapsed: it lost what it was to keep, and ended early. Its model is not one to use.",
    "non_finite": "ended early, at a loss that was no finite number.",
}


def _result(told: Told, step: int) -> str:
    values, params = told.record.metrics[step], told.record.params
    gone, left = percent(values["eval/unlearning"]), percent(values["eval/retention"])
    metric, ability = plain(params.get("evaluate.unlearning")), plain(params.get("evaluate.retention"))
    if step == 0:
        return "Only the starting model was evaluated: nothing is forgotten yet."
    kept = f"{left} of the starting model’s ability on what is to be kept is left ({ability})."
    if params.get("retain_model") is None:
        if (chance := guessing(told)) is not None:
            return f"Of what {metric} was at the start above guessing ({report.number(chance)}), {gone} is gone; {kept}"
        return f"On the rows to forget, {metric} has fallen by {gone} of its value at the start; {kept}"
    return (
        f"Of what sets the starting model apart from one that never saw the rows to forget, {gone} is gone "
        f"({metric}); {kept}"
    )


def guessing(told: Told) -> float | None:
    """What guessing scores in the study's forget metric, where that is known: forgetting then ends there."""
    return told.record.metrics.get(0, {}).get(f"eval/{told.record.params.get('evaluate.unlearning')}/chance")


def limits(told: Told, step: int | None, document: Document) -> list[tuple[str, str]]:
    """What the numbers do not say, each with a heading."""
    out = [("Forgotten is not erased", _erased(document["robustness"])), ("What still exists", _EXISTS)]
    out.append(("How sure the numbers are", _sure(told, document.get("frontier"))))
    rows = {row["set"]: row["rows"] for row in document["data"]["rows"]}
    asked = [f"{rows[key]} rows {use}" for key, use in _SCORED.items() if key in rows]
    limit = told.record.params.get("evaluate.rows")
    first = f" (of each set the first {limit})" if limit else ""
    scored = f"They rest on {' and '.join(asked)}{first}. " if asked else ""
    out.append(("What was measured", f"{scored}Abilities that no score asks for may have changed unseen."))
    if told.record.params.get("retain_model", "") is None:
        chance = guessing(told)
        end = "0" if chance is None else f"what guessing scores ({report.number(chance)})"
        out.append(("No retain model", _NO_RETAIN.format(end)))
    if document["data"]["include_scored"]:
        out.append(("Rows that score were trained on", _SCORED_TRAINED))
    if told.record.status == "collapsed":
        out.append(("The model collapsed", _COLLAPSED))
    return out


_SCORED = {"scored.forget": "that score forgetting", "scored.retain": "that score what is kept"}
_EXISTS = (
    "The starting model, checkpoints, caches, copies in shared storage and the data themselves stay until somebody "
    "deletes them; this report says nothing about them. A tokenizer that was trained on the data keeps its words."
)
_NO_RETAIN = (
    "There was no model that never saw the rows to forget to compare with. An unlearning score of 1 then means that "
    "the forget metric is {}, which such a model need not have."
)
_SCORED_TRAINED = (
    "The rows that score what is kept were also trained on to keep it (retain.include_scored, as published protocols "
    "do). Retention therefore reads higher than it is on other rows."
)
_COLLAPSED = (
    "A collapsed model answers everything badly. Its low scores on the rows to forget are a side effect of that, and "
    "not forgetting of these rows."
)


def _erased(robustness: Document) -> str:
    if robustness["rows"]:
        tried = "What was tried to bring it back stands in the section on robustness; nothing else was."
    else:
        tried = "Nothing of the kind was tried here (see the section on robustness)."
    return (
        "Low scores say that the behaviour that was measured is gone, not that nothing can be recovered. Other "
        "questions, further training, or whoever holds the weights may bring some of it back; unlearning is no proof "
        f"of erasure. {tried}"
    )


def _sure(told: Told, found: Document | None) -> str:
    seed = told.record.params.get("train.seed")
    one = f"Each number comes from one run with one seed ({seed})" if seed is not None else "Each number is of one run"
    text = f"{one}: another seed gives somewhat different numbers, and how different was not measured."
    if not found:
        return text
    few = min((row["trials"] for row in found["families"].values()), default=0)
    if few < FEW:
        text += f" With {few} run(s) in the smallest family no conclusion about families can be drawn."
    return text + (
        " The point shown was picked by the same scores that are reported for it, which flatters it a little: an "
        "evaluation on further rows (gru evaluate) is the better witness."
    )


def verdict(found: Document) -> str:
    """One sentence on whether rectification helped; empty where there are too few runs to say so."""
    few = min((row["trials"] for row in found["families"].values()), default=0)
    return report.best(found["hypervolume"], few, found["comparable"]) if few >= FEW else ""
