"""docs/clusters.md and its files: what can be checked on one machine is what Ray, and this project, would take."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines import cli_submit, kuberay, request
from tests.job_study import ROOT, no_cluster_in_environment  # noqa: F401
from tests.test_kuberay import validate

PAGE = ROOT / "docs" / "clusters.md"
LAUNCH = ROOT / "docs" / "clusters" / "ray-up.yaml"
IMAGE = ROOT / "docs" / "clusters" / "Dockerfile"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.S)


def launch() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(LAUNCH.read_text())
    return found


def ray_schema() -> dict[str, Any]:
    import ray

    found: dict[str, Any] = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    return found


def ray_starts() -> list[list[str]]:
    """Every ``ray start`` of the page and of the launch file, as words."""
    config = launch()
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [shlex.split(line) for line in lines if re.search(r"\bray start\b", line)]


def test_the_launch_file_is_one_that_ray_takes() -> None:
    jsonschema.validate(launch(), ray_schema())
    for broken in ({**launch(), "head_ip": "10.0.0.1"}, {**launch(), "setup_commands": "true"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, ray_schema())


def test_ray_completes_the_launch_file_to_a_cluster_of_its_machines() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    full = prepare_config(launch())
    validate_config(full)
    (kind,) = full["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"], full["max_workers"]) == (2, 2, 2)
    assert full["head_start_ray_commands"] == launch()["head_start_ray_commands"]


def test_every_ray_start_has_a_token_a_shared_cache_and_options_that_exist() -> None:
    from ray.scripts.scripts import start

    options = {name for parameter in start.params for name in parameter.opts}
    assert len(ray_starts()) == 4
    for words in ray_starts():
        assert words[:2] == ["RAY_AUTH_MODE=token", "GRU_CACHE=/shared/gru-cache"]
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options, given - options
        assert len(given & {"--head", "--address"}) == 1
        assert "--dashboard-host" not in given  # listens on loopback


def test_the_token_is_for_its_owner_alone(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("sh") if "auth_token" in block]
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run(["sh", "-ec", f"umask 000\n{block}"], env=environment, check=True, cwd=tmp_path)
    file = tmp_path / ".ray" / "auth_token"
    assert re.fullmatch(r"[0-9a-f]{64}\n", file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert all(line.startswith("gru submit ") for line in lines)
    return [shlex.split(line)[2:] for line in lines]


def test_every_command_on_the_page_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = set()
    for words in commands():
        cut = words.index("--")
        if words[0] == "--kuberay":
            pairs = iter(words[1:cut])
            options: Any = {option.removeprefix("--"): next(pairs) for option in pairs}
            _, job = kuberay.manifest(words[cut + 1 :], kuberay.Options(**options), lambda line: None)
            validate(job)
            (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            assert workers["replicas"] == 4
        else:
            assert words[:cut] == ["--address", "http://127.0.0.1:8265"]
            assert request.parse(words[cut + 1 :]).config.output.dir == "/shared/runs/demo"
        kinds.add(words[0])
    assert kinds == {"--kuberay", "--address"}


def test_the_page_names_every_option_of_manifests() -> None:
    import typer

    command: Any = typer.main.get_command(cli_submit.submit_app)
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    pods = {"--image", "--pvc", "--mount", "--secret", "--working-dir", "--memory", "--name", "--namespace"}
    assert pods <= options
    named = set(re.findall(r"`(--[a-z-]+)[ `]", PAGE.read_text()))
    assert pods <= named
    assert named - options <= {"--resume"}


def test_the_image_has_ray_and_code_as_they_are_here() -> None:
    lines = IMAGE.read_text().splitlines()
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    pinned = re.search(r"^ray==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert f"ARG RAY={pinned[1]}-py311" in lines
    if python == "py311":
        assert pinned[1] == version("ray")
    sources = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    assert all((ROOT / name).exists() for name in sources)
    assert {"gru_core", "pipelines", "tune_configs", "pyproject.toml"} <= sources


def test_links_of_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in headings if target.startswith("#") else (PAGE.parent / target).exists(), target
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).exists(), path
