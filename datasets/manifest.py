"""The record that prepare.py writes into a data set, and that verify.py compares with the files on disk.

{"dataset": "fc100", "recipe": 1, "source": "...", "options": {...}, "sha256": "...",
 "splits": {"train": {"classes": 60, "images": 36000, "per_class": {"apple": 600, ...}}, ...}}
"""

import hashlib
from collections.abc import Mapping

NAME = "manifest.json"
RECIPE = 1  # to be increased when the same source gives other files


def tree_hash(digests: Mapping[str, str]) -> str:
    """One SHA-256 for a folder: of its relative paths (with ``/``) in sorted order, each with the SHA-256 of its file.

    The manifest itself is not part of it.
    """
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{digests[name]}  {name}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()
