"""The best model of a run so far, by the rule of ``evaluate.best``, kept beside the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gru_core.config import BestConfig
from gru_core.parallel import Group

NAME, MODEL = "best.json", "best"
"""Which step was best, with its scores and the rule; and the folder of its model."""


def better(new: Mapping[str, Any], old: Mapping[str, Any] | None, rule: BestConfig) -> bool:
    """Whether ``new`` takes the place of ``old``: enough of the one score, more of the other; ties go to more of the
    first, then to the earlier step. Step 0 is no candidate: a model that was left alone.

    Args:
        new, old: ``{"step", "unlearning", "retention"}``; None: nothing was good enough so far.
    """
    most, floor = rule.maximise, rule.other
    if new["step"] == 0 or new[floor] < rule.at_least:
        return False
    return old is None or (new[most], new[floor]) > (old[most], old[floor])


class Best:
    """The choice as all ranks make it, in step; what was chosen before a restart stands in the folder."""

    def __init__(self, rule: BestConfig | None, folder: Path, group: Group) -> None:
        self.rule, self.file, self.group = rule, folder / NAME, group
        self.found: dict[str, Any] | None = None
        if rule is not None:
            here = json.loads(self.file.read_text()) if group.rank == 0 and self.file.exists() else None
            self.found = group.gather(here)[0]

    def takes(self, step: int, scores: Mapping[str, float]) -> bool:
        """Whether the model as it stands after ``step`` is the best so far; then it is to be kept."""
        if self.rule is None:
            return False
        mine = {"step": step, **{name: scores[name] for name in ("unlearning", "retention")}}
        point = self.group.gather(mine)[0]  # keeping a model is for all ranks or for none
        if not better(point, self.found, self.rule):
            return False
        self.found = {**point, "rule": self.rule.said}
        return True

    def tags(self) -> dict[str, str]:
        """What the record of the run says of it."""
        if self.rule is None:
            return {}
        return {"gru.best": f"step {self.found['step']}" if self.found else "none", "gru.best.rule": self.rule.said}

    def store(self) -> None:
        """On rank 0, behind the model: what stands in :data:`MODEL` from now on."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.rename(self.file)
