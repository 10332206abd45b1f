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
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import quote

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


def _open(remote: Remote, headers: dict[str, str]) -> HTTPResponse:
    try:
        request = urllib.request.Request(remote.url, headers=headers)
        if remote.token:  # not sent on to the server that a redirection names
            request.add_unredirected_header("Authorization", f"Bearer {remote.token}")
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except (ValueError, InvalidURL) as error:
        raise InputError(f"{remote.url} cannot be asked for ({error}). Check HF_ENDPOINT and HF_TOKEN") from error


def _answer(remote: Remote, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """The status and content of the server's answer to one small request."""

    def attempt() -> tuple[int, bytes]:
        with _open(remote, headers or {}) as response:
            return response.status, response.read()

    return _retry(remote, attempt)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def hub_files(name: str, revision: str) -> tuple[str, dict[str, Remote]]:
    """What to call a data set on Hugging Face, and its large files by their paths.

    A branch as revision is replaced by its current commit. ``HF_ENDPOINT`` overrides the server; ``HF_TOKEN`` is for data
    sets with terms to accept.
    """
    server = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
    token = (os.environ.get("HF_TOKEN") or "").strip() or None
    advice = (
        f"If the name is right, accept the terms at {server}/datasets/{name} while logged in, create a token in your "
        f"settings, and set HF_TOKEN to it{' (the present one is refused)' if token else ''}"
    )
    url = f"{server}/api/datasets/{quote(name)}/revision/{quote(revision)}?blobs=true"
    content = _answer(Remote(url, token=token, refused=advice))[1]
    files = {}
    try:
        found = json.loads(content)
        revision = found.get("sha") or revision
        for file in found["siblings"]:
            path, facts = file["rfilename"], file.get("lfs")
            if facts:
                address = f"{server}/datasets/{quote(name)}/resolve/{quote(revision)}/{quote(path)}"
                files[path] = Remote(address, int(facts["size"]), f"sha256:{facts['sha256']}", advice, token)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the answer of {url} is not a list of files. Check the connection and HF_ENDPOINT; a proxy or a login page may "
            "have answered instead"
        ) from error
    return f"{name} on Hugging Face, revision {revision}", files


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
        status, content = _answer(self.remote, {"Range": f"bytes={self.position}-{end - 1}"})
        if status != 206 or len(content) != end - self.position:
            raise InputError(
                f"{self.remote.url} did not send the bytes {self.position} to {end - 1} that were asked for"
            )
        self.position = end
        return content
