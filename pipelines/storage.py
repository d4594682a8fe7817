"""Object storage, or a folder that machines share: named files under one URI, through ``pyarrow.fs``.

Credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_DEFAULT_REGION``, ``AWS_ENDPOINT_URL``, or what else the AWS chain finds) of each process and are written nowhere.

A file is there whole or not at all: object stores show an upload when it is complete, in folders a file is written
under another name and renamed. An upload cannot be called off, only completed: a small file is therefore read before
its upload begins, and a large one (weights) that cannot be read to its end is removed. Nothing holds for several files
together; whoever needs that uploads the file that names the others last.
"""

from __future__ import annotations

import io
import os
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qs, urlsplit

from gru_core.errors import InputError, StorageError
from pipelines.stores import hide, secret

R = TypeVar("R")
Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: differs where a file was replaced."""

ALLOWED = "s3://BUCKET/FOLDER, file:///FOLDER or an absolute path"
EVALUATING, WORK = ".evaluating", ".work"
"""Folders of a machine: in a run's, what an evaluation under way has measured; in the output's, its workers' copy of
what is stored."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries of what failed."""
_CHUNK, _SMALL = 32 << 20, 64 << 20
_AT_ONCE = 4
_PART, _CHECK = ".part-", ".gru-check-"
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_FINAL = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT")
_QUERY = {"region", "endpoint_override", "scheme"}


