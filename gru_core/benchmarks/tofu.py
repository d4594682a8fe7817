"""``tofu``: the Task of Fictitious Unlearning (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gru_core.batch import Row
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.benchmarks.read import Located, key, positions, read_objects, text_of, texts_of
from gru_core.config import BenchmarkConfig
from gru_core.errors import InputError, unknown

REPOSITORY = "locuslab/TOFU"

RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
"""Forget split to the retain split that is the rest of the 4000 rows."""

HOLDOUT = {"forget01": "holdout01", "forget05": "holdout05", "forget10": "holdout10"}
"""Forget split to rows of the same form that no model was trained on (membership inference)."""

FACTS = {"authors": "real_authors_perturbed", "facts": "world_facts_perturbed"}


def load_tofu(config: BenchmarkConfig) -> Benchmark:
    """Reads the files of a forget split, from ``config.data_dir`` or from the hub.

    Training rows are named by split and position from 0, such as ``forget10:17`` (the key that published logs
    use), and so are the scored rows, which are the same rows with a paraphrase and five wrong answers. The
    rows behind ``authors`` and ``facts`` have three wrong answers and no paraphrase; they are the background.
    Of a folder, the file of the holdout rows may be absent; the benchmark then has no ``holdout`` set.

    Raises:
        InputError: unknown split, a missing or bad file, a scored row that is in no training file.
    """
    if config.split not in RETAIN_OF:
        raise unknown("split of benchmark tofu", config.split, RETAIN_OF)
    forget_name, retain_name = config.split, RETAIN_OF[config.split]
    names = {
        "forget": forget_name,
        "retain": retain_name,
        "scored forget": f"{forget_name}_perturbed",
        "scored retain": "retain_perturbed",
        **FACTS,
        "holdout": HOLDOUT[config.split],
    }
    tables = _from_folder(Path(config.data_dir).expanduser(), names) if config.data_dir else _from_hub(names)
    forget, retain = _rows(tables["forget"], forget_name), _rows(tables["retain"], retain_name)
    scored = {
        "forget": _scored(tables["scored forget"], forget),
        "retain": _scored(tables["scored retain"], retain),
        **{name: _fact_rows(tables[name], name) for name in FACTS},
    }
    if "holdout" in tables:
        scored["holdout"] = tuple(EvalRow(r.id, r.prompt, r.answer) for r in _rows(tables["holdout"], names["holdout"]))
    return Benchmark(
        name=f"tofu/{config.split}",
        forget=forget,
        retain=retain,
        scored=scored,
        background=tuple(Row(row.id, row.prompt, row.answer) for name in FACTS for row in scored[name]),
        retain_scored=positions(retain, scored["retain"]),
    )


def files(folder: Path, split: str) -> list[str]:
    """Names of the files in ``folder`` that ``benchmark.split: split`` reads."""
    parts = [split, RETAIN_OF[split], f"{split}_perturbed", "retain_perturbed", *FACTS.values()]
    optional = [HOLDOUT[split]] if (folder / f"{HOLDOUT[split]}.json").is_file() else []
    return [f"{part}.json" for part in parts + optional]


def _from_folder(folder: Path, names: Mapping[str, str]) -> dict[str, list[Located]]:
    files = {part: folder / f"{name}.json" for part, name in names.items()}
    if not files["holdout"].is_file():
        del files["holdout"]
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        needed = ", ".join(path.name for part, path in files.items() if part != "holdout")
        raise InputError(f"benchmark.data_dir {folder}: {', '.join(missing)} missing (needed: {needed})")
    return {part: read_objects(path) for part, path in files.items()}


def _from_hub(names: Mapping[str, str]) -> dict[str, list[Located]]:
    import datasets

    tables = {}
    for part, name in names.items():
        try:
            table = datasets.load_dataset(REPOSITORY, name, split="train")
        except Exception as error:  # the hub's client raises from five libraries; the cause stays attached
            raise InputError(
                f"{REPOSITORY} ({name}) cannot be loaded from the hub ({type(error).__name__});"
                " set benchmark.data_dir to a local folder of its JSON files"
            ) from error
        tables[part] = [(f"{REPOSITORY} {name}, row {i}", row) for i, row in enumerate(table)]
        if not tables[part]:
            raise InputError(f"{REPOSITORY} {name} is empty: at least one row is needed")
    return tables


def _question_answer(item: Mapping[str, Any], place: str) -> tuple[str, str]:
    return text_of(item, "question", place), text_of(item, "answer", place)


def _rows(table: Sequence[Located], name: str) -> tuple[Row, ...]:
    return tuple(Row(f"{name}:{i}", *_question_answer(item, place)) for i, (place, item) in enumerate(table))


def _scored(table: Sequence[Located], rows: Sequence[Row]) -> tuple[EvalRow, ...]:
    """Perturbed rows under the id of the training row that they score."""
    ids = {key(row): row.id for row in reversed(rows)}  # of repeated rows the first one names
    found = []
    for place, item in table:
        question, answer = _question_answer(item, place)
        row_id = ids.get(key(Row("", question, answer)))
        if row_id is None:
            split = rows[0].id.split(":")[0]
            raise InputError(f"{place}: this question with this answer is not in {split}: files of two versions?")
        paraphrase = text_of(item, "paraphrased_answer", place)
        wrong = texts_of(item, "perturbed_answer", place)
        found.append(EvalRow(row_id, question, answer, paraphrase=paraphrase, perturbed=wrong))
    return tuple(found)


def _fact_rows(table: Sequence[Located], name: str) -> tuple[EvalRow, ...]:
    return tuple(
        EvalRow(f"{name}:{i}", *_question_answer(item, place), perturbed=texts_of(item, "perturbed_answer", place))
        for i, (place, item) in enumerate(table)
    )
