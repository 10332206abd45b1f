"""What a GPU is worth here: the solver, the encoder, the parts of an episode, and the fit of prototypes. See benchmarks/gpu.sh.

    python benchmarks/gpu.py PART -out FOLDER     adds the rows of a part to FOLDER/PART.jsonl, but for those in it
    python benchmarks/gpu.py table -out FOLDER    all measurements as Markdown

A case that fails becomes a row with its error, and is tried again by the next call. ``-gpu cpu -quick`` tries the code without
a GPU.
"""

import json
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import chain, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import features, make_images, problems

from dataloader import EpisodeSampler, ImageDataset, SeededEpisodes, episode_labels, make_view
from engine.command_line import make_parser
from engine.evaluation import Evaluator
from engine.start import choose_device
from Models import DeepEMD, sfc
from Models.emd import emd, settle
from utils import InputError, append_line, available_cores, first_few, run_script, write_atomically

WAY, QUERY = 5, 15
Row = dict[str, Any]
Cases = Iterator[tuple[Row, Callable[[], Row]]]  # what tells a case from the others of its part, and how it is measured


def seconds(work: Callable[[], object], args: Namespace) -> float:
    """The mean time of calls between two synchronisations: as many as half a second holds, after one that warms up."""

    def run(calls: int) -> float:
        synchronize(args.device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(args.device)
        return (time.perf_counter() - start) / calls

    run(1)
    once = run(1)
    calls = 1 if args.quick else min(1000, int(0.5 / once))
    return run(calls) if calls > 1 else once


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def solver_cases(args: Namespace) -> Cases:
    """Microseconds a problem by nodes and batch, on the device and on the CPU."""
    cpu = torch.device("cpu")
    few = cache(partial(problems, batch=20 if args.quick else 500))  # of which larger batches have copies

    def measure(solver: str, place: torch.device, nodes: int, batch: int) -> Row:
        given = [part[torch.arange(batch) % len(part)].to(place) for part in few(nodes)]
        return {"us each": 1e6 * seconds(partial(emd, *given, solver=solver), args) / batch}

    for nodes in (9, 25, 64):
        for batch in (20,) if args.quick else (100, 3000, 30_000 // (1 + nodes // 32)):
            for solver, place in dict.fromkeys([("simplex", args.device), ("simplex", cpu), ("opencv", cpu)]):
                if place != cpu or batch <= 3000:
                    case = {"nodes": nodes, "problems": batch, "solver": f"{solver} ({place.type})"}
                    yield case, partial(measure, solver, place, nodes, batch)


def encoder_cases(args: Namespace) -> Cases:
    """ResNet-12 images a second at 84 pixels, and the peak memory. With -amp and in evaluation, channels are always last."""

    def measure(phase: str, amp: str, layout: str, compiled: bool, batch: int) -> Row:
        training, on_gpu = phase == "training", args.device.type == "cuda"
        model = DeepEMD(amp=amp, compiled=compiled).to(args.device, memory_format=getattr(torch, layout))
        network = model.encoder.train() if training else model.folded().encoder
        images = torch.randint(256, (batch, 3, 84, 84), dtype=torch.uint8, device=args.device)

        def work() -> None:
            with torch.set_grad_enabled(training):
                maps = network(images)
            if training:
                maps.mean().backward()

        if on_gpu:
            torch.cuda.reset_peak_memory_stats(args.device)
        rate = batch / seconds(work, args)
        return {"images/s": rate} | ({"GiB": torch.cuda.max_memory_allocated(args.device) / 2**30} if on_gpu else {})

    kinds = [("training", "off", "contiguous_format")]
    kinds += [(*kind, "channels_last") for kind in product(("training", "evaluation"), ("off", "bfloat16"))]
    for compiled, kind in product((False,) if args.quick else (False, True), kinds):
        batch = 2 if args.quick else 128 if kind[0] == "training" else 256
        case = dict(zip(("phase", "amp", "layout", "compile", "batch"), (*kind, compiled, batch), strict=True))
        yield case, partial(measure, *case.values())


def episode_cases(args: Namespace) -> Cases:
    """Milliseconds of a 1-shot episode at 84 pixels in evaluation, and of a training step, with those of its parts."""
    query, edge, count = (1, 32, 4) if args.quick else (QUERY, 84, 200)
    workers = 0 if args.quick else min(8, available_cores())

    def shares(work: Callable[[], object], episodes: int, rest: str) -> Row:
        spent: Counter[str] = Counter()

        def timed(name: str, real: Callable) -> Callable:
            def call(*values: Any, **settings: Any) -> Any:
                synchronize(args.device)
                start = time.perf_counter()
                result = real(*values, **settings)
                synchronize(args.device)
                spent[name] += 1e3 * (time.perf_counter() - start) / episodes
                return result

            return call

        work()  # compiles, allocates, and starts the processes that load images
        parts = {"encode": "encoding", "match": "matching"}
        with patch.multiple(DeepEMD, **{name: timed(part, getattr(DeepEMD, name)) for name, part in parts.items()}):
            timed("ms", work)()
        total = spent.pop("ms")
        return {"ms": total, **spent, rest: total - spent.total()}

    def evaluate(solver: str) -> Row:
        model = DeepEMD(solver=solver).to(args.device)
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder))
            view = make_view("fcn", train=False, image_size=edge)
            data = ImageDataset("folder", "test", data_dir=folder, view=view)
            episodes = SeededEpisodes(EpisodeSampler(data.labels, count, WAY, 1 + query), seed=1, name="test")
            evaluator = Evaluator(data, way=WAY, shot=1, device=args.device, seed=1, num_workers=workers)
            return shares(partial(evaluator, model, episodes), count, "loading")

    def train(solver: str) -> Row:
        model = DeepEMD(solver=solver).to(args.device).train()
        images = torch.randint(256, (WAY * (1 + query), 3, edge, edge), dtype=torch.uint8, device=args.device)
        labels, steps = episode_labels(WAY, query).to(args.device), 1 if args.quick else 10

        def work() -> None:
            for _ in range(steps):
                F.cross_entropy(model(images, way=WAY, shot=1), labels).backward()

        return shares(work, steps, "gradient")

    for (what, measure), solver in product(
        (("evaluation", evaluate), ("training step", train)), ("opencv", "simplex", "ipm")
    ):
        yield {"what": what, "solver": solver}, partial(measure, solver)