class Storage:
    """The files under one URI. Pickles as the URI alone.

    Args:
        uri: ``s3://bucket/folder`` (also with ``?region=``, ``?endpoint_override=`` and ``?scheme=``), ``file://`` or
            an absolute path.
        beat: called now and then while something is copied.

    Raises:
        InputError: another kind of URI, or one that carries credentials.
    """

    def __init__(self, uri: str, beat: Callable[[], None] = lambda: None) -> None:
        parts = urlsplit(uri)
        if secret(uri) or "@" in parts.netloc:
            raise InputError(
                f"output.storage: {hide(uri)} was given with credentials in it, allowed: a URI without; they are taken "
                "from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
        bad = sorted(parse_qs(parts.query).keys() - _QUERY) if parts.scheme == "s3" else []
        plain = parts.scheme in ("", "file") and not parts.netloc and parts.path.startswith("/")
        if not plain and not (parts.scheme == "s3" and parts.netloc and not bad):
            raise InputError(f"output.storage: got {hide(uri)!r}, allowed: {ALLOWED}")
        if ".." in PurePosixPath(parts.path).parts:
            raise InputError(f"output.storage: got {uri!r}, allowed: a path without '..'")
        self.uri, self._beat = uri, beat
        self._parts = parts
        self._opened: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.uri,)

    def __str__(self) -> str:
        return hide(self.uri.partition("?")[0]).rstrip("/")

    def under(self, name: str) -> Storage:
        """The storage of a folder in this one."""
        base, mark, query = self.uri.partition("?")
        return Storage(f"{base.rstrip('/')}/{name}{mark}{query}")

    # ------------------------------------------------------------------------------------------ before a run

    def check(self) -> None:
        """Writes, reads and removes a small file.

        Raises:
            InputError: one line: no such bucket, no credentials, no access, nothing answers.
        """
        name, text = f"{_CHECK}{uuid.uuid4().hex[:8]}", b"gru"
        try:
            files, _ = self._open()
            if self._parts.scheme == "s3" and files.get_file_info(self._parts.netloc).type.name == "NotFound":
                raise InputError(f"output.storage: there is no bucket {self._parts.netloc!r} ({self})")
            self._put(files, self._path(name), text)
            if self._read(name) != text:
                raise OSError("a file that was just written reads differently")
            files.delete_file(self._path(name))
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"output.storage: {self} cannot be used: {_reason(error)}") from None

    # ------------------------------------------------------------------------------------------------- files

    def names(self, under: str = "") -> dict[str, Stamp]:
        """All files in a folder of the storage, by their name relative to the storage, less what a kill left over.

        Raises:
            StorageError: the storage does not answer; a name that would lead out of the folder it is copied to.
        """
        from pyarrow import fs

        def listed() -> dict[str, Stamp]:
            files, root = self._open()
            selector = fs.FileSelector(self._path(under) if under else root, allow_not_found=True, recursive=True)
            found = [info for info in files.get_file_info(selector) if info.is_file]
            return {info.path[len(root) :].lstrip("/"): (info.size, info.mtime_ns or 0) for info in found}

        names = self._tried("listed", listed)
        for name in names:
            if ".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name:
                raise StorageError(f"{self} holds a file with a name that is not allowed: {name!r}")
        return {name: stamp for name, stamp in names.items() if _PART not in name and not name.startswith(_CHECK)}

    def has(self, name: str) -> bool:
        """Whether a file is there at the top, asked once; an OSError where the storage does not answer."""
        from pyarrow import fs

        files, root = self._open()
        found = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return any(info.base_name == name for info in found)

    def read(self, name: str) -> bytes | None:
        """A small file, or None where it is not there."""
        try:
            return self._tried(f"read ({name})", lambda: self._read(name))
        except FileNotFoundError:
            return None

    def push(self, folder: Path, names: Iterable[str]) -> None:
        """Uploads files of ``folder``, given by their relative names, several at a time.

        Raises:
            StorageError: after several tries; names the storage and what was to be uploaded.
        """
        _each(names, lambda name: self._tried(f"written ({name})", lambda: self._upload(folder / name, name)))

    def pull(self, folder: Path, names: Iterable[str]) -> None:
        """Downloads files to the same relative names in ``folder``, each renamed into place when it is whole.

        A file that is gone is passed over.

        Raises:
            StorageError: after several tries.
            OSError: the local disk.
        """
        _each(names, lambda name: self._tried(f"read ({name})", lambda: self._download(name, folder / name)))

    def delete(self, names: Iterable[str]) -> None:
        """Removes files; missing ones are none."""
        _each(names, lambda name: self._tried(f"cleared ({name})", lambda: self._remove(name)))

    # ------------------------------------------------------------------------------------------------ inside

    def _open(self) -> tuple[Any, str]:
        """The file system and the path of this storage in it."""
        if self._opened is None:
            from pyarrow import fs

            parts = self._parts
            if parts.scheme != "s3":
                self._opened = fs.LocalFileSystem(), parts.path.rstrip("/") or "/"
            else:
                self._opened = _s3(parts.netloc, parse_qs(parts.query)), f"{parts.netloc}{parts.path}".rstrip("/")
        return self._opened

    def _path(self, name: str) -> str:
        return f"{self._open()[1]}/{name}"

    def _read(self, name: str) -> bytes:
        files, _ = self._open()
        with files.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def _put(self, files: Any, path: str, data: bytes | Path) -> int:
        """Writes a file whole or not at all; returns its size in bytes."""
        if isinstance(data, Path) and data.stat().st_size <= _SMALL:
            data = data.read_bytes()
        source: BinaryIO = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
        with source:
            if self._parts.scheme == "s3":
                return self._copy(files, source, path)
            files.create_dir(str(PurePosixPath(path).parent), recursive=True)
            part = f"{path}{_PART}{uuid.uuid4().hex[:8]}"
            try:
                size = self._copy(files, source, part)
                files.move(part, path)
            except BaseException:
                with suppress(OSError):
                    files.delete_file(part)
                raise
            return size

    def _copy(self, files: Any, source: BinaryIO, target: str) -> int:
        """Writes what is in ``source``, whose size it returns; what breaks off half-way is removed."""
        size, chunk = 0, source.read(_CHUNK)
        out = files.open_output_stream(target)
        try:
            while chunk:
                size += out.write(chunk)
                self._beat()
                chunk = source.read(_CHUNK)
        except BaseException:
            with suppress(OSError, ValueError):
                out.close()  # where this fails as well, nothing was published, and what stood there stays
                files.delete_file(target)
            raise
        out.close()
        return size

    def _upload(self, file: Path, name: str) -> None:
        files, _ = self._open()
        path = self._path(name)
        size = self._put(files, path, file)
        found = files.get_file_info(path).size
        if found != size:
            raise OSError(f"{size} bytes were uploaded and {found} are there")

    def _remove(self, name: str) -> None:
        files, _ = self._open()
        with suppress(FileNotFoundError):
            files.delete_file(self._path(name))

    def _download(self, name: str, target: Path) -> None:
        files, _ = self._open()
        part = target.with_name(f".{target.name}{_PART}{uuid.uuid4().hex[:8]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.open_input_stream(self._path(name)) as stream, part.open("wb") as out:
                while chunk := stream.read(_CHUNK):
                    out.write(chunk)
                    self._beat()
            part.replace(target)
        except FileNotFoundError:  # deleted since it was listed
            return
        finally:
            part.unlink(missing_ok=True)

    def _tried(self, what: str, action: Callable[[], R]) -> R:
        for wait in (*WAITS, None):
            try:
                return action()
            except FileNotFoundError:
                raise
            except (OSError, ValueError) as error:
                if wait is None or any(sign in str(error) for sign in _FINAL):
                    raise StorageError(f"the storage {self} cannot be {what}: {_reason(error)}") from None
                time.sleep(wait)
        raise AssertionError


def _each(names: Iterable[str], work: Callable[[str], None]) -> None:
    """Always in threads: an interrupt reaches the main thread alone, which waits for what has begun."""
    names = list(names)
    if names:
        with ThreadPoolExecutor(min(_AT_ONCE, len(names))) as pool:
            list(pool.map(work, names))


def _s3(bucket: str, query: dict[str, list[str]]) -> Any:
    """The S3 file system as the environment describes it; without the URI's own resolution of regions, which asks
    AWS also where another endpoint is meant."""
    from pyarrow import fs

    env = os.environ.get
    given = query.get("endpoint_override", [None])[0] or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    region = query.get("region", [None])[0] or env("AWS_REGION") or env("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {}
    if given:
        scheme, mark, host = given.rpartition("://")
        options["endpoint_override"] = host.rstrip("/")
        options["scheme"] = query.get("scheme", [None])[0] or (scheme if mark else "https")
        region = region or "us-east-1"
    elif region is None:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(region=region, connect_timeout=5.0, request_timeout=60.0, **options)


def _reason(error: BaseException) -> str:
    """What went wrong in one short line that holds no key of the environment."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "...")
    return hide(text)[:240]
