"""What a submitted job takes along: our code, the resolved config, the small inputs that it names. Nothing else.

The package is a folder of copies (links are followed), so that what is sent is what lies in it::

    config.yaml  find_python.sh  gru_core/  pipelines/  tune_configs/  inputs/KEY/...
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import settings
from pipelines.inputs import without_secrets

LIMIT = 50 * 2**20
"""Bytes that a package may hold. Ray itself takes 100 MiB, and keeps a package in the head's memory."""

CODE = ("gru_core", "pipelines", "tune_configs")
MODELS = ("model.path", "retain_model", "prepare.base", "evaluate.start")
TOKENIZER = "model.tokenizer"
_MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")

FIND_PYTHON = """\
# Runs its arguments with the Python of Ray's own workers, which the command line of the raylet above us names:
# the PATH of a cluster's processes need not hold the environment that Ray was started from.
process=$PPID
while [ "${process:-0}" -gt 1 ]; do
  command=$(tr '\\0' '\\n' < "/proc/$process/cmdline" 2>/dev/null | sed -n 's/^--python_worker_command=//p')
  [ -n "$command" ] && break
  process=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$process/status" 2>/dev/null)
done
case $command in
  '"'*) python=${command#?}; python=${python%%'"'*} ;;
  *) python=${command%% *} ;;
esac
[ -x "$python" ] || python=$(command -v python3 || command -v python)
exec "$python" "$@"
"""


@dataclass(frozen=True)
class Input:
    """A file or folder that the config names.

    Attributes:
        key: dotted config key.
        path: absolute path on the client (or, where the client has none such, on the cluster).
        files: name in the folder (or of the file) to the file on the client; empty where it is not there.
    """

    key: str
    path: Path
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def listing(self) -> dict[str, int]:
        """Name to bytes: how the cluster tells whether it has the same files."""
        return {name: path.stat().st_size for name, path in self.files.items()}


@dataclass(frozen=True)
class Package:
    """A folder that is ready to be sent.

    Attributes:
        uploaded: dotted config key to the path, within the package, of the input that went along.
        remote: inputs that the cluster must already have at the same path.
        size: bytes of everything in it.
    """

    folder: Path
    uploaded: dict[str, str]
    remote: tuple[Input, ...]
    size: int

    def overrides(self) -> str:
        """``--set`` words for the shell of the job, which starts in the unpacked package.

        Absolute paths, because trials and training workers run in folders of their own.
        """
        return "".join(f' --set {key}="$PWD"/{shlex.quote(path)}' for key, path in self.uploaded.items())


def build(config: RunConfig, folder: Path) -> Package:
    """Fills the empty ``folder``. ``config`` is what the job is to run; its input paths are the client's.

    Raises:
        InputError: a path that is not there, a folder that holds no model, or something that is no plain file.
    """
    size = _copy_code(folder)
    (folder / "find_python.sh").write_text(FIND_PYTHON, encoding="utf-8")
    uploaded, remote = {}, []
    inputs = sorted(find_inputs(config), key=lambda item: (item.key in MODELS, item.size))
    for item in inputs:
        if not item.files or size + item.size > LIMIT:
            remote.append(item)
            continue
        target = Path("inputs") / item.key
        for name, source in item.files.items():
            (folder / target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / target / name)
        single = item.path.is_file()
        uploaded[item.key] = str(target / item.path.name if single else target)
        size += item.size
    remote += list(_searched_models(config))
    text = settings.to_yaml(without_secrets(settings.with_values(config, dict(uploaded))))
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return Package(folder, uploaded, tuple(remote), size + len(text.encode()))


def _copy_code(folder: Path) -> int:
    size = 0
    for name in CODE:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"the package {name} is not installed here")
        for root in map(Path, spec.submodule_search_locations):
            for source in sorted(root.rglob("*")):
                relative = source.relative_to(root)
                hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
                study = source.suffix == ".yaml" and len(relative.parts) == 1  # deeper ones are configs of results
                wanted = source.suffix == ".py" or study or source.name == "py.typed"
                if hidden or not wanted or not source.is_file():
                    continue
                target = folder / name / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                size += source.stat().st_size
    if size > LIMIT:
        raise InputError(f"the code here has {size / 2**20:.1f} MiB, a job takes {LIMIT / 2**20:.0f} MiB at most")
    return size


def find_inputs(config: RunConfig) -> Iterator[Input]:
    """The local inputs that ``config`` names; built-in data, hub ids and ``prepared`` are none.

    Raises:
        InputError: as :func:`build`.
    """
    values = settings.flat(config)
    for key in ("benchmark.forget", "benchmark.retain", "benchmark.holdout"):
        if values[key]:
            path = _absolute(values[key])
            yield Input(key, path, {path.name: path} if _present(key, path, values[key]) else {})
    if values["benchmark.data_dir"]:
        key = "benchmark.data_dir"
        path = _absolute(values[key])
        here = _present(key, path, values[key], folder=True)
        files = {name: path / name for name in _data_files(config, path)} if here else {}
        yield Input(key, path, _inside(key, path, files))
    yield from _tasks(config)
    for key in (*MODELS, TOKENIZER):
        if is_folder(values[key]):
            yield _model(key, values[key])


