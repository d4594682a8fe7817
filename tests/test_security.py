"""Tokens, warnings, secrets in URIs, and names that come out of files. What runs leave: test_security_artifacts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gru_core.config import TrackConfig
from gru_core.errors import InputError
from pipelines import (
    authentication,
    cli,
    delivery,
    doctor,
    exits,
    jobs,
    journal,
    package,
    ray_start,
    settings,
    stores,
    ui,
)
from pipelines import cluster as clusters
from pipelines.ledger import Ledger
from tests.ray_head import client_env, start_head

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working folder, and no token, cluster or store in the environment."""
    for name in (*os.environ,):
        if name.startswith(("RAY_", "MLFLOW_TRACKING")):
            monkeypatch.delenv(name)
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(tmp_path)
    return place


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------------------------------------ the token


def test_the_token_file_is_private_from_its_first_moment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fdopen, link = os.fdopen, os.link

    def look(name: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **more: Any) -> Any:
            seen.extend(mode(path) for path in (home / ".ray").iterdir())
            return name(*given, **more)

        return wrapped

    monkeypatch.setattr(os, "fdopen", look(fdopen))
    monkeypatch.setattr(os, "link", look(link))
    before = os.umask(0)
    try:
        authentication.make_token()
    finally:
        os.umask(before)
    file = home / ".ray" / "auth_token"
    assert (seen, mode(file), mode(home / ".ray")) == ([0o600, 0o600], 0o600, 0o700)
    assert re.fullmatch(r"[0-9a-f]{64}", file.read_text())
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]


def test_a_token_that_is_there_is_kept_and_made_private(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("mine")
    file.chmod(0o644)
    authentication.make_token()
    assert (file.read_text(), mode(file)) == ("mine", 0o600)
    file.write_text("")  # of a process that was killed: no token
    authentication.make_token()
    assert (len(file.read_text()), mode(file)) == (64, 0o600)
    file.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from the environment")
    authentication.make_token()
    assert not file.exists()


def test_processes_that_start_at_once_agree_on_one_token(home: Path) -> None:
    def work(number: int) -> str:
        authentication.make_token()
        found = authentication.find_token()
        return found[0] if found else ""

    with ThreadPoolExecutor(16) as pool:
        tokens = set(pool.map(work, range(64)))
    assert len(tokens) == 1
    assert tokens != {""}


STARTED = """
import os, sys
from pathlib import Path
from pipelines import authentication, ray_start
ray_start.start(lambda line: print(line, flush=True))
import ray
address = ray.get_runtime_context().gcs_address
print("asks", authentication.asks(address), ray.get(ray.remote(lambda: 7).remote()), flush=True)
"""


def start(**env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", STARTED], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=client_env(**env), umask=0,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_ray_that_we_start_asks_for_a_token(home: Path) -> None:
    code, told, errors = start(HOME=str(home))
    assert code == 0, errors
    assert told.splitlines() == ["starting Ray on this machine", "asks True 7"]
    assert mode(home / ".ray" / "auth_token") == 0o600


def own_address() -> str:
    """An address of this machine that is not its loopback."""
    from ray.util import get_node_ip_address

    address = str(get_node_ip_address())
    return address if not authentication.is_local(address) else pytest.skip("this machine has no network")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_is_joined_with_the_token_it_asks_for_and_an_open_one_with_a_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def there(gcs: str) -> str:
        return f"{own_address()}:{gcs.rpartition(':')[2]}"

    with start_head(token="right-token") as head:
        address = there(head.gcs)
        began = time.monotonic()
        with pytest.raises(InputError, match="asks for a token and none was found here; set RAY_AUTH_TOKEN"):
            ray_start._token(address, print)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-token")
        with pytest.raises(InputError, match="refuses the token from RAY_AUTH_TOKEN") as refused:
            ray_start._token(address, print)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        assert "wrong-token" not in str(refused.value)
        assert time.monotonic() - began < 10  # Ray itself tries for a minute
        (home / ".ray").mkdir(exist_ok=True)
        (home / ".ray" / "auth_token").write_text("right-token\n")
        code, told, errors = start(HOME=str(home), RAY_ADDRESS=address)
        assert code == 0, errors
        assert told.splitlines() == [f"joining the Ray cluster at {address}", "asks True 7"]
    with start_head() as head:
        address = there(head.gcs)
        code, told, errors = start(HOME=str(home), RAY_ADDRESS=address)
        assert code == 0, errors
        _, warned, last = told.splitlines()
        assert warned == authentication.warning(address)
        assert last == "asks False 7"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True), ("localhost", True), ("LOCALHOST", True), ("::1", True), ("[::1]", True),
        ("127.8.8.8", True), ("a.localhost", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
        ("localhost.example.org", False), ("127.0.0.1.example.org", False), ("", False), ("head", False),
    ],
)  # fmt: skip
def test_only_loopback_is_local(host: str, local: bool) -> None:
    assert authentication.is_local(host) is local


