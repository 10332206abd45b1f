"""Download and extract a published data set or model to where the scripts look for it.

    python datasets/fetch.py NAME [archive already downloaded, or its file:// URL]

Data sets go into ``datasets/``, models into the folder above it. The folder appears when it is complete. An interrupted
download is kept as ``<archive>.part*`` and resumed by the next call.
"""

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from urllib.request import url2pathname

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gdown
from archives import Archive, BrokenArchive
from folders import exclusive, holds_files, remove_empty
from requests.exceptions import RequestException

from dataloader.catalog import CATALOG
from engine.command_line import make_parser
from utils import InputError, first_few, run_script

PROJECT = Path(__file__).resolve().parents[1]


class Download(NamedTuple):
    """An archive on Google Drive, the folder it holds (in any of these spellings), and where else to get the data."""

    drive_id: str
    archive: str
    folders: tuple[str, ...]
    otherwise: str
    into: str = "datasets"  # relative to the project


DATA_SETS = {
    "miniimagenet": "191cFzwwNTzG_mHUDABF0Nh77cI6pa-qq",
    "tieredimagenet": "1ANczVwnI1BDHIF65TgulaGALFnXBvRfs",
    "cub": "1B8jmZin9teye7Lte9ZKsQ3lyMASbxune",
    "fc100": "1nEh3O2RJ5zTbWj7luyQCNcklpX0_5KlS",
    "cifar_fs": "1Lq2USoQmbFgCFJlGx3huFSfjqwtxMCL8",
}
MODELS = {"pretrain_model": "1Prn7_41NVrZbnePAlSiKjD21Jlz0LKJM", "trained_model": "1lGcNHMRnBrjODDmt647RzMJ5cLCd4pmv"}
BUILD, TRAIN = "To build it from its original source:", "To train such models: train_pretrain.py and train_meta.py"
DOWNLOADS = {
    name: Download(drive_id, f"{name}.tar", CATALOG[name].folders, f"{BUILD} {CATALOG[name].obtain}")
    for name, drive_id in DATA_SETS.items()
}
for _name, _id in MODELS.items():
    DOWNLOADS[_name] = Download(_id, f"deepemd_{_name}.tar", (f"deepemd_{_name}",), TRAIN, ".")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=DOWNLOADS, help=f"one of {', '.join(DOWNLOADS)}")
    parser.add_argument("source", nargs="?", help="archive already downloaded, or its file:// URL")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    fetch(args.name, args.source, PROJECT)


def fetch(name: str, source: str | None, project: Path) -> None:
    """Put the folder of ``DOWNLOADS[name]`` in place, from the archive ``source`` or else from Google Drive."""
    download = DOWNLOADS[name]
    into = project / download.into
    if source and source.startswith("file://"):
        source = url2pathname(source.removeprefix("file://").removeprefix("localhost"))
    if source is not None and not Path(source).is_file():
        raise InputError(f"there is no archive {source}")
    with exclusive(into / download.archive):
        found = next((into / folder for folder in download.folders if holds_files(into / folder)), None)
        if found:
            print(f"{found} exists: nothing to do (remove it to fetch it again)")
            return
        path = Path(source) if source else _download(name, into)
        try:
            target = _extract(path, into, download)
        except BrokenArchive as error:
            if source is not None:
                raise
            path.unlink()
            raise InputError(f"Google Drive sent no usable archive: {error}. {_advice(name)}") from error
    if source is None:
        path.unlink()
    print(f"{target} is in place")


def _download(name: str, into: Path) -> Path:
    archive = DOWNLOADS[name].archive
    path = into / f"{archive}.part"
    if path.is_file():  # complete, from a call that was interrupted later
        return path
    print(f"downloading {archive} from Google Drive to {path}*", flush=True)
    try:  # gdown writes to a temporary file beside its output, and resumes that
        gdown.download(id=DOWNLOADS[name].drive_id, output=str(path), resume=True, retries=3, timeout=60)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, RequestException):
            raise  # the disk is at fault
        reason = " ".join(str(error).split()) or type(error).__name__
        again = "Run this again to resume the download, unless the file is over its quota"
        text = f"cannot download {archive} from Google Drive ({reason}). {again}; if that fails as well, remove {path}*"
        raise InputError(f"{text}. {_advice(name)}") from error
    return path


def _advice(name: str) -> str:
    drive_id, archive, _, otherwise, _ = DOWNLOADS[name]
    command = f"python datasets/fetch.py {name} path/to/{archive}"
    return f"Or save https://drive.google.com/file/d/{drive_id}/view in a browser and run: {command}. {otherwise}"


def _extract(path: Path, into: Path, download: Download) -> Path:
    scratch = into / f".{download.archive}.extracting"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        scratch.mkdir()
        _unpack(Archive(path), scratch)
        found = next((scratch / folder for folder in download.folders if (scratch / folder).is_dir()), None)
        if found is None:
            names = first_few(sorted(os.listdir(scratch)))
            raise BrokenArchive(f"{path} has no folder {' or '.join(download.folders)}; it holds {names}")
        target = into / found.name
        remove_empty(target)  # fetch() found no file in it; if there is one by now, the renaming fails
        found.rename(target)
        return target
    except OSError as error:
        raise InputError(f"{path} cannot be extracted ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpack(archive: Archive, folder: Path) -> None:
    """Write the members of an archive as plain files and folders; only their names and contents are used."""
    for member in archive.members():
        name = PureWindowsPath(member.name)  # knows every separator, and drives
        if name.anchor or ".." in name.parts or "\0" in member.name:
            raise BrokenArchive(f"{archive.path} holds {member.name!r}, which leads out of its folder")
        if member.kind == "other":
            raise BrokenArchive(f"{archive.path} holds {member.name!r}, which is neither a file nor a folder")
        target = folder.joinpath(*name.parts)
        (target if member.kind == "folder" else target.parent).mkdir(parents=True, exist_ok=True)
        if member.kind == "file":
            with open(target, "wb") as file:
                file.writelines(archive.chunks(member))


if __name__ == "__main__":
    run_script(main)
