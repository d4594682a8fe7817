"""``gru submit --kuberay``: manifests against KubeRay's own schema, against the config, and what is refused."""

# ruff: noqa: F811 (a fixture that is imported has the name of the argument that asks for it)

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gru_core.errors import InputError
from pipelines import jobs, kuberay, request, settings
from pipelines.kuberay_checks import Options
from tests.job_study import ROOT, model_folder, no_cluster_in_environment, study, told  # noqa: F401

CRD = Path(__file__).parent / "data" / "kuberay" / "ray.io_rayjobs.yaml"
PODS = Options(image="registry.example/gru:1", pvc="models")
OUT = ["--output", "/shared/runs/one", "--tracking-uri", "http://mlflow.example:5000"]
NUMBERS = ["--set", "train.gpus_per_worker=0"]
SMALL = ["-c", "demo", *OUT, *NUMBERS]


def strict(schema: Any) -> Any:
    """The schema with every object that lists its fields closed, and int32 and int64 as bounds."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    if made.get("format") in ("int32", "int64"):
        made |= {"maximum": 2 ** (int(made["format"][3:]) - 1) - 1}
    return made


def schema() -> dict[str, Any]:
    found = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]
    assert found["name"] == "v1"
    made: dict[str, Any] = strict(found["schema"]["openAPIV3Schema"])
    return made


def validate(job: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema()).validate(job)


def made(*words: str, options: Options = PODS) -> tuple[dict[str, Any], dict[str, Any]]:
    """ConfigMap and RayJob, read back from the YAML that would be printed."""
    text = kuberay.to_yaml(kuberay.manifest(list(words), options, lambda line: None))
    config, job = yaml.safe_load_all(text)
    return config, job


def spec(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["rayClusterSpec"]
    return found


def group(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = spec(job)["workerGroupSpecs"]
    return found


def pod(template: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = template["template"]["spec"]["containers"]
    return found


FULL = Options(
    image="registry.example:5000/team/gru@sha256:0a1b", name="forget-1", namespace="research", pvc="models",
    mount="/mnt/models", secrets=("hub", "mlflow"), working_dir="s3://code/gru-1.zip", memory="32Gi",
)  # fmt: skip
COMMANDS = [
    (["demo", *OUT, *NUMBERS], PODS),
    (["unlearn", *SMALL, "--resume"], PODS),
    (["unlearn", *SMALL, "--set", "train.workers=4", "--set", "train.min_workers=2"], PODS),
    (["search", *SMALL, "--set", "search.concurrent=3"], PODS),
    (["prepare", "-c", "demo", *NUMBERS], PODS),
    (["unlearn", *SMALL[:2], "--output", "/mnt/models/one", *OUT[2:], "--set", "train.gpus_per_worker=2",
      "--set", "train.workers=2", "--json"], FULL),
]  # fmt: skip


@pytest.mark.parametrize(("words", "options"), COMMANDS)
def test_every_manifest_is_one_that_kuberay_takes(words: list[str], options: Options) -> None:
    config, job = made(*words, options=options)
    validate(job)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    name = job["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47
    assert config["metadata"]["name"] == f"{name}-config"
    assert config["metadata"].get("namespace") == job["metadata"].get("namespace") == options.namespace
    cluster = spec(job)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version("ray")
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def _without(job: dict[str, Any]) -> None:
    del spec(job)["workerGroupSpecs"][0]["template"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda job: job["spec"].update(entryPoint="python"),
        lambda job: job["spec"].update(backoffLimit="0"),
        lambda job: job["spec"].update(ttlSecondsAfterFinished=2**31),
        lambda job: spec(job)["authOptions"].update(mode="Token"),
        lambda job: spec(job)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda job: spec(job)["workerGroupSpecs"][0].update(minreplicas=1),
        lambda job: pod(group(job))["resources"]["limits"].update(cpu="two"),
        lambda job: pod(group(job)).update(volumes=[]),
        lambda job: pod(group(job))["volumeMounts"][0].pop("mountPath"),
        lambda job: job["spec"]["metadata"].update({"gru.command": 1}),
        lambda job: spec(job).pop("headGroupSpec"),
        _without,
    ],
)
def test_a_broken_manifest_fails_the_schema(damage: Any) -> None:
    _, job = made("unlearn", *SMALL, "--set", "train.workers=2")
    validate(job)
    damage(broken := copy.deepcopy(job))
    assert broken != job
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)


# ---------------------------------------------------------------------------------------- what the pods run


def test_pods_run_the_command_and_config_that_were_given() -> None:
    words = ["unlearn", *SMALL, "--set", "unlearn.lr=0.125", "--resume", "--json"]
    config, job = made(*words)
    sent = settings.from_dict(yaml.safe_load(config["data"]["config.yaml"]))
    assert sent == request.parse(words).config
    command = shlex.split(job["spec"]["entrypoint"])
    assert command == [
        "exec",
        "python",
        "-m",
        "pipelines",
        "unlearn",
        "-c",
        "/etc/gru/config.yaml",
        "--resume",
        "--json",
    ]
    head = spec(job)["headGroupSpec"]
    assert {"name": "config", "mountPath": "/etc/gru", "readOnly": True} in pod(head)["volumeMounts"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in head["template"]["spec"]["volumes"]
    runtime = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert runtime == {"env_vars": {**jobs.ENVIRONMENT, "GRU_CACHE": "/shared/gru-cache"}}


def test_a_longer_grace_period_reaches_ray_and_kubernetes() -> None:
    """Ray kills a job 20 seconds behind its grace period, and Kubernetes a pod after that."""
    _, job = made("unlearn", *SMALL, "--set", "train.workers=2", "--set", "train.grace=120.5")
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "141"
    for template in (spec(job)["headGroupSpec"], group(job)):
        assert template["template"]["spec"]["terminationGracePeriodSeconds"] > 141


@pytest.mark.slow
def test_the_entry_point_starts_the_command(tmp_path: Path) -> None:
    """The printed words, in a shell, with the printed config: refused only for what is not here."""
    config, job = made("unlearn", *SMALL, "--set", "unlearn.objective=ga", "--set", "model.path=/shared/gone")
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    words = job["spec"]["entrypoint"].replace("python", sys.executable).replace("/etc/gru", str(tmp_path))
    done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "/shared/gone" in done.stderr


def test_words_and_metadata_survive_the_shell_of_the_submitter(study: Path) -> None:
    """KubeRay puts metadata between double quotes of a bash command line, and the entry point there as it is."""
    _, job = made("unlearn", "-c", "demo", *NUMBERS, *OUT[2:], "--output", "/shared/runs/$(id)`id`")
    metadata = json.dumps(job["spec"]["metadata"])
    assert json.loads(metadata) == {"gru.command": "unlearn", "gru.tracking_uri": "http://mlflow.example:5000"}
    quoted = metadata.replace("\\", "\\\\").replace('"', '\\"')
    line = f'printf "%s\\n" "{quoted}" {job["spec"]["entrypoint"]}'
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [metadata, *job["spec"]["entrypoint"].split(" ")]


@pytest.mark.parametrize(
    ("values", "replicas", "cpus", "gpus"),
    [
        ({"train.workers": 4, "train.gpus_per_worker": 0}, (4, 4, 4), "1", None),
        ({"train.workers": 4, "train.min_workers": 2, "train.gpus_per_worker": 1}, (4, 2, 4), "1", "1"),
        ({"train.workers": 2, "train.gpus_per_worker": 8, "train.cpus_per_worker": 16}, (2, 2, 2), "16", "8"),
        ({"train.workers": 2, "train.gpus_per_worker": 0, "search.concurrent": 3}, (6, 6, 6), "1", None),
        ({"train.gpus_per_worker": 0, "search.concurrent": 3}, (3, 3, 3), "1", None),
        # two trials share each GPU, so that five need three pods
        ({"train.gpus_per_worker": 0.5, "search.concurrent": 5, "train.cpus_per_worker": 3,
          "model.path": "org/model", "retain_model": None}, (3, 3, 3), "6", "1"),
    ],
)  # fmt: skip
def test_pods_hold_the_workers(values: dict[str, Any], replicas: tuple[int, ...], cpus: str, gpus: str | None) -> None:
    words = [word for key, value in values.items() for word in ("--set", f"{key}={'null' if value is None else value}")]
    _, job = made("search", "-c", "demo", *OUT, *words)
    workers = group(job)
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == replicas
    limits = pod(workers)["resources"]["limits"]
    assert limits == pod(workers)["resources"]["requests"] == {"cpu": cpus} | ({"nvidia.com/gpu": gpus} if gpus else {})
    assert spec(job)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert "nvidia.com/gpu" not in pod(spec(job)["headGroupSpec"])["resources"]["limits"]


def test_a_run_without_workers_is_the_head_alone() -> None:
    _, job = made("unlearn", *SMALL)
    assert spec(job)["workerGroupSpecs"] == []
    assert spec(job)["headGroupSpec"]["rayStartParams"] == {}


def test_options_reach_every_pod() -> None:
    _, job = made(*COMMANDS[-1][0], options=FULL)
    for template in (spec(job)["headGroupSpec"], group(job)):
        found = pod(template)
        assert found["image"] == FULL.image
        assert found["envFrom"] == [{"secretRef": {"name": "hub"}}, {"secretRef": {"name": "mlflow"}}]
        assert {"name": "shared", "mountPath": "/mnt/models"} in found["volumeMounts"]
        claim = {"name": "shared", "persistentVolumeClaim": {"claimName": "models"}}
        assert claim in template["template"]["spec"]["volumes"]
        assert found["resources"]["limits"]["memory"] == "32Gi"
    runtime = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert runtime["working_dir"] == "s3://code/gru-1.zip"
    assert runtime["env_vars"]["GRU_CACHE"] == "/mnt/models/gru-cache"


# -------------------------------------------------------------------------------------------- what is refused


def refused(words: list[str], options: Options = PODS) -> str:
    with pytest.raises(InputError) as error:
        kuberay.manifest(words, options, lambda line: None)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-c", "demo", *NUMBERS, *OUT[2:]], "output.dir: a relative path means nothing on pods; allowed: a folder"),
        (["-c", "demo", *NUMBERS, *OUT[2:], "--output", "/home/me/runs"], "output.dir: got '/home/me/runs'"),
        (["-c", "demo", *NUMBERS, *OUT[2:], "--output", "/shared/../etc"], "output.dir: got '/etc'"),
        (["-c", "demo", *NUMBERS, *OUT[2:], "--output", "/shared2/x"], "under /shared, where --pvc is mounted"),
        (["-c", "demo", *NUMBERS, *OUT[2:], "--output", "/shared"], "such as --set output.dir=/shared/runs/name"),
        (["-c", "demo", *NUMBERS, *OUT[:2]], "mlflow.db lies on this machine; use a server"),
        (["-c", "demo", *NUMBERS, *OUT[:2], "--tracking-uri", "http://localhost:5000"], "means each pod itself"),
        (["-c", "demo", *NUMBERS, *OUT[:2], "--tracking-uri", "http://me:hunter2@h:1"], "put the whole URI into a"),
        (["-c", "demo", *OUT], "train.gpus_per_worker: got 'auto', allowed: a number with --kuberay"),
        (["-c", "demo", *OUT, "--set", "train.gpus_per_worker=1"], "train.workers: got 0, allowed: from 1 with GPUs"),
        ([*SMALL, "--set", "train.workers=2", "--set", "train.gpus_per_worker=0.5"], "train.gpus_per_worker: got 0.5"),
        (["-c", "study.yaml", *OUT, *NUMBERS], "benchmark.forget: 'forget rows.jsonl' is a path of this machine"),
        ([*SMALL, "--set", "model.path=/models/big"], "model.path: '/models/big' is a path of this machine"),
        ([*SMALL, "--set", "retain_model=/shared/../models"], "retain_model: '/shared/../models' is a path of this"),
        ([*SMALL, "--set", "prepare.base=small"], "prepare.base: 'small' is a path of this machine"),
        ([*SMALL, "--set", "model.system_prompt=see http://me:hunter2@h/"], "model.system_prompt: holds a user name"),
        ([*SMALL, "--set", "unlearn.objective=nop"], "did you mean 'npo'"),
    ],
)
def test_what_cannot_work_on_pods_is_one_line(study: Path, words: list[str], line: str) -> None:
    model_folder(study / "small", 10)
    said = refused(["unlearn", *words])
    assert line in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (Options(pvc="models"), f"--image: none given; name one with Ray {version('ray')} and gru in it, such as one"),
        (Options(image="a b", pvc="models"), "--image: got 'a b'"),
        (Options(image="i", pvc="Models"), "--pvc: got 'Models'"),
        (Options(image="i", pvc="m", secrets=("ok", "no_t")), "--secret: got 'no_t'"),
        (Options(image="i", pvc="m", namespace="-x"), "--namespace: got '-x'"),
        (Options(image="i", pvc="m", name="1st"), "--name: got '1st'"),
        (Options(image="i", pvc="m", name="a" * 48), "at most 47 characters"),
        (Options(image="i", pvc="m", mount="shared"), "--mount: got 'shared'"),
        (Options(image="i", pvc="m", mount="/etc/gru"), "--mount: got '/etc/gru'"),
        (Options(image="i", pvc="m", mount="/a/../b"), "--mount: got '/a/../b'"),
        (Options(image="i", pvc="m", memory="lots"), "--memory: got 'lots'"),
        (Options(image="i", pvc="m", working_dir="./code"), "--working-dir: got './code'"),
        (Options(image="i", pvc="m", working_dir="s3://b/$(id).zip"), "--working-dir: got"),
        (Options(image="i", pvc="m", working_dir="https://me:hunter2@h/c.zip"), "--working-dir: got 'https://h/c.zip'"),
        (Options(image="i", pvc="m", working_dir="https://h/c.zip?X-Sig=hunter2"), "without user, password or query"),
        (Options(image="i"), "--pvc: none given; pods lose their disks when the job ends"),
    ],
)
def test_options_are_checked(options: Options, line: str) -> None:
    said = refused(["unlearn", *SMALL], options)
    assert line in said
    assert "hunter2" not in said


def test_without_a_volume_results_need_other_storage() -> None:
    stored = ["--set", "output.storage=s3://bucket/runs"]
    assert "--pvc" in refused(["prepare", "-c", "demo", *NUMBERS, *stored], Options(image="i"))
    assert "prepared" in refused(["search", *SMALL, *stored], Options(image="i"))
    _, job = made("unlearn", *SMALL, *stored, options=Options(image="i"))
    validate(job)
    assert "GRU_CACHE" not in job["spec"]["runtimeEnvYAML"]


def test_no_secret_stands_in_a_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
    for name in names:
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example")
    lines, say = told()
    words = ["unlearn", "-c", "demo", *OUT[:2], *NUMBERS]
    documents = kuberay.manifest(words, Options(image="i", pvc="m", secrets=("mlflow",)), say)
    text = kuberay.to_yaml(documents) + "\n".join(lines)
    assert "hunter2" not in text
    assert "me@" not in text
    assert "https://mlflow.example" in text


# ------------------------------------------------------------------------------------------ the command line


def gru(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pipelines", "submit", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_command_prints_yaml_and_nothing_else() -> None:
    pods = ["--kuberay", "--image", "i", "--pvc", "models"]
    done = gru(*pods, "--", "unlearn", *SMALL)
    assert done.returncode == 0, done.stderr
    config, job = yaml.safe_load_all(done.stdout)
    validate(job)
    assert "RayJob gru-unlearn-one" in done.stderr
    listed = json.loads(gru(*pods, "--json", "--", "unlearn", *SMALL).stdout)
    assert listed == {"apiVersion": "v1", "kind": "List", "items": [config, job]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--pvc", "m", "--", "unlearn"], "gru: --pvc: only with --kuberay"),
        (["--working-dir", "s3://x.zip", "--", "unlearn"], "gru: --working-dir: only with --kuberay"),
        (["--secret", "m", "status", "job"], "gru: --secret: only with --kuberay"),
        (["--kuberay", "--address", "http://h:1", "--", "unlearn"], "not with --address"),
        (["--kuberay", "--image", "i", "--pvc", "m", "--", "unlearn", "-c", "demo"], "train.gpus_per_worker: got"),
    ],
)
def test_a_refused_command_line_prints_nothing_on_stdout(words: list[str], line: str) -> None:
    done = gru(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
