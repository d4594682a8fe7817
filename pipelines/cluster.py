"""A running Ray cluster as its job server shows it: address, token, clear refusals within seconds.

Ray's own client hangs on an address that swallows packets, prefers environment variables to the address that it
is given, and needs ``RAY_AUTH_MODE`` set before it looks for a token. Here the address given wins, a first
request with a timeout tells what is there, and a token is sent only to a cluster that asks for one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gru_core.errors import InputError, unknown
from pipelines import authentication
from pipelines.authentication import find_token
from pipelines.stores import hide

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_S, ANSWER_S = 3.0, 10.0
"""Longest wait for a connection, and for the first answer on it."""
REQUEST_S = 120.0
"""Longest wait for a later answer: a head node that unpacks or starts something may take its time."""
CHECK = "gru-check-"
"""How the ids of the small jobs begin that only ask what a cluster can reach."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that answered.

    Attributes:
        address: URL of its job server (the dashboard), without user and password.
        token: it asks for a token, and took ours.
    """

    address: str
    client: JobSubmissionClient
    token: bool = False


def resolve(address: str | None) -> str:
    """``address``, else ``RAY_API_SERVER_ADDRESS``, else an ``http`` ``RAY_ADDRESS``, else this machine.

    ``RAY_ADDRESS`` often holds the address of another service (``auto``, ``host:6379``), which has no job
    server: only a URL counts. A bare ``host:port`` given in the other two means ``http``.

    Raises:
        InputError: not an HTTP address.
    """
    environment = os.environ.get("RAY_ADDRESS", "")
    if not environment.startswith(("http://", "https://")):
        environment = ""
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or environment or DEFAULT_ADDRESS
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        ok = False
    if not ok:
        raise InputError(f"--address: got {hide(url)!r}, allowed: http://HOST:8265, the cluster's dashboard")
    return url


def connect(address: str | None, say: Callable[[str], None] = lambda line: None) -> Cluster:
    """The cluster at ``address`` (see :func:`resolve`), once it has answered.

    Args:
        say: told of a cluster over a network that asks nobody for a token.

    Raises:
        InputError: nothing answers there, it is no Ray job server, or it refuses us.
    """
    url = resolve(address)
    response = _version(url, {})
    headers: dict[str, str] = {}
    found = find_token() if response.status_code in (401, 403) else None
    if found:
        headers = {"Authorization": f"Bearer {found[0]}"}
        response = _version(url, headers)
    shown = hide(url)
    if response.status_code in (401, 403):
        raise InputError(_refused(shown, found[1] if found else None))
    if not _is_ray(response):
        raise InputError(
            f"{shown} answers, but is no Ray job server; give the dashboard with --address http://HOST:8265"
        )
    parts = urlsplit(url)
    if not headers and not parts.username and not authentication.is_local(parts.hostname or ""):
        say(authentication.warning(shown))
    return Cluster(shown, _client(url, headers), bool(headers))


def _version(url: str, headers: dict[str, str]) -> Any:
    import requests

    shown = hide(url)
    try:
        return requests.get(f"{url}/api/version", headers=headers, timeout=(CONNECT_S, ANSWER_S))
    except requests.exceptions.SSLError:
        reason = "its TLS certificate is not trusted here"
    except requests.exceptions.Timeout:
        reason = f"no answer within {CONNECT_S:.0f} s"
    except requests.exceptions.ConnectionError as error:
        reason = _reason(error)
    except requests.exceptions.RequestException as error:
        reason = type(error).__name__
    raise InputError(
        f"no Ray cluster answers at {shown} ({reason}); start one with `ray start --head`, or give its dashboard "
        "with --address http://HOST:8265"
    )


def _reason(error: Exception) -> str:
    text = str(error)
    known = {
        "Connection refused": "connection refused",
        "Name or service not known": "unknown host",
        "nodename nor servname": "unknown host",
        "NameResolutionError": "unknown host",
        "No route to host": "no route to host",
        "unreachable": "network unreachable",
    }
    return next((words for sign, words in known.items() if sign in text), "the connection broke")


def _refused(shown: str, source: str | None) -> str:
    way = "set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token) to the token of that cluster"
    if source is None:
        return f"the cluster at {shown} uses token authentication and no token was found here; {way}"
    return f"the cluster at {shown} uses token authentication and refuses the token from {source}; {way}"


def _is_ray(response: Any) -> bool:
    try:
        return response.status_code == 200 and bool(response.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        return False


def _client(url: str, headers: dict[str, str]) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they set INFO on import and tell of every upload
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's client waits for ever on a peer that went away."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, REQUEST_S), **options)

    with _environment_address(url):
        return Client(url, headers=headers)


@contextlib.contextmanager
def _environment_address(url: str) -> Iterator[None]:
    """Ray's client takes the environment before its argument; the address that was chosen must win."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def details(cluster: Cluster, job_id: str) -> JobDetails:
    """What the cluster knows of a submitted job.

    Raises:
        InputError: it knows no such job; the message lists the latest ones.
    """
    try:
        found = cluster.client.get_job_info(job_id)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        found = None
    if found is not None and found.submission_id:
        return found
    jobs = [job for job in cluster.client.list_jobs() if job.submission_id]
    jobs = [job for job in jobs if not str(job.submission_id).startswith(CHECK)]
    latest = sorted(jobs, key=lambda job: job.start_time or 0)[-10:]
    raise unknown(f"job at {cluster.address}", job_id, [str(job.submission_id) for job in latest])
