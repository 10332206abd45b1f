"""Folders that are built by one process at a time, appear under their name when complete, and have a hash."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.run import hold_lock
from utils import check_writable

# Written by prepare.py and compared with the files by verify.py: {"dataset": "fc100", "recipe": 1, "source": "...",
# "options": {...}, "sha256": "...", "splits": {"train": {"classes": 60, "images": 36000, "per_class": {...}}, ...}}
MANIFEST = "manifest.json"


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold ``.<name>.lock`` beside a folder while it is built; InputError if another process is building it."""
    path = target.with_name(f".{target.name}.lock")
    check_writable(path)
    lock = hold_lock(path, "Wait for it to finish")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released
        del lock


def holds_files(folder: Path) -> bool:
    """Whether there is anything but folders at any depth."""
    return any(entry.is_symlink() or not entry.is_dir() for entry in folder.rglob("*"))


def remove_empty(folder: Path) -> None:
    """Remove the empty folders below a folder, and the folder itself if nothing is left in it."""
    for root, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it is not empty
            os.rmdir(root)


def split_counts(per_class: Mapping[str, int]) -> dict[str, Any]:
    """What a manifest, or a report, says of a split."""
    return {"classes": len(per_class), "images": sum(per_class.values()), "per_class": dict(sorted(per_class.items()))}


def tree_hash(digests: Mapping[str, str]) -> str:
    """One SHA-256 for a folder: of its relative paths (with ``/``) in sorted order, each with the SHA-256 of its file."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{digests[name]}  {name}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()
