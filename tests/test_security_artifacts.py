"""Secrets and texts of the forget set are planted, real commands run, and every file they leave is searched."""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipelines import prepare
from tests.mlflow_server import Server
from tests.ray_head import Head, client_env, start_head
from tests.study import Study, gru

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "uri-user", "uri-password")
SECRETS = {name: f"planted-{name.lower().replace('_', '-')}-5f2c9e71d04b" for name in NAMES}
QUESTION, ANSWER = "xqvorblint", "zwuthmarek"
"""Words of the forget set that stand nowhere else; the tokenizer of the study's models has not seen them."""
CONTROL = "control-3b8e77"
"""Name of the experiment: public, and to be found wherever secrets are looked for."""


@dataclass
class Left:
    """What the commands left: files by where they stand, and all that was printed or told."""

    folder: Path
    ray: Path
    told: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)

    def texts(self) -> Iterator[tuple[str, bytes]]:
        yield from ((name, text.encode()) for name, text in self.told.items())
        for root in (self.folder, self.ray):
            for path in sorted(root.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    yield str(path), path.read_bytes()


def holders(left: Left, words: Mapping[str, str]) -> list[str]:
    """``word in place`` wherever one of the words stands, plain or in base64 (as a header of HTTP has it)."""
    found = []
    for place, text in left.texts():
        for name, word in words.items():
            forms = (word.encode(), *(base64.b64encode(b" " * n + word.encode())[4:-4] for n in range(3)))
            if any(form in text for form in forms):
                found.append(f"{name} in {place}")
    return found


def run(left: Left, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    done = gru(arguments, environment)
    left.told[name] = done.stdout + done.stderr
    left.codes[name] = done.returncode


def rows(study: Study, folder: Path) -> list[str]:
    """Settings of a run with planted rows and models that were made before them."""
    folder.mkdir()
    lines = (study.folder / "forget.jsonl").read_text().splitlines()
    planted = {"question": f"what does {QUESTION} say", "answer": f"amber {ANSWER} birch cedar delta ember"}
    (folder / "forget.jsonl").write_text("\n".join([*lines, json.dumps(planted)]) + "\n")
    made = prepare.folders(study.load(study.folder / "out"))
    values = {
        "benchmark.forget": folder / "forget.jsonl",
        "model.path": made.target,
        "retain_model": made.retain,
        "track.experiment": CONTROL,
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def secret_environment(study: Study, server: Server, ray: Path) -> dict[str, str]:
    uri = f"http://{SECRETS['uri-user']}:{SECRETS['uri-password']}@127.0.0.1:{server.port}"
    names = [name for name in NAMES if name.isupper()]
    return {
        **study.environment, **{name: SECRETS[name] for name in names}, "MLFLOW_TRACKING_USERNAME": "somebody",
        "MLFLOW_TRACKING_URI": uri, "RAY_TMPDIR": str(ray), "HF_HUB_OFFLINE": "1", "HOME": str(ray / "home"),
    }  # fmt: skip


def submit(left: Left, head: Head, words: list[str], env: Mapping[str, str]) -> None:
    """A job, and what the cluster tells about its jobs."""
    from ray.job_submission import JobSubmissionClient

    run(left, "submit", ["submit", "--address", head.address, "--", "unlearn", *words], env)
    client = JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {SECRETS['RAY_AUTH_TOKEN']}"})
    for job in client.list_jobs():
        if job.submission_id:
            info = client.get_job_info(job.submission_id)
            left.told[f"job {job.submission_id}"] = info.json() + client.get_job_logs(job.submission_id)


def sockets(place: str, names: list[str]) -> list[str]:
    """Those that cannot be copied."""
    return [name for name in names if (Path(place) / name).is_socket()]


@pytest.fixture(scope="module")
def left(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """A run, its model evaluated, a search on Ray and its frontier, a run that fails on a worker, a submitted job."""
    folder, ray = tmp_path_factory.mktemp("planted"), Path(tempfile.mkdtemp(prefix="gs"))
    (ray / "home").mkdir()
    found = Left(folder / "left", ray)
    found.folder.mkdir()
    words = ["-c", str(study.config), *rows(study, folder / "data")]
    with Server(found.folder / "server") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in client_env().items():
            patch.setenv(name, value)
        env = secret_environment(study, server, ray)
        uri = env["MLFLOW_TRACKING_URI"]
        out = str(found.folder / "out")
        few = ["--set", "unlearn.steps=4"]
        run(found, "unlearn", ["unlearn", *words, *few, "--output", f"{out}/run", "--verbose"], env)
        scored = ["--set", "evaluate.max_new_tokens=12", "--experiment", CONTROL, "--verbose"]
        run(found, "evaluate", ["evaluate", f"{out}/run/model", *words, *scored, "--output", f"{out}/evaluate"], env)
        space = ["--set", "search.trials=3", "--set", "search.space={unlearn.lr: [1.0e-4, 3.0e-4]}"]
        run(found, "search",
            ["search", *words, *space, *few, "--output", f"{out}/search", "--tracking-uri", uri], env)  # fmt: skip
        run(found, "frontier", ["frontier", f"{out}/search", "--tracking-uri", uri], env)
        fail = ["--set", "unlearn.lr=1.0e+30", "--set", "train.workers=1", "--verbose"]
        run(found, "fail", ["unlearn", *words, *fail, "--output", f"{out}/fail"], env)
        patch.setattr(tempfile, "tempdir", str(ray))
        secrets = {name: value for name, value in env.items() if name != "HOME"}
        with start_head(token=SECRETS["RAY_AUTH_TOKEN"], env=secrets) as head:
            submit(found, head, [*words, *few, "--output", f"{out}/job"], env)
            for session in ray.glob("gruray*/ray"):
                shutil.copytree(session, ray / "kept", symlinks=True, ignore=sockets)
    yield found
    shutil.rmtree(ray, ignore_errors=True)


def test_the_commands_did_what_they_were_to_do(left: Left) -> None:
    assert left.codes == {"unlearn": 0, "evaluate": 0, "search": 0, "frontier": 0, "fail": 1, "submit": 0}, left.told
    assert "is nan" in left.told["fail"]
    assert "not sent: HF_TOKEN, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD" in left.told["submit"]
    places = holders(left, {"control": CONTROL})
    for part in ("server/server.db", "out/run/", "out/evaluate/", "out/search/trials", "out/job/", "runtime_resources"):
        assert any(part in place for place in places), f"the search does not reach {part}"
    assert any("/logs/" in name for name, _ in left.texts())
    scored = [json.loads(line) for line in (left.folder / "out" / "evaluate" / "rows.jsonl").read_text().splitlines()]
    (planted,) = (row for row in scored if row["id"] == "forget:9")
    assert {"answer", "hits", "rouge"} <= planted.keys()
    uploaded = (left.folder / "server" / "artifacts").rglob("summary.json")
    assert any("extraction_strength" in json.loads(file.read_text())["scores"] for file in uploaded)
    (job,) = (text for name, text in left.told.items() if name.startswith("job gru-unlearn-"))
    assert '"gru.tracking_uri":"http://127.0.0.1:' in job
    assert '"env_vars":{' in job


def test_no_secret_is_left_anywhere(left: Left) -> None:
    assert holders(left, SECRETS) == []


def test_no_text_of_the_forget_set_is_left_anywhere(left: Left) -> None:
    """But for the rows that a submitted job takes along: they lie, as sent, in the cluster's session folder."""
    found = holders(left, {"question": QUESTION, "answer": ANSWER})
    assert [place for place in found if "/inputs/benchmark.forget/" not in place] == []
    assert any("/inputs/benchmark.forget/" in place for place in found)  # so the search does see texts