# ---------------------------------------------------------------------------------------------- warnings


@pytest.fixture
def dashboard() -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers as an open Ray dashboard does, and what it was shown of tokens."""
    shown: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", shown
        server.shutdown()


def test_an_open_cluster_over_a_network_is_worth_a_warning(
    dashboard: tuple[str, list[str | None]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, shown = dashboard
    authentication.make_token()
    lines: list[str] = []
    clusters.connect(url, lines.append)
    assert lines == []
    monkeypatch.setattr(authentication, "is_local", lambda host: host != "127.0.0.1")
    clusters.connect(url, lines.append)
    assert lines == [authentication.warning(url)]
    assert "whoever reaches it over the network can run code on it" in lines[0]
    assert set(shown) == {None}  # a token is shown to nobody who does not ask
    check = doctor.ray(url)
    assert (check.status, check.fix) == ("warn", "start its Ray with RAY_AUTH_MODE=token")


def test_a_password_for_mlflow_over_plain_http_is_worth_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stores.exposed("http://tracking:5000") is None
    assert stores.exposed("https://me:hunter2@tracking") is None
    assert stores.exposed("http://me:hunter2@127.0.0.1:5000") is None
    line = stores.exposed("http://me:hunter2@tracking:5000")
    assert line is not None
    assert "http://tracking:5000 goes over the network unencrypted" in line
    assert "hunter2" not in line
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    lines: list[str] = []
    with pytest.raises(InputError, match="cannot be reached"):
        stores.check("http://no-such-host.invalid:5000", say=lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_mlflow_pages_for_everybody_are_worth_a_warning(
    host: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.exit("not reached"))
    monkeypatch.setattr(ui, "_command", lambda *_: (_ for _ in ()).throw(RuntimeError("enough")))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="enough"):
        ui.run(host=host, port=0, say=lines.append)
    assert any("everybody on the network can read, change and delete" in line for line in lines) is warned


# ------------------------------------------------------------------------------------------- secrets in URIs


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h:5000/x", "http://h:5000/x"),
        ("http://token@h", "http://h"),
        ("http://u:p@ss@h/x", "http://h/x"),
        ("http://u:p'x@h", "http://h"),
        ("mssql://u:p/a@b:c@h:1433/db", "mssql://h:1433/db"),
        ("postgresql+psycopg2://u:12/x@h/db", "postgresql+psycopg2://h/db"),
        ("http://h:5000/x@y and http://[::1]:5000/x@y", "http://h:5000/x@y and http://[::1]:5000/x@y"),
        ("postgresql://h/db?password=x", "postgresql://h/db"),
        ("postgresql://h/db?user=me&password=x&sslmode=require", "postgresql://h/db?user=me&sslmode=require"),
        ("mysql://h/db?sslmode=a&sslpassword=x", "mysql://h/db?sslmode=a"),
        ("mysql://h/db?token=x&secret=y#f", "mysql://h/db#f"),
        ("http://h?API_KEY=x is away", "http://h is away"),
        ("'http://h/?access_token=x'; 'b'", "'http://h/'; 'b'"),
        ("https://b/k?X-Amz-Signature=x&X-Amz-Credential=y%2Fz&Expires=3", "https://b/k?Expires=3"),
        ("sqlite:////a/b.db?timeout=3", "sqlite:////a/b.db?timeout=3"),
        ("which key? key=3", "which key? key=3"),
    ],
)
def test_nothing_secret_of_a_uri_is_shown(text: str, shown: str) -> None:
    assert stores.hide(text) == shown
    assert stores.hide(shown) == shown


def test_an_error_of_a_library_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise RuntimeError("cannot connect to postgresql://me:hunter2@db/mlflow")

    with pytest.raises(SystemExit):
        exits.guarded(work)
    line = capsys.readouterr().err
    assert "postgresql://db/mlflow" in line
    assert "hunter2" not in line


def test_a_uri_without_credentials_takes_them_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that configs and folders, which hold none, can be run and resumed."""
    whole = "postgresql://me:hunter2@db/mlflow?sslmode=require"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert stores.resolve_uri(TrackConfig(uri=stores.hide(whole))) == whole
    for other in ("postgresql://db/other?sslmode=require", "postgresql://you:x@db/mlflow?sslmode=require"):
        assert stores.resolve_uri(TrackConfig(uri=other)) == other


