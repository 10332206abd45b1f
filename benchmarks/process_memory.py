"""Memory of this process, as Linux tells it."""

from pathlib import Path


def megabytes(field: str) -> float:
    """``VmRSS`` (in use now) or ``VmHWM`` (the peak); nan where there is no such thing to read.

    Not ``resource.getrusage``: its peak is handed on to a process from the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
