"""Time and memory per transportation problem, by solver and size, and the ratios to a plain cv2.EMD loop and to qpth.

    python benchmarks/emd.py                     the whole table (minutes; qpth takes most of them)
    python benchmarks/emd.py -others             simplex and cv2 beside POT and scipy: time, and error of the value

The problems are those of the head on features like an encoder's, see ``features`` in measuring.py. Every time is the best of
several calls, which alternate with those of the cv2.EMD loop on one thread: CPU time on one thread, elapsed time on more.
"forward" is without gradients, "both" is forward and backward, for all inputs that have a gradient; inputs are float32, as
the head has them. Memory is the growth of the peak of a fresh process.
"""

import ctypes
import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import megabytes, print_row, problems

from engine.command_line import make_parser
from Models.emd import SOLVERS, emd, scale_to_mass
from utils import InputError, run_script, whole_numbers

CASES = {
    "opencv": ("opencv", {}),
    "simplex": ("simplex", {}),
    "simplex, cost": ("simplex", {"gradient": "cost"}),
    "ipm, L2": ("ipm", {}),
    "ipm, QP": ("ipm", {"form": "QP"}),
    "qpth, L2": ("qpth", {}),
    "qpth, QP": ("qpth", {"form": "QP"}),
}
MOST_NODES_OF_QPTH = 25


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


def best_times(works: list[Callable[[], object]]) -> list[float]:
    """The least seconds of a call of each, over calls that take turns for a second per work or so."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    while len(times[0]) < 2 or sum(map(sum, times)) < len(works) and len(times[0]) < 100:
        for work, spent in zip(works, times, strict=True):
            start = clock()
            work()
            spent.append(clock() - start)
    return [min(spent) for spent in times]


def cv2_loop(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> list[float]:
    """The values per unit of mass of a bare loop over cv2.EMD, float32."""
    import cv2

    return [cv2.EMD(supply[k, :, None], demand[k, :, None], cv2.DIST_USER, cost[k])[0] for k in range(len(cost))]


def measure(case: str, nodes: int, batch: int) -> tuple[float, float, float]:
    """Seconds forward, forward and backward, and of a bare loop over cv2.EMD on prepared arrays, per problem."""
    inputs = problems(nodes, batch)
    arrays = [part.numpy() for part in problems(nodes, batch_sizes("opencv", nodes)[0])]
    works = [lambda: run(case, inputs, False), lambda: run(case, inputs), lambda: cv2_loop(*arrays)]
    forward, both, plain = best_times(works)
    return forward / batch, both / batch, plain / len(arrays[0])


def compare(nodes: int) -> None:
    """Rows of solvers of other libraries, on one thread: CPU time per problem, and error of the value."""
    try:
        import ot
        import ot.batch
        from scipy.optimize import linprog
        from scipy.sparse import eye, kron, vstack
    except ImportError as error:
        raise InputError(f"-others needs two more packages: pip install POT scipy ({error})") from error

    cost, *weights = (part.double() for part in problems(nodes, 100 if nodes <= 30 else 40))
    shares = [cost, *(scale_to_mass(weight, 1.0) for weight in weights)]
    arrays = [part.numpy() for part in shares]
    singles = [part.float().numpy() for part in shares]
    ones = np.ones((1, nodes))
    sums = vstack([kron(eye(nodes), ones), kron(ones, eye(nodes))]).tocsc()

    def batched(**options) -> np.ndarray:
        plan = ot.batch.solve_batch(cost, a=shares[1], b=shares[2], grad="detach", **options).plan
        return (plan * cost).sum((1, 2)).numpy()

    def scipy_loop(count: int = 10) -> np.ndarray:
        some = zip(*(part[:count] for part in arrays), strict=True)
        return np.array([linprog(c.ravel(), A_eq=sums, b_eq=np.r_[s, d], method="highs").fun for c, s, d in some])

    works = {
        "`emd`, simplex, float64": lambda: emd(*shares, solver="simplex").value.numpy(),
        "`emd`, simplex, float32": lambda: emd(*(part.float() for part in shares), solver="simplex").value.numpy(),
        "`cv2.EMD` in a loop": lambda: cv2_loop(*singles),
        "POT, `ot.emd` in a loop": lambda: np.array([(ot.emd(s, d, c) * c).sum() for c, s, d in zip(*arrays)]),  # noqa: B905
        "POT, `solve_batch` proximal": partial(batched, method="proximal"),
        "POT, `solve_batch` sinkhorn, reg 0.01": partial(batched, method="sinkhorn", reg=0.01),
        "POT, `solve_batch` log_sinkhorn, reg 0.01": partial(batched, method="log_sinkhorn", reg=0.01),
    }
    sharp = {"method": "log_sinkhorn", "reg": 0.002, "max_iter": 10000}
    works["POT, `solve_batch` log_sinkhorn, reg 0.002, max_iter 10000"] = partial(batched, **sharp)
    works["scipy, `linprog` highs in a loop"] = scipy_loop
    exact = next(iter(works.values()))()
    for name, work in works.items():
        value, (seconds,) = work(), best_times([work])
        error = np.abs(np.asarray(value) / exact[: len(value)] - 1)
        print_row(name, nodes, f"{1e6 * seconds / len(value):.4g}", f"{error.mean():.1e}", f"{error.max():.1e}")


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
    nodes = "nodes on each side of a problem, comma-separated"
    parser.add_argument("-nodes", type=whole_numbers, default="9,25,30,64", help=nodes)
    parser.add_argument("-solvers", type=lambda text: text.split(","), default=names, help="solvers to measure")
    parser.add_argument("-others", action="store_true", help="compare with POT and scipy instead")
    args = parser.parse_args()
    for name in set(args.solvers) - SOLVERS.keys():
        parser.error(f"argument -solvers: unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    if args.others:
        torch.set_num_threads(1)
        print_row("on one thread", "nodes", "us per problem", "error of the value: mean", "largest")
        print_row(*["---"] * 5)
        for nodes in args.nodes:
            compare(nodes)
        return
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
    run_script(main)
