"""The paper's table of heads: accuracies on the same features and the same episodes, and paired differences.

    python benchmarks/heads.py -dataset fc100 -image_size 32 -model_dir checkpoint/pre_train/fc100/... -solver simplex
    python benchmarks/heads.py -heads deepemd,proto -shots 5 -episodes 200 -kshots sfc,mean -json heads.json ...

Takes the flags of eval.py, and its accuracies are those that eval.py finds with the same flags. For each number of shots,
every image is encoded once for all heads. The table says how a row differs from deepemd (with the first of -kshots) on
the same episodes, with the 95 % interval of that difference. Everything but the seconds is the same from run to run.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from dataloader import episode_labels
from dataloader.arguments import add_data_arguments, add_episode_arguments, draw_episodes, open_dataset
from engine.arguments import (
    add_evaluation_arguments,
    add_rank_arguments,
    add_run_arguments,
    make_evaluator,
    solver_threads,
)
from engine.distributed import Ranks
from engine.run import environment, fingerprint
from engine.start import choose_device, choose_seed, set_seed
from Models import DeepEMD
from Models.arguments import add_model_arguments, build_model
from Models.emd import set_threads
from Models.heads import HEADS
from Models.sfc import KSHOT, FitError
from Models.weights import load_encoder_weights
from utils import (
    InputError,
    check_writable,
    make_parser,
    mean_confidence_interval,
    run_script,
    status,
    whole_numbers,
    write_json,
)

Row = tuple[str, str | None]  # head, and kshot where there is more than one shot


class Comparison:
    """Several models on one encoder: for an evaluator one model, which notes how each of them does.

    Attributes:
        accuracies: of each episode, in percent, by row.
        seconds: spent on matching, prototypes included, by row.
        failed: why there is nothing of a row: its prototypes diverged.
    """

    device_ids = ()

    def __init__(self, models: dict[Row, DeepEMD]) -> None:
        self.models, self.encoder = models, next(iter(models.values()))
        self.accuracies: dict[Row, list[float]] = {row: [] for row in models}
        self.seconds = dict.fromkeys(models, 0.0)
        self.failed: dict[Row, str] = {}

    def folded(self) -> "Comparison":
        self.encoder = self.encoder.folded()
        return self

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images)

    def match(
        self,
        support: Tensor,
        query: Tensor,
        *,
        way: int,
        shot: int,
        generator: Sequence[torch.Generator],
        **settings: Any,
    ) -> Tensor:
        """The logits of the first model that has not failed."""
        first = None
        labels = episode_labels(way, query.shape[1] // way).to(query.device)
        for row, model in self.models.items():
            if row in self.failed:
                continue
            if not self.accuracies[row]:  # what is compiled or allocated at the first call is not timed
                model.match(support[:1, :way], query[:1], way=way, shot=1, **settings)
            own = [torch.Generator().set_state(draws.get_state()) for draws in generator]  # each model draws the same
            start = _now(query.device)
            try:
                logits = model.match(support, query, way=way, shot=shot, generator=own, **settings)
            except FitError as error:
                self.failed[row] = str(error)
                status(f"{', '.join(filter(None, row))}: {error}")
                if len(self.failed) == len(self.models):
                    raise
                continue
            self.seconds[row] += _now(query.device) - start
            hits = (logits.argmax(2) == labels).double().mean(1)
            self.accuracies[row] += (100 * hits).tolist()
            first = logits if first is None else first
        return first


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def names_of(known: dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: keys of ``known`` joined by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)} joined by commas; got {name!r}")
        return names

    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("comparison")
    group.add_argument("-heads", type=names_of(HEADS), default=",".join(HEADS), help="heads to compare")
    group.add_argument("-shots", type=whole_numbers, default="1,5", help="support images per class")
    group.add_argument("-kshots", type=names_of(KSHOT), default=",".join(KSHOT), help="prototypes, for shots above 1")
    group.add_argument(
        "-episodes", type=whole_numbers, default="600,200", help="episodes for each of -shots, or one number for all"
    )
    group.add_argument("-set", choices=("train", "val", "test"), default="test", help="split to draw from")
    group.add_argument(
        "-model_dir",
        required=True,
        help='checkpoint, or its folder, or "none" for random weights, the same for all heads',
    )
    group.add_argument("-json", metavar="FILE", help='write the results there too; "-" prints them and nothing else')
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_evaluation_arguments(parser)
    add_rank_arguments(parser)
    add_run_arguments(parser)
    return parser


def compare(args: argparse.Namespace, device: torch.device, shot: int, count: int) -> list[dict[str, Any]]:
    """One row for each head and, above one shot, each way to prototypes."""
    args = argparse.Namespace(**{**vars(args), "shot": shot})
    models: dict[Row, DeepEMD] = {}
    for head in args.heads:
        for kshot in args.kshots if shot > 1 else (None,):
            set_seed(args.seed, deterministic=args.deterministic)  # random weights do not depend on what is compared
            settings = {**vars(args), "head": head, "kshot": kshot or args.kshot}
            models[head, kshot] = build_model(argparse.Namespace(**settings)).to(device)
            first = next(iter(models.values()))
            if len(models) == 1 and args.model_dir != "none":
                load_encoder_weights(first, args.model_dir, hint="Name yours with -model_dir")
            models[head, kshot].encoder = first.encoder
    dataset = open_dataset(args, args.set, train=False)
    episodes = draw_episodes(args, dataset, count, seed=args.seed, name=args.set)
    comparison = Comparison(models)
    make_evaluator(args, dataset, device=device)(comparison, episodes, title=f"{shot}-shot")

    of_reference = "deepemd", args.kshots[0] if shot > 1 else None
    reference = None if of_reference in comparison.failed else comparison.accuracies.get(of_reference)
    rows = []
    for (head, kshot), accuracies in comparison.accuracies.items():
        if (head, kshot) in comparison.failed:
            failed = comparison.failed[head, kshot]
            rows.append({"head": head, "shot": shot, "kshot": kshot, "episodes": count, "failed": failed})
            continue
        accuracy, interval = mean_confidence_interval(accuracies)
        row = {
            "head": head,
            "shot": shot,
            "kshot": kshot,
            "episodes": count,
            "accuracy": accuracy,
            "interval": interval,
        }
        if reference is not None:
            pairs = zip(accuracies, reference, strict=True)
            row["difference"], row["difference_interval"] = mean_confidence_interval([own - its for own, its in pairs])
        row["seconds"] = comparison.seconds[head, kshot] / count
        rows.append({**row, "accuracies": accuracies})
    return rows


def markdown(args: argparse.Namespace, rows: list[dict[str, Any]], device: torch.device) -> str:
    """The table, under a line that says what it is of."""
    lines = [
        f"{args.dataset} {args.set}, {args.deepemd}, {args.image_size} pixels, {args.way}-way, {args.query} queries per "
        f"class, weights {args.model_dir}, seed {args.seed}. Accuracies in percent with 95 % intervals; differences from "
        f"deepemd (above one shot: deepemd, {args.kshots[0]}) on the same episodes. Seconds per episode of the head alone, "
        f"prototypes included, on {device.type}: every image was encoded once for all heads, which is not counted.",
        "",
        "| shot | head | prototypes | episodes | accuracy | difference | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['shot']} | {row['head']} | {row['kshot']} | {row['episodes']} | diverged | | |")
            continue
        difference = (
            f"{round(row['difference'], 2) + 0.0:+.2f} +- {row['difference_interval']:.2f}"
            if "difference" in row
            else ""
        )
        lines.append(
            f"| {row['shot']} | {row['head']} | {row['kshot'] or ''} | {row['episodes']} "
            f"| {row['accuracy']:.2f} +- {row['interval']:.2f} | {difference} | {row['seconds']:.4f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    for flag, instead in (("shot", "shots"), ("head", "heads"), ("kshot", "kshots")):
        if getattr(args, flag) != parser.get_default(flag):
            raise InputError(f"-{flag} goes with eval.py; here, -{instead} says which to compare")
    if len(args.episodes) not in (1, len(args.shots)):
        raise InputError(f"-episodes: expected one number, or one for each of {len(args.shots)} -shots")
    counts = args.episodes * len(args.shots) if len(args.episodes) == 1 else args.episodes
    if args.json not in (None, "-"):
        check_writable(Path(args.json))
    device, _ = choose_device(args.gpu)
    set_threads(solver_threads(args, Ranks()))
    args.seed = choose_seed(args.seed)

    rows = []
    for shot, count in zip(args.shots, counts, strict=True):
        rows += compare(args, device, shot, count)
    found = {"rows": rows, "flags": vars(args), "versions": environment(), "weights": fingerprint(args.model_dir)}
    if args.json not in (None, "-"):
        write_json(Path(args.json), found)
    print(json.dumps(found) if args.json == "-" else markdown(args, rows, device))


if __name__ == "__main__":
    run_script(main)
