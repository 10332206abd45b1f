"""Time and memory per transportation problem, by solver and size, and the ratios to a plain cv2.EMD loop and to qpth.

    python benchmarks/emd.py                     the whole table (minutes; qpth takes most of them)
    python benchmarks/emd.py -nodes 9,25 -solvers simplex,opencv

The problems are those of the head on features like an encoder's: non-negative, 640 channels, with a part that all nodes
share, ``relu(common + noise)``; costs are centred cosine distances, weights are by cross-reference. Every time is the best
of several calls in this process, which alternate with those of the cv2.EMD loop on one thread; every memory figure is from
a fresh process. "forward" is without gradients, "both" is forward and backward, for all inputs that the solver has a
gradient for. Memory is the growth of the process's peak, per problem.
"""

import argparse
import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_memory import megabytes

from Models.emd import SOLVERS, emd, scale_to_mass
from Models.matching import cosine_similarity_map, cross_reference_weights
from utils import make_parser

CASES = {
    "opencv": ("opencv", {}),
    "simplex": ("simplex", {}),
    "simplex, cost": ("simplex", {"gradient": "cost"}),
    "ipm, L2": ("ipm", {}),
    "ipm, QP": ("ipm", {"form": "QP"}),
    "qpth, L2": ("qpth", {}),
    "qpth, QP": ("qpth", {"form": "QP"}),
}
# One episode of 75 queries and 5 ways has 375 problems; solvers that are dense in (N*M)^2 get fewer.
SMALL_BATCH = 8
MOST_NODES_OF_QPTH = 25
MAX_NODES = 1000
CHANNELS = 640


def problems(nodes: int, batch: int) -> list[torch.Tensor]:
    """Cost ``(batch, nodes, nodes)`` and both weights ``(batch, nodes)``, float64."""
    random = torch.Generator().manual_seed(nodes)
    common = torch.randn(CHANNELS, 1, generator=random)
    query, proto = (torch.relu(common + torch.randn(batch, 1, CHANNELS, nodes, generator=random)) for _ in range(2))
    cost = 1 - cosine_similarity_map(query, proto)[:, 0, 0]
    weights = (cross_reference_weights(*pair)[:, 0, 0] for pair in ((query, proto), (proto, query)))
    return [tensor.double() for tensor in (cost, *(scale_to_mass(weight, nodes) for weight in weights))]


def batch_size(solver: str, nodes: int) -> int:
    """An episode of 75 queries and 5 ways has 375 problems; large ones, and those of qpth, get fewer."""
    return SMALL_BATCH if solver == "qpth" else 375 if nodes <= 30 else 75


def best_times(*works: Callable[[], object], seconds: float = 1.0) -> list[float]:
    """Seconds per call of each, called in turn: the best of at least two calls, or of as many as fit."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    while len(times[0]) < 2 or sum(map(sum, times)) < seconds * len(works) and len(times[0]) < 30:
        for work, spent in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return [min(spent) for spent in times]


def memory_in_a_fresh_process(case: str, nodes: int, batch: int) -> float:
    """Megabytes per problem. A peak shows only in a process that has not freed any memory yet."""
    command = [sys.executable, __file__, "-memory_of", f"{case};{nodes};{batch}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / batch


def peak_growth(case: str, nodes: int, batch: int) -> float:
    """Megabytes by which the peak memory of this process grows over one forward and backward (Linux; nan elsewhere)."""
    torch.set_num_threads(1)
    run_both(case, problems(nodes, 1))  # whatever is loaded and compiled once
    inputs = problems(nodes, batch)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what the problems took while they were made
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current use
        before = megabytes("VmRSS")
        run_both(case, inputs)
        return max(0.0, megabytes("VmHWM") - before)
    except (OSError, AttributeError, TypeError):
        return float("nan")


def cv2_loop(nodes: int, batch: int) -> Callable[[], None]:
    """A bare Python loop over cv2.EMD on prepared arrays, without gradient."""
    import cv2

    cost, supply, demand = (tensor.float().numpy() for tensor in problems(nodes, batch))

    def work() -> None:
        for k in range(batch):
            cv2.EMD(supply[k, :, None], demand[k, :, None], cv2.DIST_USER, cost[k])

    return work


def run_both(case: str, inputs: list[torch.Tensor]) -> None:
    solver, options = CASES[case]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    emd(*leaves, solver=solver, **options).value.sum().backward()


def measure(case: str, nodes: int, batch: int) -> tuple[float, float, float]:
    """Seconds forward, forward and backward, and of the cv2.EMD loop, per problem."""
    solver, options = CASES[case]
    inputs, loop_batch = problems(nodes, batch), batch_size("opencv", nodes)

    def forward() -> None:
        with torch.no_grad():
            emd(*inputs, solver=solver, **options)

    forward_time, both, loop = best_times(forward, lambda: run_both(case, inputs), cv2_loop(nodes, loop_batch))
    return forward_time / batch, both / batch, loop / loop_batch


def sizes(text: str) -> list[int]:
    """``"9,25"`` -> ``[9, 25]``, for argparse."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = [0]
    if not all(1 <= value <= MAX_NODES for value in values):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers from 1 to {MAX_NODES}, separated by commas; got {text!r}"
        )
    return values


