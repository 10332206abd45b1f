"""The network simplex on a CUDA device: exact, with both vectors of duals, and without waiting for the device.

The kernel is the CUDA text ``simplex.cu`` beside this file. NVRTC, which comes with torch, compiles it when a size is first
used: no nvcc, no C compiler and no header is needed. A problem that cannot be solved gets NaN for its value, flow and duals
and leaves its status in one number per device, which :func:`settle` reads and raises.
"""

import ctypes
import sys
import threading
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import ProblemError, SolverError

LARGEST = 64  # nodes a side; beyond, registers spill and the CPU takes over
REGISTER_NODES = 40  # up to here, the reduced costs stay in registers
TRIALS = 8  # problems solved and certified when a size is first used
STATUS = {
    1: (SolverError, "simplex did not converge within its limit of pivots"),
    2: (ProblemError, "costs or weights have entries that are not finite, or weights are negative"),
    3: (ProblemError, "supply and demand sum to different totals; scale both with scale_to_mass"),
    4: (SolverError, "the answer of simplex failed its optimality check"),
}
_fault_counters: dict[torch.device, Tensor] = {}


class Solution(NamedTuple):
    value: Tensor  # (B,)
    flow: Tensor  # (B,N,M)
    u: Tensor  # (B,N)
    v: Tensor  # (B,M)
    pivots: Tensor  # (B,)
    status: Tensor  # (B,): 0, or a key of STATUS


