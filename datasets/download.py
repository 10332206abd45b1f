"""Plain HTTPS downloads that are resumed and verified, and the files of a data set on Hugging Face."""

import hashlib
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple

from engine.loading import progress_bar
from utils import InputError

ATTEMPTS = 6  # in a row, without a byte of progress
FIRST_PAUSE = 1.0  # seconds before the second attempt; doubles from one to the next
TIMEOUT = 60  # seconds without an answer
CHUNK = 1 << 18
NETWORK_ERRORS = (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError)


class Remote(NamedTuple):
    """A file on a server, and what is known of it: ``digest`` is ``md5:...`` or ``sha256:...``."""

    url: str
    size: int | None = None
    digest: str | None = None
    refused: str = ""  # what to do where the server refuses it
    token: str | None = None


def download(remote: Remote, path: Path) -> Path:
    """Download to ``path``, which appears when it is complete and verified.

    What an earlier call left in ``<path>.part`` is continued. Lost connections are tried again.

    Raises:
        InputError: the server refuses, cannot be reached, or sends something other than what was expected.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            complete = _continue(remote, partial)
            if complete:
                break
            reason = "the connection was lost"
        except NETWORK_ERRORS as error:
            reason = _passing(remote, error)
        after = partial.stat().st_size if partial.exists() else 0
        failures = failures + 1 if after <= before else 1
        if failures >= ATTEMPTS:
            raise InputError(
                f"expected to download {remote.url}; {ATTEMPTS} attempts failed ({reason}). Check the connection, and run "
                "the same command again: it goes on where this one stopped"
            )
        time.sleep(FIRST_PAUSE * 2 ** (failures - 1))
    _check(remote, partial)
    partial.replace(path)
    return path


def _continue(remote: Remote, partial: Path) -> bool:
    """Fetch what is missing; True if the file is complete as far as the server says."""
    have = partial.stat().st_size if partial.exists() else 0
    if remote.size is not None and have == remote.size:
        return True
    try:
        response = _open(remote, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if whole.isdigit() and int(whole) == have:
            return True  # there is nothing behind what we have
        partial.unlink()  # longer than the file, so it is of another one
        return False
    with response:
        if have and (response.status != 206 or not _starts_at(response.headers, have)):
            have = 0  # a server without ranges sends the whole
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else remote.size
        bar = progress_bar(partial.name.removesuffix(".part"), total=total, initial=have, unit_scale=True)
        with bar, open(partial, "ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
    return total is None or have >= total


def _starts_at(headers: Message, start: int) -> bool:
    return (headers.get("Content-Range") or "").startswith(f"bytes {start}-")


def _open(remote: Remote, headers: dict[str, str], *, method: str = "GET", follow: bool = True) -> HTTPResponse:
    request = urllib.request.Request(remote.url, headers=headers, method=method)
    if remote.token:  # not sent on to the server that a redirection names
        request.add_unredirected_header("Authorization", f"Bearer {remote.token}")
    opener = urllib.request.build_opener(*([] if follow else [_Stay]))
    return opener.open(request, timeout=TIMEOUT)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Does not follow a redirection: the first answer is the one with the facts."""

    def http_error_302(self, req, fp, code, msg, headers):
        return fp

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _passing(remote: Remote, error: Exception) -> str:
    """The reason for an error that another attempt may cure; others are raised."""
    if not isinstance(error, urllib.error.HTTPError):
        return str(getattr(error, "reason", error)) or type(error).__name__
    answer = f"HTTP {error.code} {error.reason}"
    if error.code < 500 and error.code != 429:
        advice = remote.refused if error.code in (401, 403) else ""
        raise InputError(f"the server refused {remote.url} ({answer}). {advice}".strip()) from error
    return answer


def _check(remote: Remote, partial: Path) -> None:
    size = partial.stat().st_size
    fault = f"{size} bytes instead of {remote.size}" if remote.size is not None and size != remote.size else None
    if not fault and remote.digest:
        kind, _, wanted = remote.digest.partition(":")
        with open(partial, "rb") as file:
            digest = hashlib.new(kind)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        fault = f"the {kind} {digest.hexdigest()} instead of {wanted}" if digest.hexdigest() != wanted else None
    if fault:
        partial.unlink()
        raise InputError(
            f"expected the published file at {remote.url}; what came has {fault}, and was removed. Run the same command "
            "again; if that changes nothing, get the file another way and give it as -source"
        )


# --- Hugging Face -----------------------------------------------------------------------------------------------------


class HubRepository:
    """The files of a data set on Hugging Face, at a fixed revision.

    ``HF_ENDPOINT`` names another server than the public one, ``HF_TOKEN`` a token for data sets with terms to accept.
    """

    def __init__(self, name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.token = os.environ.get("HF_TOKEN") or None

    def __str__(self) -> str:
        return f"{self.name} on Hugging Face, revision {self.revision}"

    def files(self) -> list[str]:
        """The paths of its files. A branch as revision becomes the commit it is at now."""
        remote = self._remote(f"{self.endpoint}/api/datasets/{self.name}/revision/{self.revision}")
        try:
            found = json.loads(_answer(remote)[1])
            self.revision = found.get("sha") or self.revision  # of a branch, the commit
            return sorted(file["rfilename"] for file in found["siblings"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"expected a list of files from {remote.url}; got something else") from error

    def file(self, path: str) -> Remote:
        """A file, with the size and SHA-256 that the server states."""
        url = f"{self.endpoint}/datasets/{self.name}/resolve/{self.revision}/{urllib.parse.quote(path)}"
        remote = self._remote(url)
        headers = _answer(remote, method="HEAD", follow=False)[0].headers
        size = headers.get("X-Linked-Size") or headers.get("Content-Length")
        digest = (headers.get("X-Linked-Etag") or "").removeprefix("W/").strip('"')
        if len(digest) != 64:
            raise InputError(f"expected the SHA-256 of {url} in the header X-Linked-Etag; got {digest or 'none'!r}")
        return remote._replace(size=int(size) if size else None, digest=f"sha256:{digest}")

    def _remote(self, url: str) -> Remote:
        return Remote(
            url,
            token=self.token,
            refused=f"Accept the terms at {self.endpoint}/datasets/{self.name} while logged in, make a token in your "
            "settings, and give it in the environment: HF_TOKEN=... "
            + ("(the one given is refused)" * bool(self.token)),
        )


def _answer(
    remote: Remote, *, method: str = "GET", follow: bool = True, headers: dict[str, str] | None = None
) -> tuple[HTTPResponse, bytes]:
    """The server's answer to one small request, and its content. Tried again as downloads are."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            with _open(remote, headers or {}, method=method, follow=follow) as response:
                return response, response.read()
        except NETWORK_ERRORS as error:
            reason = _passing(remote, error)
    raise InputError(
        f"expected an answer from {remote.url}; {ATTEMPTS} attempts failed ({reason}). Check the connection"
    )


class RemoteFile(io.RawIOBase):
    """A file on a server that is read in ranges, for the small parts of a large one."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        assert remote.size is not None
        self.remote, self.position = remote, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.remote.size}[whence]
        self.position = start + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.remote.size if size < 0 else min(self.position + size, self.remote.size)
        if self.position >= end:
            return b""
        response, content = _answer(self.remote, headers={"Range": f"bytes={self.position}-{end - 1}"})
        if response.status != 206 or len(content) != end - self.position:
            raise InputError(f"expected the bytes {self.position} to {end - 1} of {self.remote.url}; got others")
        self.position = end
        return content
