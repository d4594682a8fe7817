"""Processes compared on a machine that other work shares: they take short turns, so that a slow minute is slow for all.

A process says ``ready`` on a line of its own when it has loaded what it needs, begins to work when it is sent a line,
and from then on prints nothing but a line of JSON at its end. While one has its turn the others are stopped (SIGSTOP).
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any


def in_turns(commands: Mapping[str, Sequence[str]], turns: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """What each command prints in the end, with ``seconds``: the sum of its turns.

    Args:
        turns: seconds of one turn of each; in proportion to what they take in all, they end together.
    """
    processes = {
        name: subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, words in commands.items()
    }
    try:
        return _raced(processes, turns)
    finally:
        for process in processes.values():
            process.kill()


def _raced(processes: Mapping[str, subprocess.Popen[str]], turns: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    for name, process in processes.items():
        assert process.stdin is not None
        assert process.stdout is not None
        if not any(line.strip() == "ready" for line in process.stdout):
            raise SystemExit(f"{name}: ended before it was ready")
        process.send_signal(signal.SIGSTOP)
        process.stdin.write("go\n")
        process.stdin.flush()
    found: dict[str, dict[str, Any]] = {}
    seconds = dict.fromkeys(processes, 0.0)
    while left := [name for name in processes if name not in found]:
        for name in left:
            process = processes[name]
            start = time.perf_counter()
            process.send_signal(signal.SIGCONT)
            ended, _, _ = select.select([process.stdout], [], [], turns[name])
            process.send_signal(signal.SIGSTOP)
            seconds[name] += time.perf_counter() - start
            if ended:
                process.send_signal(signal.SIGCONT)
                out, _ = process.communicate()
                if process.returncode:
                    raise SystemExit(f"{name}: exit status {process.returncode}")
                found[name] = json.loads(out.splitlines()[-1]) | {"seconds": seconds[name]}
    return found
