"""Time and memory per transportation problem, by solver and size, and the ratios to a plain cv2.EMD loop and to qpth.

    python benchmarks/emd.py                     the whole table (minutes; qpth takes most of them)
    python benchmarks/emd.py -nodes 9,25 -solvers simplex,opencv

The problems are those of the head: cosine costs and cross-reference weights of random features. Every time is the best of
several runs in this process; every memory figure is from a fresh one. "forward" is without gradients, "both" is forward
and backward, for all inputs that the solver has a gradient for. Memory is the growth of the process's peak, per problem.
"""

import argparse
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
BATCH = {"qpth": {9: 8, 25: 8}, "ipm": {9: 375, 25: 375, 64: 75}}
DEFAULT_BATCH = {9: 375, 25: 375, 64: 75}
SMALL_BATCH = 8
MAX_NODES = 1000


def problems(nodes: int, batch: int) -> list[torch.Tensor]:
    """Cost ``(batch, nodes, nodes)`` and both weights ``(batch, nodes)``, float64."""
    random = torch.Generator().manual_seed(nodes)
    query = torch.randn(batch, 1, 64, nodes, generator=random)
    proto = torch.randn(batch, 1, 64, nodes, generator=random) + 0.3 * query
    cost = 1 - cosine_similarity_map(query, proto)[:, 0, 0]
    weights = (cross_reference_weights(*pair)[:, 0, 0] for pair in ((query, proto), (proto, query)))
    return [tensor.double() for tensor in (cost, *(scale_to_mass(weight, nodes) for weight in weights))]


def best_time(work: Callable[[], object], seconds: float = 1.0) -> float:
    """Seconds per call: the best of at least two calls, or of as many as fit."""
    work()
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds and len(times) < 30:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


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
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current use
        before = megabytes("VmRSS")
        run_both(case, inputs)
        return max(0.0, megabytes("VmHWM") - before)
    except OSError:
        return float("nan")


def cv2_loop(nodes: int, batch: int) -> float:
    """Seconds per problem of a bare Python loop over cv2.EMD on prepared arrays, without gradient."""
    import cv2

    cost, supply, demand = (tensor.float().numpy() for tensor in problems(nodes, batch))

    def work() -> None:
        for k in range(batch):
            cv2.EMD(supply[k, :, None], demand[k, :, None], cv2.DIST_USER, cost[k])

    return best_time(work) / batch


def run_both(case: str, inputs: list[torch.Tensor]) -> None:
    solver, options = CASES[case]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    emd(*leaves, solver=solver, **options).value.sum().backward()


def measure(case: str, nodes: int, batch: int) -> tuple[float, float]:
    """Seconds forward, and forward and backward, per problem."""
    solver, options = CASES[case]
    inputs = problems(nodes, batch)

    def forward() -> None:
        with torch.no_grad():
            emd(*inputs, solver=solver, **options)

    return best_time(forward) / batch, best_time(lambda: run_both(case, inputs)) / batch


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("-nodes", type=sizes, default="9,25,64", help="nodes per side of a problem, comma-separated")
    parser.add_argument("-solvers", type=solver_names, default=",".join(SOLVERS), help="comma-separated")
    parser.add_argument("-memory_of", type=memory_job, help=argparse.SUPPRESS)  # used by memory_in_a_fresh_process
    args = parser.parse_args()
    if args.memory_of:
        print(peak_growth(*args.memory_of))
        return
    most_threads = torch.get_num_threads()

    print("microseconds per problem; memory in MB per problem; speed as a multiple of the cv2.EMD loop on one thread\n")
    print("| solver | nodes | batch | threads | forward | both | memory | forward / cv2 loop |")
    print("|---|---|---|---|---|---|---|---|")
    both_times: dict[tuple[str, int], float] = {}
    memories: dict[tuple[str, int], float] = {}
    for nodes in args.nodes:
        torch.set_num_threads(1)
        baseline = cv2_loop(nodes, DEFAULT_BATCH.get(nodes, 75))
        print(f"| cv2.EMD loop | {nodes} | {DEFAULT_BATCH.get(nodes, 75)} | 1 | {baseline * 1e6:.1f} | | | 1.0x |")
        for case, (solver, _) in CASES.items():
            batch = BATCH.get(solver, DEFAULT_BATCH).get(nodes, 0 if solver == "qpth" else 75)
            if solver not in args.solvers or not batch:
                continue
            memory = memories[case, nodes] = memory_in_a_fresh_process(case, nodes, batch)
            for threads in sorted({1, most_threads}) if solver != "qpth" else [1]:
                torch.set_num_threads(threads)
                forward, both = measure(case, nodes, batch)
                print(
                    f"| {case} | {nodes} | {batch} | {threads} | {forward * 1e6:.1f} | {both * 1e6:.1f} | {memory:.3f} "
                    f"| {baseline / forward:.2g}x |",
                    flush=True,
                )
            torch.set_num_threads(1)
            if solver in ("ipm", "qpth"):
                both_times[case, nodes] = both if batch == SMALL_BATCH else measure(case, nodes, SMALL_BATCH)[1]
    for form in ("L2", "QP"):
        for nodes in args.nodes:
            ours, theirs = (f"ipm, {form}", nodes), (f"qpth, {form}", nodes)
            if ours in both_times and theirs in both_times:
                print(
                    f"\nipm against qpth, form {form}, {nodes} nodes, batch {SMALL_BATCH}, one thread, forward and backward: "
                    f"{both_times[theirs] / both_times[ours]:.0f}x faster, {memories[theirs] / memories[ours]:.0f}x less memory "
                    f"({memories[theirs]:.1f} MB against {memories[ours]:.2f} MB per problem)"
                )


if __name__ == "__main__":
    main()
