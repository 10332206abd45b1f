"""What a GPU is worth here: the solver, the encoder, an episode's parts, and the fit of prototypes. See benchmarks/gpu.sh.

    python benchmarks/gpu.py PART -out FOLDER     a part writes FOLDER/PART.jsonl, and is not repeated if that exists
    python benchmarks/gpu.py table -out FOLDER    all measurements as Markdown

Times are the mean of calls between two synchronisations. ``-gpu cpu -quick`` tries the code without a GPU.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import features, problems

from engine.command_line import make_parser
from engine.start import choose_device
from Models import DeepEMD, sfc
from Models.emd import EmdError, emd
from utils import run_script, write_atomically

WAY, QUERY = 5, 15
Rows = Iterator[dict[str, Any]]


def seconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    """The mean time of a call, after two that warm up."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        work()
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return (time.perf_counter() - start) / calls


def measure_solver(args: Namespace, device: torch.device) -> Rows:
    """Problems a second by nodes and batch, on the device and on the CPU."""
    cpu = torch.device("cpu")
    for nodes in (9, 25, 64):
        for batch in (20,) if args.quick else (100, 3000, 30_000 // (1 + nodes // 32)):
            given = problems(nodes, batch)
            for solver, place in (("simplex", device), ("simplex", cpu), ("opencv", cpu)):
                if place == cpu and batch > 3000:
                    continue
                work = partial(emd, *(part.to(place) for part in given), solver=solver)
                each = 1e6 * seconds(work, place, 1 if args.quick else 10) / batch
                yield {"nodes": nodes, "problems": batch, "solver": f"{solver} ({place.type})", "us each": each}


def measure_encoder(args: Namespace, device: torch.device) -> Rows:
    """ResNet-12 images a second at 84 pixels, and the peak memory."""
    compilations = (False,) if args.quick else (False, True)
    for amp, compiled, phase in product(("off", "bfloat16"), compilations, ("training", "evaluation")):
        training = phase == "training"
        batch = 2 if args.quick else 128 if training else 256
        model = DeepEMD(amp=amp, compiled=compiled).to(device)
        network = model.encoder.train() if training else model.folded().encoder
        images = torch.randint(256, (batch, 3, 84, 84), dtype=torch.uint8, device=device)

        def work(network=network, images=images, training=training):
            with torch.set_grad_enabled(training):
                maps = network(images)
            if training:
                maps.mean().backward()

        rate = batch / seconds(work, device, 1 if args.quick else 20)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        yield {"amp": amp, "compile": compiled, "phase": phase, "batch": batch, "images/s": rate, "GiB": memory}


def measure_episodes(args: Namespace, device: torch.device) -> Rows:
    """Milliseconds of the parts of a 1-shot episode: encoding, matching, and a training step with its gradient."""
    query, edge, calls = (1, 32, 1) if args.quick else (QUERY, 84, 10)
    images = torch.randint(256, (WAY * (1 + query), 3, edge, edge), dtype=torch.uint8, device=device)
    labels = torch.arange(WAY * query, device=device) % WAY
    for solver in ("opencv", "simplex", "ipm"):
        model = DeepEMD(solver=solver).to(device).train()
        folded = model.folded()
        with torch.no_grad():
            nodes = folded.encode(images)
            parts = {
                "encoding": partial(folded.encode, images),
                "matching": partial(folded.match, nodes[:WAY], nodes[WAY:], way=WAY, shot=1),
            }
            found = {name: 1e3 * seconds(work, device, calls) for name, work in parts.items()}

        def step(model=model):
            torch.nn.functional.cross_entropy(model(images, way=WAY, shot=1), labels).backward()

        yield {"solver": solver, **found, "training step": 1e3 * seconds(step, device, calls)}


def measure_fit(args: Namespace, device: torch.device) -> Rows:
    """Milliseconds of a step of the prototype fit, 5-way 5-shot with 25 nodes: as a graph, step by step, and by opencv."""
    steps, graphed = 2 if args.quick else 20, sfc.GraphedStep
    for episodes in (1, 8):
        support = features(episodes * 5 * WAY, 25).unflatten(0, (episodes, 5 * WAY)).to(device)
        for how, solver in (("graph", "simplex"), ("step by step", "simplex"), ("step by step", "opencv")):
            sfc.GraphedStep = graphed if how == "graph" else lambda step: step
            settings = {"way": WAY, "shot": 5, "lr": 100.0, "steps": steps, "batch_size": 4, "solver": solver}
            mean = seconds(partial(sfc.fit_prototypes, support, **settings), device, 1)
            yield {"episodes": episodes, "solver": solver, "how": how, "ms a step": 1e3 * mean / (7 * steps)}
    sfc.GraphedStep = graphed


PARTS = {"solver": measure_solver, "encoder": measure_encoder, "episodes": measure_episodes, "fit": measure_fit}


def table(folder: Path) -> str:
    """The measurements of all parts as Markdown."""
    lines = []
    for file in sorted(folder.glob("*.jsonl")):
        first, *rows = map(json.loads, file.read_text().splitlines())
        lines += [f"\n**{file.stem}** ({first['device']}, torch {first['torch']})\n"]
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        for row in rows:
            cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "table"], help="what to measure; table prints what was measured")
    parser.add_argument("-out", type=Path, default=Path("checkpoint/gpu"), help="folder of the measurements")
    parser.add_argument("-gpu", help='the GPU to use, or "cpu" (default: the first GPU)')
    parser.add_argument("-quick", action="store_true", help="one small call of everything")
    args = parser.parse_args()
    if args.part == "table":
        print(table(args.out))
        return
    path = args.out / f"{args.part}.jsonl"
    if path.exists():
        print(f"{path}: measured before")
        return
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    device, _ = choose_device(args.gpu)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = [{"device": name, "torch": torch.__version__, "part": args.part}]
    try:
        for row in PARTS[args.part](args, device):
            rows.append(row)
            print(json.dumps(row), flush=True)
    except EmdError as error:
        print(f"{args.part} is not complete: {error}", file=sys.stderr)
        raise
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    run_script(main)
