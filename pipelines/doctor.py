"""``gru doctor``: what is installed, what the machine has, what can be reached, and a fix for what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gru_core.config import TrackConfig
from gru_core.errors import InputError

PACKAGE = "gru-unlearning"
LIBRARIES = (
    "torch", "transformers", "safetensors", "tokenizers", "numpy", "datasets", "peft", "ray", "mlflow", "optuna",
    "moocore", "pyarrow", "scipy", "rouge-score", "typer", "rich", "pydantic", "pyyaml", "plotly", "matplotlib",
    "pandas", "jinja2",
)  # fmt: skip
"""What a full installation has; checked by name where the package's own metadata is not installed."""
GIB = 2**30
MEMORY_GIB, DISK_GIB = 6.0, 5.0
"""What the demo needs, and what two prepared models and their runs may fill."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        status: ``fail`` where something cannot work at all, ``warn`` where it works less well.
        fix: what to do; empty where nothing is to be done.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def run(*, address: str | None = None, tracking_uri: str | None = None) -> dict[str, Any]:
    """All checks: ``{"ok": nothing failed, "checks": [{name, status, detail, fix}]}``. Changes nothing."""
    checks = [python(), *libraries(), cpus(), memory(), disk(), gpus(), ray(address), mlflow(tracking_uri)]
    return {"ok": all(check.status != "fail" for check in checks), "checks": [asdict(check) for check in checks]}


def lines(document: Mapping[str, Any]) -> list[str]:
    """The checks for people, fixes below what they fix."""
    out = []
    for check in document["checks"]:
        out.append(f"{check['status']:<5} {check['name']:<13} {check['detail']}")
        if check["fix"]:
            out.append(f"{'':<5} {'':<13} fix: {check['fix']}")
    return [*out, "everything needed is there" if document["ok"] else "something needed is missing, see fail above"]


def python() -> Check:
    """The interpreter: one that is too old cannot even import this."""
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def libraries() -> Iterator[Check]:
    """Each library that the package asks for: there, and of a version that it names."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        asked = [Requirement(name) for name in LIBRARIES]
    for requirement in asked:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield library(requirement.name, str(requirement.specifier))


def library(name: str, wanted: str = "") -> Check:
    """One library by the name it is installed under; ``wanted`` is a version range such as ``>=2,<3``."""
    from packaging.specifiers import SpecifierSet

    fix = f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", fix)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(name, "fail", f"{version}, needed: {wanted}", fix)
    return Check(name, "ok", version)


def cpus() -> Check:
    """CPUs that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cpus", "ok", str(count))


def memory() -> Check:
    """Memory that is free, within the limit of the container where there is one."""
    total, free = _memory()
    detail = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < MEMORY_GIB * GIB:
        return Check("memory", "warn", detail, f"end other programs; the demo wants {MEMORY_GIB:.0f} GiB")
    return Check("memory", "ok", detail)


def _memory() -> tuple[float, float]:
    """Total and available bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = float(page * os.sysconf("SC_PHYS_PAGES"))
    free = total
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
        free = float(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        total = min(total, float(most))
        free = min(free, total - float(used.read_text()))
    return total, max(free, 0.0)


def disk() -> Check:
    """Free space in the working folder, where runs go."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    detail = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < DISK_GIB:
        return Check("disk", "warn", detail, "free some space, or work in another folder")
    return Check("disk", "ok", detail)


def gpus() -> Check:
    """GPUs as torch sees them; a driver that torch cannot use is worth a warning."""
    try:
        import torch
    except ImportError as error:
        return Check("gpus", "fail", f"torch cannot be imported ({error})", "pip install torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        shown = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names)
        return Check("gpus", "ok", f"{len(names)}: {shown}")
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch that suits the driver: https://pytorch.org/get-started/locally"
        return Check("gpus", "warn", f"an NVIDIA driver, but torch {torch.__version__} sees no GPU", fix)
    return Check("gpus", "ok", "none; everything runs on the CPU")


def ray(address: str | None) -> Check:
    """The cluster where one is named (``--address`` or ``RAY_ADDRESS``), else that Ray can be started here."""
    if address or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS"):
        return _guarded("ray cluster", lambda: _cluster(address), "")
    try:
        import ray as module
    except ImportError as error:
        return Check(
            "ray cluster", "fail", f"ray cannot be imported ({error})", "pip install 'ray[default,train,tune]'"
        )
    return Check("ray cluster", "ok", f"none named; ray {module.__version__} starts one in this machine when needed")


def _cluster(address: str | None) -> tuple[str, ...]:
    from pipelines.authentication import find_token
    from pipelines.cluster import connect

    open_to_all: list[str] = []
    found = connect(address, open_to_all.append)
    token = ", token found" if find_token() else ""
    return f"{found.address} answers, ray {found.client.get_version()}{token}", *open_to_all


def mlflow(tracking_uri: str | None) -> Check:
    """The tracking store: a server that answers, a database that can be written, or none yet."""
    from pipelines import stores

    def look() -> tuple[str, ...]:
        uri = stores.resolve_uri(TrackConfig(uri=tracking_uri))
        warnings: list[str] = []
        stores.check(uri, say=warnings.append)
        file = stores.sqlite_file(uri)
        made = " (made by the first run)" if file is not None and not file.exists() else ""
        return stores.hide(uri) + made, *warnings

    return _guarded("mlflow store", look, "start the server, or name another with --tracking-uri")


def _guarded(name: str, look: Callable[[], tuple[str, ...]], fix: str) -> Check:
    """What ``look`` tells (the detail, then warnings), or why it could not."""
    try:
        detail, *warnings = look()
        if warnings:
            what, _, remedy = warnings[0].removeprefix("warning: ").rpartition("; ")
            return Check(name, "warn", what, remedy)
        return Check(name, "ok", detail)
    except InputError as error:
        return Check(name, "fail", str(error), fix)
    except Exception as error:  # a library that fails in its own way is a finding, not a crash
        return Check(name, "fail", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", fix)
