"""Progress for people on a terminal, and for the log of a job."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0


class _Lines(tqdm):
    """A bar that writes whole lines, one a minute at the most, and never goes back in one."""

    def __init__(self, **settings: Any) -> None:
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        super().__init__(bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]", **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg == "" or self.disable or time.monotonic() < self.next_line:
            return False
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self.fp.write(f"{self}\n")
        self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        pass


def progress_bar(
    desc: str, *, total: int | None, initial: int = 0, disable: bool = False, unit_scale: bool = False
) -> tqdm:
    """A progress bar on standard error, or lines where that is a file; ``unit_scale`` counts in thousands or millions."""
    settings = {"desc": desc, "total": total, "initial": initial, "disable": disable, "leave": False}
    settings["unit_scale"] = unit_scale
    return tqdm(dynamic_ncols=True, **settings) if sys.stderr.isatty() else _Lines(**settings)