def test_a_package_holds_no_password_and_what_is_not_sent_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "http://me:hunter2@tracking:5000?token=hunter2"
    folder = tmp_path / "package"
    folder.mkdir()
    package.build(settings.from_dict({"track": {"uri": uri}}), folder)
    assert settings.load(str(folder / "config.yaml")).track.uri == "http://tracking:5000"
    assert not [path for path in folder.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    for name in jobs.SECRETS:
        monkeypatch.delenv(name, raising=False)
    assert jobs._kept_back("http://tracking:5000") == []
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    (line,) = jobs._kept_back(uri)
    assert "HF_TOKEN, user and password of the tracking URI" in line
    assert "hunter2" not in line


# -------------------------------------------------------------------------------- data that would be code


@pytest.mark.parametrize("tag", ["!!python/object/apply:pathlib.Path.touch [{}]", "!!python/name:os.system"])
def test_yaml_makes_no_objects(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    (tmp_path / "run.yaml").write_text(f"unlearn: {tag.format(f'!!python/object/apply:pathlib.Path [{made}]')}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["unlearn", "-c", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2
    assert "run.yaml, line 1" in capsys.readouterr().err
    assert not made.exists()


def test_no_source_unpickles_or_runs_what_it_reads() -> None:
    pattern = re.compile(
        r"torch\.load\((?![^)]*weights_only=True)|\bpickle\.(?:load|Unpickler)|\b(?:joblib|dill|cloudpickle|marshal)\.load"
        r"|trust_remote_code\s*=\s*(?!False)|allow_pickle\s*=\s*True|yaml\.(?:unsafe_|full_)?load(?:_all)?\("
        r"|(?<![.\w])(?:eval|exec)\("
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for top in package.CODE
        for path in sorted((ROOT / top).rglob("*.py"))
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert [line for line in found if "Loader=_Loader" not in line] == []
    assert len(found) == 1  # pipelines/yamltext.py, whose loader is a SafeLoader
    import yaml

    from pipelines import yamltext

    assert issubclass(yamltext._Loader, yaml.SafeLoader)
    assert not issubclass(yamltext._Loader, yaml.FullLoader | yaml.UnsafeLoader)


# ------------------------------------------------------------------------------- names that come out of files


class Uploads:
    """A store that keeps what it is given."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str | None]] = []

    def ensure_experiment(self, name: str) -> str:
        return "1"

    def upload(self, run_id: str, path: Path, under: str | None = None) -> None:
        self.taken.append((path.name, under))


def test_a_journal_delivers_nothing_from_outside_its_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    for place in (folder / "model", folder / "good" / "sub", outside):
        place.mkdir(parents=True)
        (place / "file").write_text("x")
    (folder / "good" / "file").write_text("x")
    (folder / "link").symlink_to(outside / "file")
    (folder / "linked").symlink_to(outside)
    (folder / "model" / "inner").symlink_to(outside / "file")
    store = Uploads()
    carried = delivery.Delivery(store, "e")  # type: ignore[arg-type]
    stand = delivery._Stand("1")
    bad = ["../outside/file", str(outside / "file"), "link", "linked", "linked/file", "model", "good/../../outside"]
    for path in bad:
        carried._upload(stand, folder, path)
    assert store.taken == []
    assert len(carried.notes) == len(bad)
    for path in ("good", "good/sub/file", "good/sub/../file"):
        carried._upload(stand, folder, path)
    assert store.taken == [("good", None), ("file", "good/sub"), ("file", "good")]


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/b", "..", ".hidden", ""])
def test_a_ledger_names_no_folder_outside_its_search(name: str, tmp_path: Path) -> None:
    Ledger(tmp_path).ask("plain-000", "plain", {})
    assert len(Ledger(tmp_path).entries) == 1
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "ask", "id": name, "family": "plain", "params": {}}) + "\n")
    with pytest.raises(InputError, match="allowed: a plain name"):
        Ledger(tmp_path)


def test_a_frontier_is_written_where_it_belongs_whatever_its_run_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import frontier, tracked

    record = journal.Record("t", {}, {}, {1: {"eval/unlearning": 0.5, "eval/retention": 0.5}}, "finished")
    found = tracked.Found("a/../../../outside", "sqlite:///x.db", records=[(record, None)])
    monkeypatch.setattr(tracked, "gather", lambda *_, **__: found)
    places: list[Path] = []
    monkeypatch.setattr(frontier, "write", lambda document, points, folder: places.append(folder) or {})
    frontier.build("x")
    assert places == [Path("frontier-a-..-..-..-outside")]


def test_links_out_of_a_model_or_data_folder_are_not_sent(tmp_path: Path) -> None:
    """But those of the hub's cache, whose files all lie in ``blobs``."""
    secret = tmp_path / "id_rsa.json"
    secret.write_text("{}")

    def model(folder: Path, source: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").symlink_to(os.path.relpath(source, folder))
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"0")
        return folder

    bad = settings.from_dict({"model": {"path": str(model(tmp_path / "model", secret))}})
    with pytest.raises(InputError, match=r"model\.path: .*tokenizer\.json is a link out of its folder"):
        package.build(bad, tmp_path)
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / "0abc").write_text("{}")
    good = model(hub / "snapshots" / "1", hub / "blobs" / "0abc")
    (found,) = package.find_inputs(settings.from_dict({"model": {"path": str(good)}}))
    assert set(found.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    data = tmp_path / "tofu"
    data.mkdir()
    for name in package._data_files(settings.from_dict({"benchmark": {"name": "tofu"}}), data):
        (data / name).symlink_to(secret)
    with pytest.raises(InputError, match=r"benchmark\.data_dir: .*is a link out of its folder"):
        list(package.find_inputs(settings.from_dict({"benchmark": {"name": "tofu", "data_dir": str(data)}})))


# ------------------------------------------------------------------------------------------------- the audit


def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_audit_reports_findings_and_never_takes_silence_for_safety() -> None:
    report = audit().report
    bad = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    fine, unknown = {"name": "b", "version": "1", "vulns": []}, {"name": "c", "skip_reason": "not found"}
    assert report(json.dumps({"dependencies": [bad, fine, unknown]})) == [
        "audit: a 1: CVE-1, fixed in 2",
        "audit: 1 findings in 2 of 3 packages that could be looked up",
    ]
    for silence in ("", "no json", "{}", json.dumps({"dependencies": [unknown]})):
        (line,) = report(silence)
        assert "checked" in line
        assert "none was checked" in line or "nothing was checked" in line
    assert audit().audit(limit_s=0.01) == ""  # it does not wait
