"""Folders that are built by one process at a time and appear under their name when they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.run import hold_lock


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold ``.<name>.lock`` beside a folder while it is built; what was checked before may have changed by then.

    Raises:
        InputError: another process is building it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    lock = hold_lock(path, "Wait for it to finish")
    while lock and not (path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())):
        lock = hold_lock(path, "Wait for it to finish")  # the file that is locked was removed by its last holder
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
    for root, folders, files in os.walk(folder, topdown=False):
        if not files and not any(os.path.lexists(os.path.join(root, name)) for name in folders):
            os.rmdir(root)
