"""Runs the CUDA text of the EMD on a CPU: 32 fibers take the part of the lanes of a warp. Needs g++.

value, flow, u, v, pivots, status = solve(cost, supply, demand)
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from helpers import ROOT

FIBERS = Path(__file__).with_name("fibers.cpp")
KERNEL = ROOT / "Models" / "emd" / "simplex.cu"
REGISTER_NODES = 40  # as in Models/emd/simplex_cuda.py

has_compiler = shutil.which("g++") is not None


@cache
def build(n: int, m: int, real: str = "double", *, architecture: int = 900, shared: bool | None = None) -> ctypes.CDLL:
    """The kernel of one size as a library: ``run`` solves problems, and ``cu*`` stand in for the driver.

    Args:
        architecture: 750 compiles the variant without reductions of a warp.
        shared: keep the tile in (what stands for) shared memory; as the package chooses when None.
    """
    shared = max(n, m) > REGISTER_NODES if shared is None else shared
    macros = {"N": n, "M": m, "real": real, "__CUDA_ARCH__": architecture, "WARPS": 1, "SHARED": int(shared)}
    flags = [f"-D{name}={value}" for name, value in macros.items()]
    text = FIBERS.read_text() + KERNEL.read_text() + " ".join(flags)
    library = Path(tempfile.gettempdir(), f"emd-fibers-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so")
    if not library.exists():
        partial = library.with_name(f"{library.name}.{np.random.default_rng().integers(1 << 62)}")
        command = ["g++", "-O2", "-std=c++17", "-fPIC", "-shared", "-w", f"-I{KERNEL.parent}", *flags, str(FIBERS)]
        subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True)
        partial.replace(library)
    return ctypes.CDLL(str(library))


def solve(
    cost: np.ndarray,
    supply: np.ndarray,
    demand: np.ndarray,
    *,
    real: str = "double",
    architecture: int = 900,
    shared: bool | None = None,
) -> tuple[np.ndarray, ...]:
    """``(B,N,M), (B,N), (B,M)`` to value ``(B,)``, flow, the duals u and v, pivots ``(B,)`` and status ``(B,)``."""
    batch, n, m = cost.shape
    dtype = np.dtype(np.float64 if real == "double" else np.float32)
    library = build(n, m, real, architecture=architecture, shared=shared)
    cost, supply, demand = (np.ascontiguousarray(part, dtype) for part in (cost, supply, demand))
    outputs = [np.empty(batch, dtype), *(np.full_like(part, np.nan) for part in (cost, supply, demand))]
    counts = [np.zeros(batch, np.int32), np.zeros(batch, np.int32), np.zeros(1, np.int32)]
    arrays = [cost, supply, demand, *outputs, *counts]
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    if library.run(*pointers[:3], ctypes.c_longlong(batch), *pointers[3:]):
        raise AssertionError("the lanes of a warp do not meet at the same operation")
    return (*outputs, *counts[:2])
