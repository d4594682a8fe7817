"""A window in which lm-eval works quietly and for itself: nothing of it is printed or logged, the random state is as
before afterwards, and no code is fetched."""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub")
"""Silent meanwhile: lm-eval logs requests, and the hub's clients each of their attempts."""


class FetchedCode(RuntimeError):
    """Code would have been fetched from the hub and run."""


_lock = threading.Lock()
_depth = 0
_undo: list[tuple[Any, str, Any]] = []
_levels: list[tuple[logging.Logger, int]] = []
_random: list[Any] = []


@contextmanager
def closed() -> Iterator[None]:
    """The window; windows may overlap, also those of several threads."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _open()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _close()


def _open() -> None:
    _random[:] = [random.getstate(), np.random.get_state(), torch.random.get_rng_state()]
    if torch.cuda.is_initialized():
        _random.append(torch.cuda.get_rng_state_all())
    try:
        for logger in map(logging.getLogger, LOGGERS):
            _levels.append((logger, logger.level))
            logger.setLevel(logging.CRITICAL + 1)
        for holder, name, value in _replacements():
            _undo.append((holder, name, getattr(holder, name)))
            setattr(holder, name, value)
    except BaseException:
        _close()
        raise


def _close() -> None:
    while _undo:
        setattr(*_undo.pop())
    while _levels:
        logger, level = _levels.pop()
        logger.setLevel(level)
    random.setstate(_random[0])
    np.random.set_state(_random[1])
    torch.random.set_rng_state(_random[2])
    if len(_random) > 3:
        torch.cuda.set_rng_state_all(_random[3])


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Object, attribute, and what stands there meanwhile."""
    import datasets.utils.tqdm  # noqa: F401 (the module, which its class hides)
    import evaluate
    import lm_eval.api.metrics
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    ours = lm_eval.utils.env
    boxed = ImmutableSandboxedEnvironment(undefined=ours.undefined, keep_trailing_newline=ours.keep_trailing_newline)
    boxed.filters.update(ours.filters)
    yield lm_eval.utils, "env", boxed  # a task's templates: text, no programs
    yield evaluate, "load", _no_code
    yield lm_eval.api.task, "tqdm", _bare
    yield lm_eval.api.metrics, "bootstrap_stderr", _no_error  # it starts a process for every core, and prints
    yield sys.modules["datasets.utils.tqdm"], "_hf_datasets_progress_bars_disabled", True


def _no_code(*args: Any, **options: Any) -> Any:
    raise FetchedCode("code of a metric would be fetched and run")


def _bare(items: Any, **options: Any) -> Any:
    return items


def _no_error(*args: Any, **options: Any) -> float:
    return float("nan")