def is_usable(device: torch.device, n: int, m: int, dtype: torch.dtype) -> bool:
    """Whether this size can be solved on the device: compiled and tried on the first call; a fault is a warning, once."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _first_use:
        fault = _try(index, n, m, dtype)
    if fault:
        _warn_once(fault)
    return not fault


def solve_tensors(cost: Tensor, supply: Tensor, demand: Tensor) -> Solution:
    """Contiguous ``(B,N,M), (B,N), (B,M)`` of one dtype on one CUDA device to a :class:`Solution`. Does not wait for it."""
    batch, n, m = cost.shape
    device = cost.device
    like = (torch.empty_like(tensor) for tensor in (cost, supply, demand))
    if device not in _fault_counters:
        _fault_counters[device] = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        # Filling them is a call of the CUDA runtime, which makes its context current in a thread that is new to it.
        counts = torch.zeros(2, batch, dtype=torch.int32, device=device)
        kernel = _kernel(device.index, n, m, cost.dtype)
        solution = Solution(cost.new_empty(batch), *like, *counts)
        # The stream of each call: inside a graph capture it is another one.
        stream = torch.cuda.current_stream(device).cuda_stream
        _libraries().launch(kernel, stream, batch, [cost, supply, demand, batch, *solution, _fault_counters[device]])
    return solution


def settle(device: torch.device | None = None) -> None:
    """Wait for the current stream of a CUDA device, or of all of them. If a problem since the last call of this function was
    not solved: ProblemError (a ValueError) for values that make no transportation problem, SolverError where the solver failed.
    """
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for place, counter in list(_fault_counters.items()):
        if device in (None, place) and (code := int(counter)):
            counter.zero_()
            error, message = STATUS[code]
            raise error(f"{message} (a problem on {place})")


# --- First use --------------------------------------------------------------------------------------------------------

_first_use = threading.RLock()  # DataParallel matches in several threads


@cache
def _warn_once(fault: str) -> None:
    warnings.warn(f"simplex runs on the CPU: {fault}", RuntimeWarning, stacklevel=2)


@cache
def _try(device: int, n: int, m: int, dtype: torch.dtype) -> str | None:
    """Compile and load the kernel, and solve some fixed problems with it; the reason why it cannot be used, if any."""
    if max(n, m) > LARGEST:
        return f"problems of more than {LARGEST} nodes do not fit the CUDA kernel"
    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA (the kernel does not run under HIP)"
    waits = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        problems = [part.to(torch.device("cuda", device)) for part in trial_problems(n, m, dtype)]
        if wrong := certificate_fault(*problems, solve_tensors(*problems)):
            _fault_counters[problems[0].device].zero_()  # no problem of the caller failed
            return f"the CUDA kernel gave wrong answers for {n} x {m} nodes on this device ({wrong})"
        return None
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except (OSError, RuntimeError, AttributeError) as error:
        if "captur" in str(error):  # says nothing about the device
            first = f"solve one problem of {n} x {m} nodes by simplex before a CUDA graph captures it"
            raise SolverError(f"{first} ({str(error).splitlines()[0]})") from error
        return f"the CUDA kernel for {n} x {m} nodes cannot be built or started ({error})"
    finally:
        torch.cuda.set_sync_debug_mode(waits)


def trial_problems(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """:data:`TRIALS` fixed problems ``(B,N,M), (B,N), (B,M)`` on the CPU: distinct costs, ties, and weights of zero."""
    draw = torch.Generator().manual_seed(0)
    cost = torch.rand(TRIALS, n, m, generator=draw, dtype=torch.float64)
    cost[::2] = (4 * cost[::2]).round()
    supply, demand = (torch.rand(TRIALS, k, generator=draw, dtype=torch.float64) for k in (n, m))
    supply[1::4, 1:] *= supply[1::4, 1:] > 0.3
    supply, demand = supply / supply.sum(1, keepdim=True), demand / demand.sum(1, keepdim=True)
    return cost.to(dtype), supply.to(dtype), demand.to(dtype)


def certificate_fault(cost: Tensor, supply: Tensor, demand: Tensor, solution: Solution) -> str | None:
    """What keeps a solution from being optimal, if anything. This proves it: no other solver is needed.

    A flow with the right sums and duals with ``u_i + v_j <= cost_ij`` whose values agree are both optimal (weak duality).
    """
    parts = cost, supply, demand, *solution[:4]
    cost, supply, demand, value, flow, u, v = (part.double().cpu() for part in parts)
    demand = demand * (supply.sum(1) / demand.sum(1)).unsqueeze(1)
    scale, mass = cost.abs().amax((1, 2)), supply.sum(1)
    rows, columns = (flow.sum(2) - supply).abs().amax(1), (flow.sum(1) - demand).abs().amax(1)
    misses = {
        "sums of the flow": torch.maximum(rows, columns) / mass,
        "sign of the flow": -flow.amin((1, 2)) / mass,
        "duals": (u.unsqueeze(2) + v.unsqueeze(1) - cost).amax((1, 2)) / scale,
        "duality gap": ((cost * flow).sum((1, 2)) - (u * supply).sum(1) - (v * demand).sum(1)).abs() / (scale * mass),
        "value": ((cost * flow).sum((1, 2)) - value).abs() / (scale * mass),
    }
    tolerance = 1e-5 if solution.value.dtype == torch.float32 else 1e-6
    wrong = [name for name, miss in misses.items() if not bool((miss <= tolerance).all())]
    return ", ".join(wrong) or None


# --- NVRTC and the driver, through their C interfaces -----------------------------------------------------------------


class Kernel(NamedTuple):
    function: ctypes.c_void_p
    warps: int  # problems per block


@cache
def _kernel(device: int, n: int, m: int, dtype: torch.dtype) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    options, warps = compile_options(f"sm_{major}{minor}", n, m, dtype)
    return Kernel(_libraries().load(_libraries().compile(source(), options)), warps)


def source() -> str:
    return Path(__file__).with_name("simplex.cu").read_text(encoding="utf-8")


def compile_options(architecture: str, n: int, m: int, dtype: torch.dtype) -> tuple[list[str], int]:
    """The options of the compiler, and the problems per block that they ask for."""
    shared = max(n, m) > REGISTER_NODES
    warps = 1 if shared else 4
    real = {torch.float64: "double"}.get(dtype, "float")
    macros = {"N": n, "M": m, "WARPS": warps, "SHARED": int(shared), "real": real}
    return [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={x}" for k, x in macros.items())], warps


class Libraries:
    """The functions needed of NVRTC and of the driver. Their C interfaces have not changed since CUDA 11.2."""

    def __init__(self) -> None:
        self.nvrtc = _load_nvrtc()
        self.driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def compile(self, text: str, options: list[str]) -> bytes:
        """CUDA text to the machine code of one architecture. RuntimeError with the compiler's log."""
        nvrtc, program, size = self.nvrtc, ctypes.c_void_p(), ctypes.c_size_t()
        _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"simplex.cu", 0, None, None), "NVRTC")
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if nvrtc.nvrtcCompileProgram(program, len(options), array):
                _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "NVRTC")
                log = ctypes.create_string_buffer(size.value)
                _check(nvrtc.nvrtcGetProgramLog(program, log), "NVRTC")
                raise RuntimeError(" ".join(log.value.decode(errors="replace").split()) or "NVRTC gives no reason")
            _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
            image = ctypes.create_string_buffer(size.value)
            _check(nvrtc.nvrtcGetCUBIN(program, image), "NVRTC")
            return image.raw
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def load(self, image: bytes) -> ctypes.c_void_p:
        """Machine code to its function ``solve``, in the current context."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(self.driver.cuModuleLoadData(ctypes.byref(module), image), "the CUDA driver (loading)")
        _check(self.driver.cuModuleGetFunction(ctypes.byref(function), module, b"solve"), "the CUDA driver (loading)")
        return function

    def launch(self, kernel: Kernel, stream: int, problems: int, arguments: list[Tensor | int]) -> None:
        """Start the kernel, a warp per problem."""
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_longlong(a) for a in arguments]
        array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid, block = (-(-problems // kernel.warps), 1, 1), (32 * kernel.warps, 1, 1)
        handle = ctypes.c_void_p(stream)
        code = self.driver.cuLaunchKernel(kernel.function, *grid, *block, 0, handle, array, None)
        _check(code, "the CUDA driver (launch)")


_libraries = lru_cache(maxsize=1)(Libraries)


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with code {code}")


def _load_nvrtc() -> ctypes.CDLL:
    folder = Path(torch.__file__).parent
    if sys.platform == "win32":
        return ctypes.CDLL(str(min(folder.glob("lib/nvrtc64_*_0.dll"), default="nvrtc64.dll")))
    try:
        return ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")  # loaded by torch, or known to the system
    except OSError:
        places = folder / "lib", *folder.parent.glob("nvidia/*/lib")
        libraries = [path for place in places for path in place.glob("libnvrtc*.so*")]
        builtins = [path for path in libraries if "builtins" in path.name]
        compilers = sorted(path for path in set(libraries) - set(builtins) if ".alt" not in path.name)
        if not compilers:
            raise
        for path in (*builtins, compilers[0]):
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        return library
