"""The memory of this process, as Linux reports it, and the rows of a table."""

import re
from pathlib import Path


def megabytes(field: str) -> float:
    """``VmRSS`` (in use now) or ``VmHWM`` (the peak); nan on other systems. A peak from getrusage may be the parent's."""
    status = Path("/proc/self/status")
    return int(re.search(rf"{field}:\s*(\d+)", status.read_text())[1]) / 1024 if status.exists() else float("nan")


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)
