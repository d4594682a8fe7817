"""``muse``: Machine Unlearning Six-Way Evaluation (Shi et al. 2024, arXiv 2407.06460): news articles and novels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gru_core.batch import Row
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.benchmarks.read import Located, positions, read_table, text_of
from gru_core.config import BenchmarkConfig
from gru_core.errors import ConfigError, InputError, unknown

REPOSITORY = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
"""Corpus to its hub data set."""

REQUESTS = {f"{subset}_{n}": (subset, f"forget_{n}") for subset in ("scal", "sust") for n in range(1, 5)}
"""Forget sets of the two studies: ``scal`` each contains the one before, ``sust`` are disjoint."""

SPLITS = tuple(f"{corpus}{request}" for corpus in REPOSITORY for request in ("", *(f"/{name}" for name in REQUESTS)))

SCORED = (
    ("raw", "retain1"), ("raw", "retain2"), ("privleak", "forget"), ("privleak", "retain"), ("privleak", "holdout"),
    ("verbmem", "forget"), ("knowmem", "forget_qa"), ("knowmem", "forget_qa_icl"), ("knowmem", "retain_qa"),
    ("knowmem", "retain_qa_icl"),
)  # fmt: skip
"""Tables (subset, split) that every forget set needs besides its own."""

Table = Sequence[Located]
Tables = Mapping[tuple[str, str], Table]


def load_muse(config: BenchmarkConfig) -> Benchmark:
    """Reads a forget set and all that scores it, from ``config.data_dir`` or from the hub.

    Rows are named by subset, split and position from 0, such as ``raw-forget:17``. All training rows are texts. The
    retain set is ``retain1``, on which MUSE's baselines train, and behind it ``retain2``, which the target model has
    seen as well and from which retention is scored: it stands in ``retain_scored``, so that it never trains unless
    ``retain.include_scored`` lets it.

    Scored sets: ``forget``, ``retain`` and ``holdout`` are the texts of ``privleak``, whose every token counts;
    ``verbmem`` are prompts with their true continuation; ``forget_knowmem`` and ``retain_knowmem`` are questions
    behind worked examples. They are the same for every forget set of a corpus.

    Raises:
        ConfigError: ``benchmark.retain_rows``, since the rows that score retention are not among the first ones.
        InputError: unknown split, a missing or bad file, a subset that the hub does not have.
    """
    wanted = _wanted(config.split)
    if config.retain_rows is not None:
        allowed = "null with benchmark muse (retention is scored on rows of their own; see retain.size)"
        raise ConfigError("benchmark.retain_rows", config.retain_rows, allowed)
    tables = _tables(config, config.split.partition("/")[0], wanted)
    forget, retain1, retain2 = (_texts(tables, *place) for place in wanted[:3])
    retain = tuple(map(_row, retain1 + retain2))
    scored = {
        **{name: _texts(tables, "privleak", name) for name in ("forget", "retain", "holdout")},
        "verbmem": _continuations(tables),
        **{f"{name}_knowmem": _questions(tables, f"{name}_qa") for name in ("forget", "retain")},
    }
    behind = frozenset(range(len(retain1), len(retain)))
    return Benchmark(
        name=f"muse/{config.split}",
        forget=tuple(map(_row, forget)),
        retain=retain,
        scored=scored,
        retain_scored=behind | positions(retain, scored["retain"]),
    )


def _row(row: EvalRow) -> Row:
    return Row(row.id, row.prompt, row.answer, row.kind)


# ---------------------------------------------------------------------------------------------------- tables


def _tables(config: BenchmarkConfig, corpus: str, wanted: Sequence[tuple[str, str]]) -> Tables:
    if config.data_dir is None:
        return _from_hub(corpus, wanted)
    folder = Path(config.data_dir).expanduser()
    if not folder.is_dir():
        raise InputError(f"benchmark.data_dir: {folder} is not a folder")
    there = {(subset, split): _files(folder / subset, split) for subset, split in wanted}
    missing = [f"{subset}/{split}" for (subset, split), found in there.items() if not found]
    if missing:
        needed = ", ".join(f"{subset}/{split}" for subset, split in wanted)
        raise InputError(f"benchmark.data_dir {folder}: {', '.join(missing)} missing (needed: {needed})")
    return {place: [row for file in found for row in read_table(file)] for place, found in there.items()}


def files(folder: Path, split: str) -> list[Path]:
    """Every file in ``folder`` that ``benchmark.split: split`` reads; those of tables that are not there are left out.

    Raises:
        InputError: unknown split; as :func:`_files`.
    """
    return [path for subset, name in _wanted(split) for path in _files(folder / subset, name)]


def _wanted(split: str) -> tuple[tuple[str, str], ...]:
    """The tables of a split, that of its forget set first."""
    if split not in SPLITS:
        raise unknown("split of benchmark muse", split, SPLITS)
    return (REQUESTS.get(split.partition("/")[2], ("raw", "forget")), *SCORED)


def _files(folder: Path, split: str) -> tuple[Path, ...]:
    """The files of a table: ``<split>.jsonl``, ``.json`` or ``.parquet``, or the hub's numbered Parquet files
    ``<split>-00000-of-00002.parquet``; none where the table is not there.

    Raises:
        InputError: a table in more than one form, or with some of its numbered files missing.
    """
    forms: list[tuple[Path, ...]] = [
        (path,) for end in ("jsonl", "json", "parquet") if (path := folder / f"{split}.{end}").is_file()
    ]
    numbered = tuple(sorted(folder.glob(f"{split}-[0-9]*-of-[0-9]*.parquet")))
    if numbered:
        forms.append(numbered)
        total = {int(path.stem.rpartition("-of-")[2]) for path in numbered}
        if total != {len(numbered)}:
            raise InputError(f"{folder}: {split} has {len(numbered)} of {max(total)} Parquet files")
    if len(forms) > 1:
        raise InputError(f"{folder}: {split} is there in {len(forms)} forms ({', '.join(f[0].name for f in forms)})")
    return forms[0] if forms else ()


def _from_hub(corpus: str, wanted: Sequence[tuple[str, str]]) -> Tables:
    import datasets

    repository = REPOSITORY[corpus]
    if corpus == "books" and wanted[0][0] in ("scal", "sust"):
        raise InputError(
            f"benchmark.split: {repository} has no subset {wanted[0][0]}, only {REPOSITORY['news']} has;"
            " set benchmark.data_dir to a local folder that has one"
        )
    tables = {}
    for subset, split in wanted:
        try:
            table = datasets.load_dataset(repository, subset, split=split)
        except Exception as error:  # the hub's client raises from five libraries; the cause stays attached
            raise InputError(
                f"{repository} ({subset}, {split}) cannot be loaded from the hub ({type(error).__name__});"
                " set benchmark.data_dir to a local folder of its files"
            ) from error
        tables[subset, split] = [(f"{repository} {subset}/{split}, row {i}", row) for i, row in enumerate(table)]
        if not tables[subset, split]:
            raise InputError(f"{repository} {subset}/{split} is empty: at least one row is needed")
    return tables


# ------------------------------------------------------------------------------------------------------ rows


def _rows(tables: Tables, subset: str, split: str, make: Callable[[str, Located], EvalRow]) -> tuple[EvalRow, ...]:
    return tuple(make(f"{subset}-{split}:{i}", row) for i, row in enumerate(tables[subset, split]))


def _texts(tables: Tables, subset: str, split: str) -> tuple[EvalRow, ...]:
    def make(row_id: str, located: Located) -> EvalRow:
        place, item = located
        return EvalRow(row_id, "", text_of(item, "text", place), "text")

    return _rows(tables, subset, split, make)


def _continuations(tables: Tables) -> tuple[EvalRow, ...]:
    def make(row_id: str, located: Located) -> EvalRow:
        place, item = located
        return EvalRow(row_id, text_of(item, "prompt", place), text_of(item, "gt", place), "completion")

    return _rows(tables, "verbmem", "forget", make)


def _questions(tables: Tables, split: str) -> tuple[EvalRow, ...]:
    """Questions behind the worked examples of ``<split>_icl``, as MUSE's own evaluation joins them."""
    examples = [_question_answer(row) for row in tables["knowmem", f"{split}_icl"]]
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)

    def make(row_id: str, located: Located) -> EvalRow:
        question, answer = _question_answer(located)
        return EvalRow(row_id, f"{shots}Question: {question}\nAnswer: ", answer, "completion")

    return _rows(tables, "knowmem", split, make)


def _question_answer(located: Located) -> tuple[str, str]:
    place, item = located
    return text_of(item, "question", place), text_of(item, "answer", place)
