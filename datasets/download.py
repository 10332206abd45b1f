"""HTTPS downloads that are resumed and verified, and the files of a data set on Hugging Face."""

import hashlib
import io
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from engine.loading import progress_bar
from utils import InputError, printable

ATTEMPTS = 6
FIRST_PAUSE = 1.0  # seconds between attempts, then doubled each time
TIMEOUT = 60  # seconds without an answer
CHUNK = 1 << 16  # bytes, at most lost with a connection
OTHERWISE = "get the file another way and pass it as -source"
ABSENT = f"It is not there: check the name in -source and HF_ENDPOINT, or {OTHERWISE}"


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
    if not any(_continue(remote, partial) for _ in range(ATTEMPTS)):
        raise _failed(remote, "the connection was lost")
    _check(remote, partial)
    partial.replace(path)
    return path


def _continue(remote: Remote, partial: Path) -> bool:
    """Fetch what is missing; True if the file is complete as far as the server says."""
    have = partial.stat().st_size if partial.exists() else 0
    if have and have == remote.size:
        return True
    with _get(remote, {"Range": f"bytes={have}-"} if have else {}, stream=True) as response:
        if response.status_code == 416:  # as long as the file or longer, and not verified: fetched again
            partial.unlink()
            return False
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # a server without ranges sends the whole file
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else remote.size
        bar = progress_bar(partial.name.removesuffix(".part"), total=total, initial=have, unit_scale=True)
        with bar, open(partial, "ab" if have else "wb") as file:
            try:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                    have += len(chunk)
            except requests.RequestException:
                return False
    return total is None or have >= total


def _check(remote: Remote, partial: Path) -> None:
    size, fault = partial.stat().st_size, ""
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
        advice = f"Run the same command again; if that does not help, {OTHERWISE}"
        raise InputError(f"{remote.url} is not the published file: it has {fault}. The download was removed. {advice}")


def _get(remote: Remote, headers: dict[str, str], *, stream: bool = False) -> requests.Response:
    """The server's answer, after up to ``ATTEMPTS`` attempts."""
    headers = {"Accept-Encoding": "identity", **headers}
    if remote.token:  # requests does not send it on to another server that a redirection names
        headers["Authorization"] = f"Bearer {remote.token}"
    retry = Retry(ATTEMPTS - 1, backoff_factor=FIRST_PAUSE, status_forcelist=(408, 429, 500, 502, 503, 504))
    session = requests.Session()
    session.mount("https://", HTTPAdapter(max_retries=retry))
    session.mount("http://", HTTPAdapter(max_retries=retry))
    try:
        response = session.get(remote.url, headers=headers, stream=stream, timeout=TIMEOUT)
    except ValueError as error:
        raise InputError(f"cannot request {remote.url} ({error}). Check HF_ENDPOINT and HF_TOKEN") from error
    except requests.RequestException as error:
        raise _failed(remote, " ".join(str(error).split()) or type(error).__name__) from error
    if response.status_code >= 400 and response.status_code != 416:
        advice = {401: remote.refused, 403: remote.refused, 404: ABSENT, 410: ABSENT}.get(response.status_code, "")
        answer = f"HTTP {response.status_code} {response.reason}"
        raise InputError(f"the server refused {remote.url} ({answer}). {advice}".strip())
    return response


def _failed(remote: Remote, reason: str) -> InputError:
    advice = "Check the connection and run the same command again; a download resumes where it stopped"
    return InputError(f"cannot download {remote.url}: {ATTEMPTS} attempts failed ({reason}). {advice}")


def hub_parquet(name: str, revision: str) -> tuple[str, dict[str, Remote]]:
    """What to call a data set on Hugging Face, and its parquet files by name.

    A branch as revision is replaced by its current commit. ``HF_ENDPOINT`` overrides the server; ``HF_TOKEN`` is for data
    sets with terms to accept.
    """
    server = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
    if not re.match(r"(?i)https?://[^\s/?#]", server):
        raise InputError(f"HF_ENDPOINT is {printable(server)}. It must be a server, as in https://huggingface.co")
    token = (os.environ.get("HF_TOKEN") or "").strip() or None
    terms = f"accept the terms at {server}/datasets/{name} while logged in"
    refused = " (the present one is refused)" if token else ""
    advice = f"If the name is right, {terms}, create a token in your settings, and set HF_TOKEN to it{refused}"
    url = f"{server}/api/datasets/{quote(name)}/revision/{quote(revision)}?blobs=true"
    response = _get(Remote(url, token=token, refused=advice), {})
    files = {}
    try:
        found = response.json()
        revision = found.get("sha") or revision
        for file in found["siblings"]:
            path, facts = PurePosixPath(file["rfilename"]), file.get("lfs")
            if facts and path.suffix == ".parquet":
                address = f"{server}/datasets/{quote(name)}/resolve/{quote(revision)}/{quote(str(path))}"
                files[path.name] = Remote(address, int(facts["size"]), f"sha256:{facts['sha256']}", advice, token)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the answer of {url} is not a list of files. Check HF_ENDPOINT and the proxy") from error
    if not files:
        raise InputError(f"{url} lists no parquet files with their SHA-256")
    return f"{name} on Hugging Face, revision {revision}", files


class RemoteFile(io.RawIOBase):
    """A file on a server, read in ranges: for the small parts of a large file."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self.remote, self.position = remote, 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.remote.size)[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.remote.size if size < 0 else min(self.position + size, self.remote.size)
        if self.position >= end:
            return b""
        response = _get(self.remote, {"Range": f"bytes={self.position}-{end - 1}"})
        if response.status_code != 206 or len(response.content) != end - self.position:
            raise InputError(f"{self.remote.url} did not send its bytes {self.position} to {end - 1}. Try again later")
        self.position = end
        return response.content