def _tasks(config: RunConfig) -> Iterator[Input]:
    """Files of lm-eval's tasks: rows, and a folder of task files."""
    own = config.evaluate.lm_eval
    for task, file in own.data.items():
        key, path = f"evaluate.lm_eval.data.{task}", _absolute(file)
        yield Input(key, path, {path.name: path} if _present(key, path, file) else {})
    if own.include_path:
        key, path = "evaluate.lm_eval.include_path", _absolute(own.include_path)
        here = _present(key, path, own.include_path, folder=True)
        found = sorted(path.rglob("*")) if here else []  # templates that tasks include have no ending
        files = {str(f.relative_to(path)): f for f in found if f.is_file() and f.suffix in (".yaml", "")}
        yield Input(key, path, _inside(key, path, files))


def is_folder(value: Any) -> bool:
    """Whether a model is named by a folder; otherwise it is ``prepared``, a hub id, or none."""
    if not value or value == "prepared":
        return False
    return Path(value).expanduser().exists() or value.count("/") != 1 or value.startswith((".", "/", "~"))


def _model(key: str, value: Any) -> Input:
    from gru_core.models import check_model_folder, check_tokenizer_folder

    path = _absolute(value)
    if not _present(key, path, value, folder=True):
        return Input(key, path)
    (check_tokenizer_folder if key == TOKENIZER else check_model_folder)(str(path), key)
    files = {
        item.name: item
        for item in sorted(path.iterdir())
        if item.suffix in _MODEL_FILES and (key != TOKENIZER or item.suffix != ".safetensors")
    }
    wanted = {name: item for name, item in files.items() if item.is_file() and name[0] != "."}
    return Input(key, path, _inside(key, path, wanted))


def _inside(key: str, folder: Path, files: dict[str, Path]) -> dict[str, Path]:
    """``files`` where none is a link out of the folder: nobody would expect what lies elsewhere to be sent.

    In the hub's cache a model's files are links to ``blobs`` beside its ``snapshots``: that is inside.

    Raises:
        InputError: a link that leads out.
    """
    real = folder.resolve()
    allowed = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    for name, path in files.items():
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise InputError(f"{key}: {folder / name} is a link out of its folder and is not sent; put the file there")
    return files


def _searched_models(config: RunConfig) -> Iterator[Input]:
    """Model folders that a search varies: they stay where they are, and the cluster must have them."""
    choices: list[tuple[str, Any]] = []
    spaces = {"search.space": config.search.space}
    for name, family in config.search.families.items():
        spaces[f"search.families.{name}.space"] = family.space
        choices.append((f"search.families.{name}.fixed.model.path", family.fixed.get("model.path")))
    for where, space in spaces.items():
        dimension = space.get("model.path")
        choices += [(f"{where}.model.path", value) for value in dimension or () if isinstance(dimension, list)]
    for key, value in choices:
        if not is_folder(value):
            continue
        if not Path(value).is_absolute():
            raise InputError(f"{key}: got {value!r}, allowed in a submitted search: hub ids and absolute paths")
        yield _model(key, value)


def _absolute(value: Any) -> Path:
    return Path(os.path.abspath(Path(value).expanduser()))  # noqa: PTH100 (resolve() would follow links)


def _present(key: str, path: Path, value: Any, *, folder: bool = False) -> bool:
    """Whether the client has ``path``. A missing absolute one may still be there on the cluster.

    Raises:
        InputError: a relative path that is not there, or another kind of thing.
    """
    if path.is_dir() if folder else path.is_file():
        return True
    what = "folder" if folder else "file"
    if path.exists():
        raise InputError(f"{key}: {str(value)!r} is no {what}")
    if not Path(value).expanduser().is_absolute():
        raise InputError(f"{key}: there is no {what} {str(value)!r}")
    return False


def _data_files(config: RunConfig, folder: Path) -> list[str]:
    """Names of the files that the benchmark reads from its ``data_dir``, which ``folder`` is."""
    from gru_core.benchmarks import muse, tofu, wmdp

    data = config.benchmark
    splits = config.requests.splits or (data.split,)
    if data.name == "muse":
        found = {path.relative_to(folder).as_posix() for split in splits for path in muse.files(folder, split)}
    elif data.name == "wmdp":
        found = {f"{part}.jsonl" for split in splits for part in wmdp.SPLITS[split]}
    else:
        found = {name for split in splits for name in tofu.files(folder, split)}
    return sorted(found)
