"""Files that a user gives lm-eval: rows in place of a task's data set, and folders of further tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gru_core.benchmarks.read import read_objects, text_of, texts_of
from gru_core.errors import InputError

PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
"""Kinds of values that a task file may hold."""
CODE_KEYS = ("class", "use_prompt", "custom_dataset", "unsafe_code")
"""Keys of a task file that have it run code, or read prompts from elsewhere."""


def read_choices(file: Path, choices: int | None = None) -> list[dict[str, Any]]:
    """Multiple-choice rows as WMDP and MMLU have them: ``question``, ``choices`` (a list), ``answer`` (a position in
    it, from 0). Other columns are left alone.

    Args:
        choices: how many every row must have; None: at least two.

    Raises:
        InputError: as :func:`~gru_core.benchmarks.read.read_objects`; a row of another form, by its line.
    """
    rows = []
    for place, item in read_objects(file):
        texts, answer = texts_of(item, "choices", place), item.get("answer")
        if len(texts) < 2 or (choices is not None and len(texts) != choices):
            raise InputError(f"{place}: column 'choices' has {len(texts)} entries, needed: {choices or 'at least 2'}")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
            raise InputError(f"{place}: column 'answer' must be a whole number from 0 to {len(texts) - 1}")
        rows.append({**item, "question": text_of(item, "question", place), "choices": list(texts), "answer": answer})
    return rows


def check_data(data: Mapping[str, str]) -> None:
    """InputError where a file of ``evaluate.lm_eval.data`` is not there."""
    for task, file in data.items():
        if not Path(file).expanduser().is_file():
            raise InputError(f"evaluate.lm_eval.data.{task}: there is no file {file!r}")


def local_task(entry: Any, file: str) -> Any:
    """lm-eval's index entry of a task, as it is but for its data set: the rows of ``file``, kept in memory.

    Raises:
        InputError: the entry is a group or a tag, or the file is bad.
    """
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.kind.name != "TASK":
        raise InputError(f"evaluate.lm_eval.data.{entry.name}: a {entry.kind.name.lower()}, allowed: a single task")
    task = load_yaml(entry.yaml_path) if entry.yaml_path else dict(entry.cfg)
    labels = task.get("doc_to_choice")
    rows = read_choices(Path(file).expanduser(), len(labels) if isinstance(labels, list) else None)
    split = task.get("test_split") or task.get("validation_split") or "test"
    table = datasets.DatasetDict({split: datasets.Dataset.from_list(rows)})

    def given(**_: Any) -> Any:
        return table

    shots = task.get("fewshot_config")
    unset = ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "fewshot_split")
    task |= {**dict.fromkeys(unset), "custom_dataset": given, "test_split": split}
    if isinstance(shots, dict):
        task["fewshot_config"] = {key: value for key, value in shots.items() if key != "split"}
    return replace(entry, yaml_path=None, cfg=task)


def refuse_code(folder: Path) -> None:
    """Reads every task file of a folder, and what they include, and refuses those that would run Python.

    Raises:
        InputError: no such folder, a malformed file, or one with a ``!function`` or a key of :data:`CODE_KEYS`.
    """
    if not folder.is_dir():
        raise InputError(f"evaluate.lm_eval.include_path: there is no folder {str(folder)!r}")
    seen: set[Path] = set()
    for file in sorted(folder.rglob("*.yaml")):
        _refuse_code(file, seen)


def _refuse_code(file: Path, seen: set[Path]) -> None:
    import yaml

    file = file.resolve()
    if file in seen:
        return
    seen.add(file)
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"evaluate.lm_eval.include_path: {file} is no task file ({type(error).__name__})") from None
    nodes: list[Any] = [root] if root is not None else []
    while nodes:
        node = nodes.pop()
        if node.tag not in PLAIN:
            raise _code(file, node, node.tag)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value in CODE_KEYS:
                    raise _code(file, key, key.value)
                if key.value == "include":
                    named = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    for each in named:
                        _refuse_code(file.parent / str(each.value), seen)
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _code(file: Path, node: Any, what: str) -> InputError:
    where = f"{file}, line {node.start_mark.line + 1}"
    return InputError(f"evaluate.lm_eval.include_path: {where}: {what} would run code, allowed: task files without it")
