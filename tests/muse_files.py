"""Self-made files in MUSE's layout: a few short articles, with what scores them."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "lagoon"]

NAMES = (
    "raw/forget", "raw/retain1", "raw/retain2", "privleak/forget", "privleak/retain", "privleak/holdout",
    "verbmem/forget", "knowmem/forget_qa", "knowmem/forget_qa_icl", "knowmem/retain_qa", "knowmem/retain_qa_icl",
)  # fmt: skip


def write_muse(folder: Path, words: int = 18) -> Path:
    """Eleven tables and the eight forget sets of the studies, as JSON Lines; articles of ``words`` words each.

    The texts of ``privleak`` are articles of ``raw`` (of ``retain2``, some), and ``verbmem`` is those of the forget
    set, cut in two.
    """
    draw = random.Random(11)

    def articles(name: str, count: int) -> list[dict[str, str]]:
        return [
            {"text": f"{name} {i} says " + " ".join(draw.choice(WORDS) for _ in range(words))} for i in range(count)
        ]

    def questions(name: str, count: int) -> list[dict[str, str]]:
        return [
            {"question": f"what is {name} {i}", "answer": " ".join(draw.choice(WORDS) for _ in range(5))}
            for i in range(count)
        ]

    parts = [articles(f"forget part {n}", 5) for n in range(1, 5)]
    retain1, retain2, holdout = articles("retain", 8), articles("other", 6), articles("unseen", 5)
    cut = [row["text"].split(" ") for row in parts[0]]
    tables = {
        "raw/forget": parts[0], "raw/retain1": retain1, "raw/retain2": retain2,
        "privleak/forget": parts[0], "privleak/retain": retain2[:4], "privleak/holdout": holdout,
        "verbmem/forget": [{"prompt": " ".join(c[:8]), "gt": " " + " ".join(c[8:])} for c in cut],
        "knowmem/forget_qa": questions("forget", 5), "knowmem/forget_qa_icl": questions("shown", 2),
        "knowmem/retain_qa": questions("retain", 4), "knowmem/retain_qa_icl": questions("told", 2),
    }  # fmt: skip
    for n in range(1, 5):
        tables[f"sust/forget_{n}"] = parts[n - 1]
        tables[f"scal/forget_{n}"] = [row for part in parts[:n] for row in part]
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder
