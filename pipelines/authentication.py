"""Ray's token: where it stands, how it is made, which clusters ask for it; and a word about those that do not.

Ray runs whatever code it is sent. A cluster without a token is for this machine alone.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import secrets
from pathlib import Path

MODE = "RAY_AUTH_MODE"
REACH_S = 5.0
"""Longest wait for a cluster to tell whether it asks for a token."""


def token_file() -> Path:
    """Ray's own token file, ``~/.ray/auth_token``."""
    return Path.home() / ".ray" / "auth_token"


def find_token() -> tuple[str, str] | None:
    """The token and where it stood: in the environment, in the file it names, or in Ray's own file."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return value, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else token_file()
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return (value, str(path)) if value else None


def keep_private() -> None:
    """Takes the rights of others away from a token file that is there, and from a ``~/.ray`` made here."""
    file = token_file()
    with contextlib.suppress(OSError):  # a home that cannot be written holds no token of Ray's either
        if file.is_file() and file.stat().st_mode & 0o077:
            file.chmod(0o600)


def make_token() -> None:
    """Makes Ray's token file where this user has no token yet; Ray's own would be readable for everybody.

    The file is complete and of mode 0600 from the moment that it has its name; of several processes that come
    here at once the first one's token counts.
    """
    keep_private()
    if find_token() or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    file = token_file()
    part = file.with_name(f".auth_token-{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):  # Ray tells what is wrong with a home that cannot be written
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                opened.write(secrets.token_hex(32))  # as long as Ray's own
                opened.flush()
                os.fsync(opened.fileno())
            _place(part, file)
        finally:
            part.unlink(missing_ok=True)


def _place(part: Path, file: Path) -> None:
    """Gives ``part`` the name ``file``, unless another process was faster."""
    try:
        os.link(part, file)
    except FileExistsError:
        if file.stat().st_size == 0:
            part.replace(file)
    except OSError:  # a file system without links
        part.replace(file)


def switch_on() -> None:
    """Makes Ray in this process, and in those that it starts, ask for the token; ``RAY_AUTH_MODE`` set wins."""
    if MODE in os.environ:
        return
    os.environ[MODE] = "token"
    with contextlib.suppress(ImportError, AttributeError):
        raylet = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")  # Ray read its environment when it was imported
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine's loopback, which nobody else reaches."""
    host = host.strip("[]").partition("%")[0].lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def asks(address: str, token: str | None = None) -> bool | None:
    """Whether the cluster at ``address`` (``HOST:6379``) asks for a token, or for another one than ``token``.

    Ray itself tries for a minute and then says that it could not connect. None: that cannot be told.
    """
    import grpc

    channel = grpc.insecure_channel(address)
    try:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive", bytes, bytes)
        call(b"", timeout=REACH_S, metadata=(("authorization", f"Bearer {token}"),) if token else None)
    except grpc.RpcError as error:
        return True if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
    finally:
        channel.close()
    return False


def warning(shown: str) -> str:
    """The line about an open cluster that is reached over a network."""
    return (
        f"warning: the Ray cluster at {shown} uses no authentication: whoever reaches it over the network can run "
        "code on it; start its Ray with RAY_AUTH_MODE=token"
    )
