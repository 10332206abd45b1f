"""Memory of this process, as Linux reports it."""

from pathlib import Path


def megabytes(field: str) -> float:
    """``VmRSS`` (in use now) or ``VmHWM`` (the peak); nan on other systems.

    ``resource.getrusage`` would not do: a process inherits its peak from the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