def fit_cases(args: Namespace) -> Cases:
    """Milliseconds of a step of the prototype fit, 5-way 5-shot with 25 nodes: as a graph, step by step, and by opencv."""
    steps = 2 if args.quick else 100

    def measure(episodes: int, solver: str, how: str) -> Row:
        support = features(episodes * 5 * WAY, 25).unflatten(0, (episodes, 5 * WAY)).to(args.device)
        settings = {"way": WAY, "shot": 5, "lr": 100.0, "steps": steps, "batch_size": 4, "solver": solver}
        with patch.object(sfc, "GraphedStep", sfc.GraphedStep if how == "graph" else lambda step: step):
            mean = seconds(partial(sfc.fit_prototypes, support, **settings), args)
        return {"ms a step": 1e3 * mean / (7 * steps)}  # 25 images in batches of 4

    ways = ("simplex", "graph"), ("simplex", "step by step"), ("opencv", "step by step")
    for episodes, (solver, how) in product((1, 8), ways):
        yield {"episodes": episodes, "solver": solver, "how": how}, partial(measure, episodes, solver, how)


PARTS = {"solver": solver_cases, "encoder": encoder_cases, "episodes": episode_cases, "fit": fit_cases}


def measure_part(args: Namespace) -> None:
    """Measure what the file of a part lacks. InputError if a case failed."""
    path = args.out / f"{args.part}.jsonl"
    start = {"device": args.device_name, "torch": torch.__version__, "quick": args.quick}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if "error" not in row] if rows[:1] == [start] else [start]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    failed = []
    for case, measure in PARTS[args.part](args):
        if any(case.items() <= row.items() for row in rows):
            continue
        try:
            found = measure()
            settle()
        except Exception as error:  # whatever a compiler or a driver raises; the other cases can be measured
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
            failed.append(" ".join(map(str, case.values())))
        row = json.dumps(case | found)
        append_line(path, row)
        print(row, flush=True)
    if failed:
        raise InputError(f"of part {args.part}, {len(failed)} failed: {first_few(failed)}. Their errors are in {path}")


def table(folder: Path) -> str:
    """The rows of all parts as Markdown."""
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        start, *rows = map(json.loads, path.read_text().splitlines())
        columns = dict.fromkeys(chain.from_iterable(rows))
        lines += [f"\n**{path.stem}** ({start['device']}, torch {start['torch']})\n"]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parts = "what to measure; device prints which GPU is used, table the measurements as Markdown"
    parser.add_argument("part", choices=[*PARTS, "device", "table"], help=parts)
    out = "folder of the measurements"
    parser.add_argument("-out", type=Path, metavar="DIR", default=Path("checkpoint/gpu"), help=out)
    parser.add_argument("-gpu", help='the GPU to use, or "cpu" (default: the first GPU)')
    parser.add_argument("-quick", action="store_true", help="one small call of everything")
    args = parser.parse_args(argv)
    if args.part == "table":
        print(table(args.out))
        return
    if args.gpu is None and not torch.cuda.is_available():
        found = f"PyTorch {torch.__version__} finds no CUDA device, and this measures one"
        raise InputError(f"{found}. See nvidia-smi, or try the code with -gpu cpu -quick")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    warnings.filterwarnings("error", category=RuntimeWarning, module="Models")  # the CPU has taken over
    args.device, _ = choose_device(args.gpu)
    args.device_name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    if args.part != "device":
        measure_part(args)


if __name__ == "__main__":
    run_script(main)