def solver_names(text: str) -> list[str]:
    """``"opencv,ipm"`` -> ``["opencv", "ipm"]``, for argparse."""
    names = text.split(",")
    for name in names:
        if name not in SOLVERS:
            raise argparse.ArgumentTypeError(f"expected solvers out of {', '.join(SOLVERS)}; got {name!r}")
    return names


def memory_job(text: str) -> tuple[str, int, int]:
    """``"simplex;25;375"`` -> case, nodes and batch, for argparse."""
    case, nodes, batch = text.split(";")
    if case not in CASES:
        raise ValueError
    return case, sizes(nodes)[0], sizes(batch)[0]


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("-nodes", type=sizes, default="9,25,30,64", help="nodes per side of a problem, comma-separated")
    parser.add_argument("-solvers", type=solver_names, default=",".join(SOLVERS), help="comma-separated")
    parser.add_argument("-memory_of", type=memory_job, help=argparse.SUPPRESS)  # used by memory_in_a_fresh_process
    args = parser.parse_args()
    if args.memory_of:
        print(peak_growth(*args.memory_of))
        return
    most_threads = torch.get_num_threads()

    print("microseconds per problem; memory in MB per problem; speed as a multiple of the cv2.EMD loop on one thread\n")
    print_row("solver", "nodes", "batch", "threads", "forward", "both", "memory", "cv2 loop", "loop / forward")
    print_row(*["---"] * 9)
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for nodes in args.nodes:
        for case, (solver, _) in CASES.items():
            if solver not in args.solvers or solver == "qpth" and nodes > MOST_NODES_OF_QPTH:
                continue
            batch = batch_size(solver, nodes)
            memory = memory_in_a_fresh_process(case, nodes, batch)
            for threads in [1] if solver == "qpth" else sorted({1, most_threads}):
                torch.set_num_threads(threads)
                forward, both, loop = measure(case, nodes, batch)
                figures = f"{forward * 1e6:.1f}", f"{both * 1e6:.1f}", f"{memory:.3f}", f"{loop * 1e6:.1f}"
                print_row(case, nodes, batch, threads, *figures, f"{loop / forward:.2g}x")
            torch.set_num_threads(1)
            if solver in ("ipm", "qpth"):
                found[case, nodes] = both if batch == SMALL_BATCH else measure(case, nodes, SMALL_BATCH)[1], memory
    for form in ("L2", "QP"):
        for nodes in args.nodes:
            ours, theirs = found.get((f"ipm, {form}", nodes)), found.get((f"qpth, {form}", nodes))
            if ours and theirs:
                print(
                    f"\nipm against qpth, form {form}, {nodes} nodes, batch {SMALL_BATCH}, one thread, forward and backward: "
                    f"{theirs[0] / ours[0]:.0f}x faster, {theirs[1] / ours[1]:.0f}x less memory "
                    f"({theirs[1]:.1f} MB against {ours[1]:.2f} MB per problem)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
