"""Fetch one published archive, check it, extract it to where the scripts look. The download_*.sh scripts call it.

    python datasets/fetch.py <Google Drive id> <archive name> <into> <folder>[,<folder>] [local archive or file:// URL]

``<into>`` is the folder that the archive is extracted in, ``<folder>`` the one it must hold (any of several spellings).
What is half done is kept under ``<archive>.part`` and ``<into>/.<archive>.extracting``; the first is resumed, the second
thrown away. Exit status 1 and one message when it cannot be had.
"""

import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

# Members keep to the folder they are extracted in: Python's filter "data" refuses absolute paths, "..", links that lead
# out, and devices.
FILTER = "data"


class FetchError(Exception):
    """The archive cannot be had, or is not what it should be."""


def main() -> None:
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    drive_id, archive, into, folders = sys.argv[1:5]
    source = sys.argv[5] if len(sys.argv) == 6 else None
    try:
        fetch(drive_id, archive, Path(into), folders.split(","), source)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def fetch(drive_id: str, archive: str, into: Path, folders: list[str], source: str | None) -> None:
    """Put ``into/<folder>`` in place, from Google Drive or from ``source``."""
    for folder in folders:
        if (into / folder).exists():
            print(f"{into / folder} is there already: nothing to do (remove it to fetch it again)")
            return
    into.mkdir(parents=True, exist_ok=True)
    path = _download(drive_id, into / f"{archive}.part", archive) if source is None else _local(source)
    found = _extract(path, into / f".{archive}.extracting", into, folders)
    if source is None:
        path.unlink()
    print(f"{found} is in place")


def _local(source: str) -> Path:
    if source.startswith("file://"):
        source = urllib.request.url2pathname(urllib.parse.urlparse(source).path)
    path = Path(source)
    if not path.is_file():
        raise FetchError(f"expected an archive in {path}; there is no such file")
    return path


def _download(drive_id: str, partial: Path, archive: str) -> Path:
    way_round = (
        f"Google Drive did not give {archive} (id {drive_id}). Its quota may be used up for today, or the file may be gone. "
        f"Try again tomorrow, or open https://drive.google.com/file/d/{drive_id}/view in a browser, save the archive, and "
        "give its path to this script. " + WAYS_ROUND.get(archive, "")
    ).strip()
    # gdown writes beside its output while it downloads, and takes that up again with --continue; the output itself is
    # there only when complete, and is not checked again, so it is thrown away when it proves to be no archive.
    command = [sys.executable, "-m", "gdown", drive_id, "-O", str(partial), "--continue", "--retries", "3"]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise FetchError(f"{way_round} ({error})") from error
    if done.returncode != 0 or not partial.is_file():
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise FetchError(f"{way_round} ({last[0].strip()})")
    if not _is_archive(partial):
        partial.unlink()
        raise FetchError(f"{way_round} (what came is a web page or broken, not an archive)")
    return partial


def _is_archive(path: Path) -> bool:
    return tarfile.is_tarfile(path) or zipfile.is_zipfile(path)


def _extract(path: Path, scratch: Path, into: Path, folders: list[str]) -> Path:
    if not _is_archive(path):
        raise FetchError(f"expected a tar or zip archive in {path}; it is neither, or it is cut off")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if tarfile.is_tarfile(path):
            with tarfile.open(path) as content:
                content.extractall(scratch, filter=FILTER)
        else:
            with zipfile.ZipFile(path) as content:
                content.extractall(scratch)  # drops absolute paths and ".." by itself
        found = next((scratch / folder for folder in folders if (scratch / folder).is_dir()), None)
        if found is None:
            there = ", ".join(sorted(entry.name for entry in scratch.iterdir())[:5]) if scratch.is_dir() else "nothing"
            raise FetchError(f"expected the folder {' or '.join(folders)} in {path}; it holds {there}")
        target = into / found.name
        found.rename(target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{path} cannot be extracted ({error}); fetch it again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


WAYS_ROUND = {
    "miniimagenet.tar": "This file was reported gone in 2023; miniImageNet can be rebuilt at its original size from "
    "ImageNet's training images and the published csv files.",
    "tieredimagenet.tar": "This file was reported gone in 2023; tieredImageNet can be rebuilt from ImageNet's training "
    "images and the published lists of classes.",
    "FC100.tar": "FC100 can be rebuilt from CIFAR-100, which torchvision downloads.",
    "cifar_fs.tar": "CIFAR-FS can be rebuilt from CIFAR-100, which torchvision downloads.",
    "cub.tar": "CUB can be rebuilt from CUB_200_2011, cut to the bounding boxes.",
}

if __name__ == "__main__":
    main()
