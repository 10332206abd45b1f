"""Download and extract a published data set or model to where the scripts look for it.

    python datasets/fetch.py NAME [archive already downloaded, or its file:// URL]

Data sets go into ``datasets/``, models into the folder above it. The folder appears when it is complete. An interrupted
download is kept as ``<archive>.part*`` and resumed by the next call. The archive is extracted into ``.<archive>.extracting``,
which is removed at the end, or by the next call if the process was killed.

Exit status: 0 if the folder is in place, 1 if it cannot be fetched, 2 for bad arguments, 130 after Ctrl-C or SIGTERM.
"""

import shutil
import signal
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gdown
from archives import BLOCK, Archive, BrokenArchive, open_archive
from folders import exclusive, holds_files, remove_empty
from requests.exceptions import HTTPError, RequestException

from utils import InputError, make_parser, run_script

PROJECT = Path(__file__).resolve().parents[1]
GONE = "It was reported gone in 2023. "
PREPARE = "Or build it from its original source: python datasets/prepare.py {}"
TRAIN = "Such models can be trained with train_pretrain.py and train_meta.py."
RETRIES, TIMEOUT = 3, 60  # seconds without an answer


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=DOWNLOADS, help=f"one of {', '.join(DOWNLOADS)}")
    parser.add_argument("source", nargs="?", help="archive already downloaded, or its file:// URL")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    fetch(args.name, args.source, PROJECT)


def fetch(name: str, source: str | None, project: Path) -> None:
    """Put the folder of ``DOWNLOADS[name]`` in place, from the archive ``source`` or else from Google Drive.

    Raises:
        InputError: the archive cannot be downloaded or extracted, or is not the published one.
    """
    into = project / DOWNLOADS[name].into
    path = None if source is None else _local(source)
    if _is_in_place(name, into):
        return
    with exclusive(into / DOWNLOADS[name].archive):
        if _is_in_place(name, into):  # another process may have fetched it by now
            return
        path = path or _download(name, into)
        try:
            target = _extract(path, into, DOWNLOADS[name])
        except BrokenArchive as error:
            if source is not None:
                raise
            path.unlink()
            raise InputError(f"Google Drive sent no usable archive: {error}. {_advice(name)}") from error
        if source is None:
            path.unlink()
    print(f"{target} is in place")


def _is_in_place(name: str, into: Path) -> bool:
    found = next((into / folder for folder in DOWNLOADS[name].folders if holds_files(into / folder)), None)
    if found:
        print(f"{found} exists: nothing to do (remove it to fetch it again)")
    return found is not None


def _local(source: str) -> Path:
    if source.startswith("file://"):
        source = urllib.request.url2pathname(source.removeprefix("file://").removeprefix("localhost"))
    if not Path(source).is_file():
        raise InputError(f"there is no archive {source}")
    return Path(source)


def _download(name: str, into: Path) -> Path:
    archive = DOWNLOADS[name].archive
    path = into / f"{archive}.part"
    print(f"downloading {archive} from Google Drive to {path}*", flush=True)
    try:  # gdown writes to a temporary file beside its output, and resumes that
        gdown.download(id=DOWNLOADS[name].drive_id, output=str(path), resume=True, retries=RETRIES, timeout=TIMEOUT)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, RequestException):
            raise  # the disk is at fault
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, gdown.exceptions.FileURLRetrievalError):
            problem = f"Google Drive refused {archive}, because of its quota or its permissions"
        elif _is_of_network(error):
            problem = f"the network failed while downloading {archive}; check the connection and run this again"
        else:
            problem = f"gdown cannot download {archive}; if this happens again, remove {path}*"
        raise InputError(f"{problem} ({reason}). {_advice(name)}") from error
    return path


def _is_of_network(error: BaseException | None) -> bool:
    if isinstance(error, HTTPError):
        return False
    return isinstance(error, (RequestException, TimeoutError)) or (
        error is not None and _is_of_network(error.__cause__)
    )


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
        _unpack(open_archive(path), scratch)
        found = next((scratch / folder for folder in download.folders if (scratch / folder).is_dir()), None)
        if found is None:
            names = ", ".join(sorted(entry.name for entry in scratch.iterdir())[:5]) or "nothing"
            raise BrokenArchive(f"{path} has no folder {' or '.join(download.folders)}; it holds {names}")
        if not holds_files(found):
            raise BrokenArchive(f"the folder {found.name} of {path} is empty")
        target = into / found.name
        if target.is_dir():  # without files, as fetch() has seen; the renaming fails if it has some by now
            remove_empty(target)
        found.rename(target)
        return target
    except OSError as error:
        raise InputError(f"{path} cannot be extracted ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpack(archive: Archive, folder: Path) -> None:
    """Write the members of an archive as plain files and folders below a folder.

    Only names and contents are used: no links, no devices, no owners, no permissions. A link becomes a copy of its file.
    """
    free = shutil.disk_usage(folder).free
    taken, needed = 0, archive.path.stat().st_size

    def place(name: str) -> Path:
        parts = PureWindowsPath(name)  # knows every separator, and drives
        if parts.anchor or ".." in parts.parts or "\0" in name:
            raise BrokenArchive(f"{archive.path} holds {name!r}, which leads out of its folder")
        return folder.joinpath(*parts.parts)

    for member in archive.members():
        target = place(member.name)
        linked = place(member.link) if member.kind == "link" else None
        if linked and not linked.is_file():
            raise BrokenArchive(f"{archive.path} holds the link {member.name!r}, which does not lead to a file")
        if member.kind == "other":
            raise BrokenArchive(f"{archive.path} holds {member.name!r}, which is neither a file nor a folder")
        taken += BLOCK + (linked.stat().st_size if linked else member.size)
        if taken > archive.bound:
            raise BrokenArchive(
                f"{archive.path} holds over {archive.bound >> 20} MiB, out of proportion to its own size"
            )
        if max(taken, needed) > free:
            raise InputError(f"{archive.path} needs more than the {free >> 20} MiB free in {folder.parent}")
        (target if member.kind == "folder" else target.parent).mkdir(parents=True, exist_ok=True)
        if linked:
            shutil.copyfile(linked, target)
        elif member.kind == "file":
            with open(target, "wb") as file:
                file.writelines(archive.chunks(member))


if __name__ == "__main__":
    run_script(main)
