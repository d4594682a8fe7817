"""Which MLflow store is meant, whether it can be used, and how it is named to people. Imports no mlflow."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from gru_core.config import TrackConfig
from gru_core.errors import InputError
from pipelines.authentication import is_local

DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
ALLOWED = "sqlite:///FILE, http(s)://HOST, postgresql://, mysql://, mssql:// or databricks"


def resolve_uri(track: TrackConfig, cwd: Path | None = None) -> str:
    """``track.uri``, else ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the working folder.

    A relative SQLite path is made absolute, so that every process means the same file. No file of ours holds user
    or password: a ``track.uri`` without them takes them from ``MLFLOW_TRACKING_URI`` where that names the same store.

    Raises:
        InputError: a folder or ``file:`` URI (MLflow refuses its file store), or no URI at all.
    """
    environment = os.environ.get("MLFLOW_TRACKING_URI") or ""
    given = track.uri or environment or "sqlite:///mlflow.db"
    if given.rstrip("/") == hide(environment).rstrip("/"):
        given = environment
    where = "track.uri" if track.uri else "MLFLOW_TRACKING_URI"
    scheme = given.partition(":")[0].partition("+")[0].lower() if ":" in given else ""
    if scheme == "sqlite":
        file, question, query = given.partition(":///")[2].partition("?")
        if not file or file == ":memory:":
            raise InputError(f"{where}: got {hide(given)!r}, allowed: a database file, as in sqlite:///mlflow.db")
        path = Path(os.path.normpath((cwd or Path.cwd()) / Path(file).expanduser()))
        return f"sqlite:///{path}{question}{query}"
    if scheme in {"http", "https"} and urlsplit(given).hostname:
        return given.rstrip("/")
    if given == "databricks" or scheme in {*DATABASES, "databricks"}:
        return given
    if scheme == "file" or not scheme:
        raise InputError(
            f"{where}: got {hide(given)!r}; MLflow no longer keeps runs in plain folders, allowed: {ALLOWED}"
        )
    raise InputError(f"{where}: got {hide(given)!r}, allowed: {ALLOWED}")


# A password may hold any of @ : / unquoted; what stands between a host and a path is a port.
_USER = re.compile(r"""://(?:[^/\s@:'"\[]*:(?!\d+(?:[/?#,;)'"]|$))\S*@|[^/\s?#'"]*@)""")
_DATABASE = re.compile(r"((?:postgres\w*|mysql|mssql)(?:\+\w+)?://)[^\s?]*@", re.IGNORECASE)  # there even 12/x is one
_SECRET = r"(?:pass|pwd|token|secret|key|credential|signature|auth)"
_PARAMETER = re.compile(rf"""(?<=[?&;])[\w.%-]*{_SECRET}[\w.%-]*=[^&;#\s'"]*(?:[&;]|(?=[#\s'"]|$))""", re.IGNORECASE)
# What is left of a query whose parameters are all gone, or whose last one is.
_REST = re.compile(r"""(?<=[\w/.~%-])[?&;](?=\x00)|\x00""")


def hide(text: str) -> str:
    """The text without user names, passwords, tokens and keys inside URIs: for all that is printed or stored.

    They are left out, not masked: a URI stays one that can be used, with credentials from the environment.
    """
    cut = _PARAMETER.sub(_dropped, _USER.sub("://", _DATABASE.sub(r"\1", text)))
    return _REST.sub("", cut)


def _dropped(found: re.Match[str]) -> str:
    """Nothing where another parameter follows, else a mark: the separator before it has to go, too."""
    return "" if found[0][-1] in "&;" else "\0"


def secret(uri: str) -> bool:
    """Whether a URI holds a user, a password, a token or a key."""
    return hide(uri) != uri


def exposed(uri: str) -> str | None:
    """The warning about credentials that would go over a network unencrypted, None where they do not."""
    parts = urlsplit(uri)
    if parts.scheme != "http" or is_local(parts.hostname or ""):
        return None
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    if not secret(uri) and not any(os.environ.get(name) for name in names):
        return None
    return (
        f"warning: the password or token for the MLflow server {hide(uri)} goes over the network unencrypted; "
        "use https://"
    )


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite URI, None for any other store."""
    return Path(uri.partition(":///")[2].partition("?")[0]) if uri.startswith("sqlite:") else None


def check(uri: str, timeout: float = 4.0, say: Callable[[str], None] = lambda line: None) -> None:
    """Whether the store can be used, asked before anything is written; takes ``timeout`` seconds at most.

    Args:
        say: told of a password that would go over a network unencrypted.

    Raises:
        InputError: one line: a server that does not answer or refuses, a database that cannot be written.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme in {"http", "https"}:
        if line := exposed(uri):
            say(line)
        _check_server(uri, timeout)
    elif (file := sqlite_file(uri)) is not None:
        _check_file(file)
    elif scheme in DATABASES and parts.hostname:
        try:
            socket.create_connection((parts.hostname, parts.port or DATABASES[scheme]), timeout).close()
        except OSError as error:
            raise InputError(f"the MLflow database {hide(uri)} cannot be reached: {error}") from None


def _check_file(file: Path) -> None:
    folder = next(parent for parent in file.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the MLflow database {file} cannot be written: {folder} is no folder with write access")
    if not file.exists():
        return
    if not file.is_file() or not os.access(file, os.R_OK | os.W_OK):
        raise InputError(f"the MLflow database {file} cannot be read and written")
    with file.open("rb") as opened:
        if opened.read(16) not in (b"", b"SQLite format 3\0"):
            raise InputError(f"{file} is not a SQLite database")


def _check_server(uri: str, timeout: float) -> None:
    import requests

    env = os.environ.get
    user, token = env("MLFLOW_TRACKING_USERNAME"), env("MLFLOW_TRACKING_TOKEN")
    auth = (user, env("MLFLOW_TRACKING_PASSWORD") or "") if user else None
    headers = {"Authorization": f"Bearer {token}"} if token and not auth else {}
    secure = (env("MLFLOW_TRACKING_INSECURE_TLS") or "").lower() not in {"true", "1"}
    verify = (env("MLFLOW_TRACKING_SERVER_CERT_PATH") or True) if secure else False
    try:
        reply = requests.get(
            f"{uri}/api/2.0/mlflow/experiments/search", params={"max_results": 1}, auth=auth, headers=headers,
            timeout=timeout, verify=verify,
        )  # fmt: skip
    except requests.exceptions.SSLError:
        raise InputError(f"the MLflow server {hide(uri)} has a certificate that is not trusted") from None
    except requests.exceptions.Timeout:
        raise InputError(f"the MLflow server {hide(uri)} does not answer within {timeout:g} s") from None
    except (requests.exceptions.RequestException, UnicodeError):
        raise InputError(f"the MLflow server {hide(uri)} cannot be reached; is it running?") from None
    plugin = env("MLFLOW_TRACKING_AUTH") or env("MLFLOW_TRACKING_AWS_SIGV4")  # signs requests in its own way
    if reply.status_code in {401, 403} and not plugin:
        raise InputError(
            f"the MLflow server {hide(uri)} refuses access ({reply.status_code}): set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if reply.status_code not in {200, 401, 403} or (reply.ok and not reply.text.lstrip().startswith("{")):
        raise InputError(f"{hide(uri)} answers, but not as an MLflow server does (status {reply.status_code})")
