"""HTTPS downloads that are resumed and verified, and the files of a data set on Hugging Face.

gdown downloads plain URLs as well, but gives up on HTTP 503, on a server without ranges, and on a partial file that is
already complete; and it cannot send a token.
"""

import hashlib
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import NamedTuple, TypeVar

from engine.loading import progress_bar
from utils import InputError

ATTEMPTS = 6  # in a row, without a byte of progress
FIRST_PAUSE = 1.0  # seconds before the second attempt, then doubled each time
TIMEOUT = 60  # seconds without an answer
CHUNK = 1 << 18
NETWORK_ERRORS = (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError)
T = TypeVar("T")


class Remote(NamedTuple):
    """A file on a server, and what is known of it: ``digest`` is ``md5:...`` or ``sha256:...``."""

    url: str
    size: int | None = None
    digest: str | None = None
    refused: str = ""  # what to do if the server refuses it
    token: str | None = None


def download(remote: Remote, path: Path) -> Path:
    """Download to ``path``, which appears when the file is complete and verified.

    An earlier call's ``<path>.part`` is resumed. Lost connections are tried again.

    Raises:
        InputError: the server refuses, cannot be reached, or sends another file.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    _retry(remote, lambda: _continue(remote, partial), lambda: _size(partial))
    _check(remote, partial)
    partial.replace(path)
    return path


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _retry(remote: Remote, attempt: Callable[[], T | None], progress: Callable[[], int] = lambda: 0) -> T:
    """The first result other than None; ends after ``ATTEMPTS`` in a row without progress."""
    failures = 0
    while True:
        before = progress()
        try:
            result = attempt()
            if result is not None:
                return result
            reason = "the connection was lost"
        except NETWORK_ERRORS as error:
            reason = _retry_reason(remote, error)
        failures = failures + 1 if progress() <= before else 1
        if failures >= ATTEMPTS:
            raise InputError(
                f"cannot download {remote.url}: {ATTEMPTS} attempts failed ({reason}). Check the connection and run the same "
                "command again; a download resumes where it stopped"
            )
        time.sleep(FIRST_PAUSE * 2 ** (failures - 1))


def _retry_reason(remote: Remote, error: Exception) -> str:
    """What went wrong, if another attempt may succeed; other errors are raised."""
    if not isinstance(error, urllib.error.HTTPError):
        return str(getattr(error, "reason", error)) or type(error).__name__
    answer = f"HTTP {error.code} {error.reason}"
    if error.code < 500 and error.code not in (408, 429):
        advice = remote.refused if error.code in (401, 403) else ""
        raise InputError(f"the server refused {remote.url} ({answer}). {advice}".strip()) from error
    return answer


def _continue(remote: Remote, partial: Path) -> bool | None:
    """Fetch what is missing; True if the file is complete as far as the server says."""
    have = _size(partial)
    if remote.size is not None and have == remote.size:
        return True
    try:
        response = _open(remote, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        partial.unlink()  # as long as the file or longer: it was not verified, so it is fetched again
        return None
    with response:
        starts = (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        if have and (response.status != 206 or not starts):
            have = 0  # a server without ranges sends the whole file
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else remote.size
        bar = progress_bar(partial.name.removesuffix(".part"), total=total, initial=have, unit_scale=True)
        with bar, open(partial, "ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
    return True if total is None or have >= total else None


def _check(remote: Remote, partial: Path) -> None:
    size, fault = _size(partial), ""
    if remote.size not in (None, size):
        fault = f"{size} bytes instead of {remote.size}"
    elif remote.digest:
        kind, _, wanted = remote.digest.partition(":")
        digest = hashlib.new(kind)
        with open(partial, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != wanted:
            fault = f"the {kind} {digest.hexdigest()} instead of {wanted}"
    if fault:
        partial.unlink()
        raise InputError(
            f"{remote.url} is not the published file: it has {fault}. The download was removed. Run the same command again; "
            "if that does not help, get the file another way and pass it as -source"
        )


def _open(remote: Remote, headers: dict[str, str], *, is_head: bool = False) -> HTTPResponse:
    try:
        request = urllib.request.Request(remote.url, headers=headers, method="HEAD" if is_head else "GET")
        if remote.token:  # not sent on to the server that a redirection names
            request.add_unredirected_header("Authorization", f"Bearer {remote.token}")
        return urllib.request.build_opener(*[_Stay] * is_head).open(request, timeout=TIMEOUT)
    except (ValueError, InvalidURL) as error:
        raise InputError(f"{remote.url} cannot be asked for ({error}). Check HF_ENDPOINT and HF_TOKEN") from error


class _Stay(urllib.request.HTTPRedirectHandler):
    """Does not follow a redirection: the first answer is the one with the facts."""

    def http_error_302(self, req, fp, code, msg, headers):
        return fp

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _answer(
    remote: Remote, headers: dict[str, str] | None = None, *, is_head: bool = False
) -> tuple[HTTPResponse, bytes]:
    """The server's answer to one small request, and its content."""

    def attempt() -> tuple[HTTPResponse, bytes]:
        with _open(remote, headers or {}, is_head=is_head) as response:
            return response, response.read()

    return _retry(remote, attempt)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


