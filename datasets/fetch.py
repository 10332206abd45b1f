"""Fetch a published data set or model: download its archive, check it, and extract it to where the scripts look.

    python datasets/fetch.py NAME [archive already downloaded, or its file:// URL]

Data sets go into ``datasets/``, models into the folder above it. The folder appears only when it is complete. An
interrupted download stays there as ``<archive>.part*`` and is resumed by the next call. Extraction happens in
``.<archive>.extracting``, which is removed on the way out, or by the next call if the process was killed outright.

Exit status: 0 if the folder is in place, 1 if it cannot be had, 2 for bad arguments, 130 after Ctrl-C or SIGTERM.
"""

import argparse
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

PROJECT = Path(__file__).resolve().parents[1]


GONE = "It was reported gone in 2023. "
PREPARE = "Or build it from a source that exists: python datasets/prepare.py {}"
TRAIN = "Such models can be trained with train_pretrain.py and train_meta.py."


class Download(NamedTuple):
    """An archive on Google Drive, the folder it holds (in any of these spellings), and where else to get the data."""

    drive_id: str
    archive: str
    folders: tuple[str, ...]
    otherwise: str
    into: str = "datasets"  # relative to the project


DOWNLOADS = {
    "miniimagenet": Download(
        "191cFzwwNTzG_mHUDABF0Nh77cI6pa-qq",
        "miniimagenet.tar",
        ("miniimagenet",),
        GONE + PREPARE.format("miniimagenet"),
    ),
    "tieredimagenet": Download(
        "1ANczVwnI1BDHIF65TgulaGALFnXBvRfs",
        "tieredimagenet.tar",
        ("tiered_imagenet", "tieredimagenet"),
        GONE + PREPARE.format("tieredimagenet -source ILSVRC2012_img_train.tar"),
    ),
    "cub": Download("1B8jmZin9teye7Lte9ZKsQ3lyMASbxune", "cub.tar", ("cub",), PREPARE.format("cub")),
    "fc100": Download("1nEh3O2RJ5zTbWj7luyQCNcklpX0_5KlS", "FC100.tar", ("FC100", "fc100"), PREPARE.format("fc100")),
    "cifar_fs": Download(
        "1Lq2USoQmbFgCFJlGx3huFSfjqwtxMCL8", "cifar_fs.tar", ("cifar_fs",), PREPARE.format("cifar_fs")
    ),
    "pretrain_model": Download(
        "1Prn7_41NVrZbnePAlSiKjD21Jlz0LKJM", "deepemd_pretrain_model.tar", ("deepemd_pretrain_model",), TRAIN, "."
    ),
    "trained_model": Download(
        "1lGcNHMRnBrjODDmt647RzMJ5cLCd4pmv", "deepemd_trained_model.tar", ("deepemd_trained_model",), TRAIN, "."
    ),
}

# Images and weights hardly compress, so an archive that grows by more than this is not one of them.
MOST_GROWTH, SPARE_BYTES = 20, 64 << 20
BLOCK = tarfile.BLOCKSIZE

DRIVE_REFUSED = re.compile("failed to retrieve file url|quota|too many users|many accesses", re.IGNORECASE)
NETWORK_FAILED = re.compile(
    "failed to resolve|name resolution|name or service not known|getaddrinfo|connection refused|connection reset"
    "|connection aborted|network is unreachable|no route to host|timed out|max retries exceeded|proxy",
    re.IGNORECASE,
)


class FetchError(Exception):
    """The archive cannot be had or extracted, or is not what it should be."""


