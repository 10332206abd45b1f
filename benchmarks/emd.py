"""Time and memory per transportation problem, by solver and size, and the ratios to a plain cv2.EMD loop and to qpth.

    python benchmarks/emd.py                     the whole table (minutes; qpth takes most of them)

The problems are those of the head on features like an encoder's, ``relu(common + noise)`` with 640 channels. Every time is
the best of several calls, which alternate with those of the cv2.EMD loop on one thread. "forward" is without gradients,
"both" is forward and backward, for all inputs that have a gradient. Memory is the growth of the peak of a fresh process.
"""

import ctypes
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from timeit import timeit

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import megabytes, print_row

from Models.emd import SOLVERS, emd, scale_to_mass
from Models.matching import cosine_similarity_map, cross_reference_weights
from utils import make_parser, whole_numbers

CASES = {
    "opencv": ("opencv", {}),
    "simplex": ("simplex", {}),
    "simplex, cost": ("simplex", {"gradient": "cost"}),
    "ipm, L2": ("ipm", {}),
    "ipm, QP": ("ipm", {"form": "QP"}),
    "qpth, L2": ("qpth", {}),
    "qpth, QP": ("qpth", {"form": "QP"}),
}
MOST_NODES_OF_QPTH, CHANNELS = 25, 640


def problems(nodes: int, batch: int) -> list[torch.Tensor]:
    """Cost ``(batch, nodes, nodes)`` and both weights ``(batch, nodes)``, float64."""
    random = torch.Generator().manual_seed(nodes)
    common = torch.randn(CHANNELS, 1, generator=random)
    query, proto = (torch.relu(common + torch.randn(batch, 1, CHANNELS, nodes, generator=random)) for _ in range(2))
    cost = 1 - cosine_similarity_map(query, proto)[:, 0, 0]
    weights = (cross_reference_weights(*pair)[:, 0, 0] for pair in ((query, proto), (proto, query)))
    return [tensor.double() for tensor in (cost, *(scale_to_mass(weight, nodes) for weight in weights))]


def batch_sizes(solver: str, nodes: int) -> list[int]:
    """That of an episode of 75 queries and 5 ways, or fewer large problems; 8 of qpth, which is dense in (N*M)^2."""
    many = 375 if nodes <= 30 else 75
    return {"qpth": [8], "ipm": [8, many]}.get(solver, [many])


def run(case: str, inputs: list[torch.Tensor], gradients: bool = True) -> None:
    solver, options = CASES[case]
    leaves = [tensor.detach().requires_grad_(gradients) for tensor in inputs]
    value = emd(*leaves, solver=solver, **options).value
    if gradients:
        value.sum().backward()


def measure(case: str, nodes: int, batch: int) -> tuple[float, float, float]:
    """Seconds forward, forward and backward, and of a bare loop over cv2.EMD on prepared arrays, per problem."""
    import cv2

    inputs = problems(nodes, batch)
    cost, supply, demand = (x.float().numpy() for x in problems(nodes, batch_sizes("opencv", nodes)[0]))

    def loop() -> None:
        for k in range(len(cost)):
            cv2.EMD(supply[k, :, None], demand[k, :, None], cv2.DIST_USER, cost[k])

    works = (lambda: run(case, inputs, False), lambda: run(case, inputs), loop)
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    while len(times[0]) < 2 or sum(map(sum, times)) < len(works) and len(times[0]) < 30:
        for work, spent in zip(works, times, strict=True):
            spent.append(timeit(work, number=1))
    forward, both, plain = map(min, times)
    return forward / batch, both / batch, plain / len(cost)


def peak_growth(case: str, nodes: int, batch: int) -> float:
    """Megabytes per problem by which forward and backward raise the peak of a fresh process (Linux; nan elsewhere)."""
    torch.set_num_threads(1)
    run(case, problems(nodes, 1))  # whatever is loaded and compiled once
    inputs = problems(nodes, batch)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what the problems took while they were made
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current use
    except (OSError, AttributeError, TypeError):
        return float("nan")
    before = megabytes("VmRSS")
    run(case, inputs)
    return max(0.0, megabytes("VmHWM") - before) / batch


def main() -> None:
    parser, names = make_parser(__doc__.splitlines()[0]), ",".join(SOLVERS)
    nodes = "per side of a problem, comma-separated"
    parser.add_argument("-nodes", type=whole_numbers, default="9,25,30,64", help=nodes)
    parser.add_argument("-solvers", type=lambda text: text.split(","), default=names, help="comma-separated")
    args = parser.parse_args()
    for name in set(args.solvers) - SOLVERS.keys():
        parser.error(f"argument -solvers: expected solvers out of {', '.join(SOLVERS)}; got {name!r}")
    most_threads = torch.get_num_threads()
    print("microseconds per problem; memory in MB per problem; speed as a multiple of the cv2.EMD loop on one thread\n")
    print_row("solver", "nodes", "batch", "threads", "forward", "both", "memory", "cv2 loop", "loop / forward")
    print_row(*["---"] * 9)
    for nodes, case in itertools.product(args.nodes, CASES):
        solver = CASES[case][0]
        if solver not in args.solvers or solver == "qpth" and nodes > MOST_NODES_OF_QPTH:
            continue
        for batch in batch_sizes(solver, nodes):
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                memory = fresh.submit(peak_growth, case, nodes, batch).result()
            for threads in [1] if solver == "qpth" else sorted({1, most_threads}):
                torch.set_num_threads(threads)
                forward, both, loop = measure(case, nodes, batch)
                figures = f"{forward * 1e6:.1f}", f"{both * 1e6:.1f}", f"{memory:.3f}", f"{loop * 1e6:.1f}"
                print_row(case, nodes, batch, threads, *figures, f"{loop / forward:.2g}x")


if __name__ == "__main__":
    main()