class HubRepository:
    """The files of a data set on Hugging Face. A branch as revision is replaced by its current commit.

    ``HF_ENDPOINT`` overrides the server; ``HF_TOKEN`` is for data sets with terms to accept.
    """

    def __init__(self, name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
        self.token = (os.environ.get("HF_TOKEN") or "").strip() or None

    def __str__(self) -> str:
        return f"{self.name} on Hugging Face, revision {self.revision}"

    def files(self) -> list[str]:
        """The paths of its files."""
        remote = self._remote("api/datasets/{}/revision/{}", self.name, self.revision)
        content = _answer(remote)[1]
        try:
            found = json.loads(content)
            self.revision = found.get("sha") or self.revision
            return sorted(file["rfilename"] for file in found["siblings"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the answer of {remote.url} is not a list of files. Check the connection and HF_ENDPOINT; a proxy or a login "
                "page may have answered instead"
            ) from error

    def file(self, path: str) -> Remote:
        """A file, with the size and SHA-256 that the server states."""
        remote = self._remote("datasets/{}/resolve/{}/{}", self.name, self.revision, path)
        headers = _answer(remote, is_head=True)[0].headers
        size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
        digest = (headers.get("X-Linked-Etag") or "").removeprefix("W/").strip('"')
        if len(digest) != 64 or not size.isdecimal():
            raise InputError(f"{remote.url} does not state its size and SHA-256 (X-Linked-Etag: {digest or 'none'})")
        return remote._replace(size=int(size), digest=f"sha256:{digest}")

    def _remote(self, pattern: str, *parts: str) -> Remote:
        advice = (
            f"If the name is right, accept the terms at {self.endpoint}/datasets/{self.name} while logged in, create a token "
            "in your settings, and set HF_TOKEN to it"
        )
        url = f"{self.endpoint}/{pattern.format(*map(urllib.parse.quote, parts))}"
        return Remote(url, token=self.token, refused=advice + " (the present one is refused)" * bool(self.token))


class RemoteFile(io.RawIOBase):
    """A file on a server, read in ranges: for the small parts of a large file."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self.remote, self.position = remote, 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.remote.size}[whence]
        self.position = start + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.remote.size if size < 0 else min(self.position + size, self.remote.size)
        if self.position >= end:
            return b""
        response, content = _answer(self.remote, {"Range": f"bytes={self.position}-{end - 1}"})
        if response.status != 206 or len(content) != end - self.position:
            raise InputError(
                f"{self.remote.url} did not send the bytes {self.position} to {end - 1} that were asked for"
            )
        self.position = end
        return content