class BrokenArchive(FetchError):
    """The archive itself is at fault: there is no use in keeping it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} -h)\n")


def main() -> None:
    parser = _Parser(description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=DOWNLOADS, help=f"one of {', '.join(DOWNLOADS)}")
    parser.add_argument("source", nargs="?", help="archive already downloaded, or its file:// URL")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill cleans up just as Ctrl-C does
    try:
        fetch(args.name, args.source, PROJECT)
    except (FetchError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the next call resumes an unfinished download", file=sys.stderr)
        sys.exit(130)


def fetch(name: str, source: str | None, project: Path) -> None:
    """Put the folder of ``DOWNLOADS[name]`` in place, from the archive ``source`` or else from Google Drive."""
    download = DOWNLOADS[name]
    into = project / download.into
    for folder in download.folders:
        if _holds_files(into / folder):
            print(f"{into / folder} is there already: nothing to do (remove it to fetch it again)")
            return
    into.mkdir(parents=True, exist_ok=True)
    path = _download(name, into) if source is None else _local(source)
    try:
        target = _extract(path, into, download)
    except BrokenArchive as error:
        if source is not None:
            raise
        path.unlink()
        raise FetchError(f"Google Drive sent no usable archive: {error}. {_advice(name)}") from error
    if source is None:
        path.unlink()
    print(f"{target} is in place")


def _holds_files(folder: Path) -> bool:
    return any(entry.is_symlink() or not entry.is_dir() for entry in folder.rglob("*"))


def _local(source: str) -> Path:
    if source.startswith("file://"):
        source = urllib.request.url2pathname(source.removeprefix("file://").removeprefix("localhost"))
    path = Path(source)
    if not path.is_file():
        raise FetchError(f"expected an archive at {path}; there is no such file")
    return path


def _download(name: str, into: Path) -> Path:
    download = DOWNLOADS[name]
    path = into / f"{download.archive}.part"
    print(f"downloading {download.archive} from Google Drive; it grows as {path}*", flush=True)
    # gdown writes to a temporary file beside its output and resumes that with --continue. The output is there only
    # when complete, and is then not downloaded again.
    command = [sys.executable, "-m", "gdown", download.drive_id, "-O", str(path), "--continue", "--retries", "3"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode == 0 and path.is_file():
        return path
    # gdown indents the cause below a heading and adds general advice; shorter messages have the cause in the last line.
    cause = re.search(r"^(?:Error|Failed to [^\n]*):\n\n(.*?)(?:\n\n|\Z)", done.stderr, re.DOTALL | re.MULTILINE)
    reason = " ".join((cause[1] if cause else (done.stderr.strip().splitlines() or ["no reason given"])[-1]).split())
    if DRIVE_REFUSED.search(done.stderr):
        problem = f"Google Drive refused {download.archive}, because of its quota or its permissions"
    elif NETWORK_FAILED.search(reason):
        problem = f"the network failed while downloading {download.archive}; check the connection and run this again"
    else:
        problem = f"gdown could not download {download.archive}"
    raise FetchError(f"{problem} ({reason}). {_advice(name)}")


def _advice(name: str) -> str:
    download = DOWNLOADS[name]
    return (
        f"Or save https://drive.google.com/file/d/{download.drive_id}/view in a browser and run: "
        f"python datasets/fetch.py {name} path/to/{download.archive}. {download.otherwise}"
    )


def _extract(path: Path, into: Path, download: Download) -> Path:
    scratch = into / f".{download.archive}.extracting"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        _unpack(path, _Sink(scratch, path))
        found = next((scratch / folder for folder in download.folders if (scratch / folder).is_dir()), None)
        if found is None:
            there = ", ".join(sorted(entry.name for entry in scratch.iterdir())[:5]) or "nothing"
            raise FetchError(f"expected the folder {' or '.join(download.folders)} in {path}; it holds {there}")
        if not _holds_files(found):
            raise FetchError(f"expected files in the folder {found.name} of {path}; it is empty")
        target = into / found.name
        if target.is_dir():  # holds no files, as fetch() has seen; rmdir fails if it does by now
            for folder in sorted(target.rglob("*"), reverse=True):
                folder.rmdir()
            target.rmdir()
        found.rename(target)
        return target
    except FetchError:
        raise
    except Exception as error:  # on broken input the readers raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # the disk, rather than the archive
            raise FetchError(f"{path} cannot be extracted ({error})") from error
        raise BrokenArchive(f"{path} is broken ({error or type(error).__name__})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Sink:
    """Writes members of an archive as plain files and folders below ``folder``, within a bound on their size.

    Only names and contents are taken over: no links, no devices, no owners, no permissions. This needs no extraction
    filter of tarfile, which early releases of Python 3.10 and 3.11 lack.
    """

    def __init__(self, folder: Path, archive: Path) -> None:
        self.folder, self.archive, self.taken = folder, archive, 0
        self.bound = MOST_GROWTH * archive.stat().st_size + SPARE_BYTES
        self.free = shutil.disk_usage(folder).free

    def expect(self, size: int) -> None:
        """Raise unless there is room for ``size`` more bytes."""
        if self.taken + size > self.bound:
            raise BrokenArchive(f"{self.archive} holds over {self.bound >> 20} MiB, out of proportion to its own size")
        if self.taken + size > self.free:
            raise FetchError(f"{self.archive} needs more than the {self.free >> 20} MiB free in {self.folder.parent}")

    def take(self, size: int) -> None:
        self.expect(size)
        self.taken += size

    def place(self, name: str) -> Path:
        parts = PureWindowsPath(name)  # knows every separator, and drives
        if parts.anchor or ".." in parts.parts:
            raise BrokenArchive(f"{self.archive} holds {name!r}, which leads out of its folder")
        return self.folder.joinpath(*parts.parts)

    def write(self, name: str, content: IO[bytes] | None) -> None:
        """Write a file, or make a folder if ``content`` is None."""
        target = self.place(name)
        (target.parent if content else target).mkdir(parents=True, exist_ok=True)
        self.take(BLOCK)
        if content:
            with content, open(target, "wb") as file:
                while chunk := content.read(1 << 20):
                    self.take(len(chunk))
                    file.write(chunk)


def _unpack(path: Path, sink: _Sink) -> None:
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as content:
            _unpack_tar(content, sink)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as content:
            _unpack_zip(content, sink)
    else:
        raise BrokenArchive(f"expected a tar or zip archive in {path}; it is neither, or it is cut off")


def _unpack_tar(content: tarfile.TarFile, sink: _Sink) -> None:
    sink.expect(sink.archive.stat().st_size)
    for member in content:
        sink.expect(member.size)
        if member.isdir():
            sink.write(member.name, None)
        elif member.isreg():
            sink.write(member.name, content.extractfile(member))
        elif member.issym() or member.islnk():  # becomes a copy of the file it leads to
            start = os.path.dirname(member.name) if member.issym() else ""
            linked = sink.place(os.path.normpath(os.path.join(start, member.linkname)))
            if not linked.is_file():
                raise BrokenArchive(f"{sink.archive} holds the link {member.name!r} to {member.linkname!r}, not a file")
            sink.write(member.name, linked.open("rb"))
        else:
            raise BrokenArchive(f"{sink.archive} holds {member.name!r}, which is neither a file nor a folder")
    # tarfile takes a header that it cannot read for the end, and stops before the checksum of a compressed archive.
    content.fileobj.seek(content.offset)
    if content.fileobj.read(BLOCK) != bytes(BLOCK):
        raise BrokenArchive(f"{sink.archive} is broken (cut off, or not readable from byte {content.offset} on)")
    while chunk := content.fileobj.read(1 << 20):
        sink.take(len(chunk))


def _unpack_zip(content: zipfile.ZipFile, sink: _Sink) -> None:
    sink.expect(sum(member.file_size for member in content.infolist()))
    for member in content.infolist():
        if member.flag_bits & 1:
            raise BrokenArchive(f"{sink.archive} is encrypted; expected one that needs no password")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise BrokenArchive(f"{sink.archive} holds {member.filename!r}, which is neither a file nor a folder")
        sink.write(member.filename, None if member.is_dir() else content.open(member))  # reading checks the CRC


if __name__ == "__main__":
    main()
