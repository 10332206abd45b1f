"""The paper's table of heads: accuracies on the same features and the same episodes, and paired differences.

    python benchmarks/heads.py -dataset fc100 -image_size 32 -model_dir checkpoint/pre_train/fc100/... -solver simplex
    python benchmarks/heads.py -heads deepemd,knn:k=3 -shots 5 -episodes 200 -kshots sfc,mean -json heads.json ...

Takes the flags of eval.py and finds its accuracies, but encodes every image once for all heads. Each row also has its
difference from deepemd (with the first of -kshots) on the same episodes, with the 95 % interval of that difference.
Everything but the seconds is the same from run to run.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from dataloader import arguments as data
from dataloader import episode_labels
from engine import arguments
from engine.run import environment, fingerprint
from engine.start import set_seed, start
from engine.weights_flags import adopt_trained_flags
from Models import DeepEMD
from Models.arguments import add_model_arguments, add_weights_arguments, build_model, head_choice, open_model
from Models.choices import check_choice
from Models.heads import HEADS
from Models.sfc import KSHOT, FitError

Name = tuple[str, str | None]  # of a row: the head, and kshot if there is more than one shot


class Comparison:
    """Several models with one encoder, as one :class:`engine.evaluation.Model`; records how each of them does, by row."""

    device_ids = ()

    def __init__(self, models: dict[Name, DeepEMD]) -> None:
        self.models, self.encoder = dict(models), next(iter(models.values()))
        self.accuracies: dict[Name, list[float]] = {name: [] for name in models}  # of each episode, in percent
        self.seconds = dict.fromkeys(models, 0.0)  # spent on matching, prototypes included
        self.failed: dict[Name, str] = {}  # whose prototypes diverged

    def folded(self) -> "Comparison":
        self.encoder = self.encoder.folded()
        return self

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images)

    def settle(self) -> None:
        self.encoder.settle()

    def match(self, support: Tensor, query: Tensor, *, way: int, generator: Sequence, **settings: Any) -> Tensor:
        """The logits of the first model that has not failed."""
        first, labels = None, episode_labels(way, query.shape[1] // way).to(query.device)
        for name, model in list(self.models.items()):
            if not self.accuracies[name]:  # what is compiled or allocated at the first call is not timed
                model.match(support[:1, :way], query[:1], way=way, **{**settings, "shot": 1})
            draws = [torch.Generator().set_state(draw.get_state()) for draw in generator]  # the same for each model
            start = _now(query.device)
            try:
                logits = model.match(support, query, way=way, generator=draws, **settings)
            except FitError as error:
                self.failed[name] = str(error)
                utils.status(f"{', '.join(filter(None, name))}: {error}")
                del self.models[name]
                if not self.models:
                    raise
                continue
            self.seconds[name] += _now(query.device) - start
            self.accuracies[name] += (100 * (logits.argmax(2) == labels).double().mean(1)).tolist()
            first = logits if first is None else first
        return first


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def names(check: Callable[[str], Any], text: str) -> tuple[str, ...]:
    """An argparse type: names that ``check`` accepts, joined by commas; each may have options, as in ``proto,knn:k=3``."""
    found = tuple(dict.fromkeys(re.split(r",(?!\w+=)", text)))
    try:
        for name in found:
            check(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("comparison")
    heads, kshots = partial(names, head_choice), partial(names, partial(check_choice, "kshot", known=KSHOT))
    group.add_argument("-heads", type=heads, default=",".join(HEADS), help="heads to compare")
    group.add_argument("-shots", type=utils.whole_numbers, default="1,5", help="support images per class")
    group.add_argument("-kshots", type=kshots, default=",".join(KSHOT), help="prototypes, for shots above 1")
    counts = "episodes for each of -shots, or one number for all"
    group.add_argument("-episodes", type=utils.whole_numbers, default="600,200", help=counts)
    arguments.add_set_argument(group)
    arguments.add_json_argument(group)
    data.add_data_arguments(parser)
    data.add_episode_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_weights_arguments(parser)
    arguments.add_evaluation_arguments(parser)
    arguments.add_run_arguments(parser, has_folder=False)
    return parser


def compare(args: argparse.Namespace, device: torch.device, shot: int, count: int) -> list[dict[str, Any]]:
    """One row for each head and, above one shot, each way to prototypes."""
    args.shot, args.head = shot, args.heads[0]
    models: dict[Name, DeepEMD] = {}
    set_seed(args.seed, deterministic=args.deterministic)  # random weights do not depend on what is compared
    shared, args.source = open_model(args, device=device, device_ids=(), **data.pixel_statistics(args))
    for head, kshot in product(args.heads, args.kshots if shot > 1 else (None,)):
        flags = {**vars(args), "head": head, "kshot": kshot or args.kshot}
        models[head, kshot] = build_model(argparse.Namespace(**flags), encoder=shared.encoder)
    dataset = data.open_dataset(args, args.set, train=False)
    episodes = data.draw_episodes(args, dataset, count, seed=args.seed, name=args.set)
    comparison = Comparison(models)
    arguments.make_evaluator(args, dataset, device=device)(comparison, episodes, title=f"{shot}-shot")
    baseline = "deepemd", args.kshots[0] if shot > 1 else None
    reference = None if baseline in comparison.failed else comparison.accuracies.get(baseline)
    rows = []
    for name, accuracies in comparison.accuracies.items():
        row = {"head": name[0], "shot": shot, "kshot": name[1], "episodes": count}
        if name in comparison.failed:
            rows.append({**row, "failed": comparison.failed[name]})
            continue
        row["accuracy"], row["interval"] = utils.mean_confidence_interval(accuracies)
        if reference is not None:
            differences = [value - other for value, other in zip(accuracies, reference, strict=True)]
            row["difference"], row["difference_interval"] = utils.mean_confidence_interval(differences)
        rows.append({**row, "seconds": comparison.seconds[name] / count, "accuracies": accuracies})
    return rows


def heading(args: argparse.Namespace, device: torch.device) -> str:
    """What the table is of, and its head."""
    return (
        f"{args.dataset} {args.set}, {args.deepemd}, {args.image_size} pixels, {args.way}-way, {args.query} queries per "
        f"class, weights {args.source}, seed {args.seed}. Accuracies in percent with 95 % intervals; differences from "
        f"deepemd (above one shot: deepemd, {args.kshots[0]}) on the same episodes. Seconds per episode of the head alone, "
        f"prototypes included, on {device.type}.\n\n"
        "| shot | head | prototypes | episodes | accuracy | difference | seconds |\n|---|---|---|---|---|---|---|"
    )


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start, difference = f"| {row['shot']} | {row['head']} | {row['kshot'] or ''} | {row['episodes']} ", ""
    if "failed" in row:
        return start + "| diverged | | |"
    if "difference" in row:
        difference = f"{round(row['difference'], 2) + 0.0:+.2f} +- {row['difference_interval']:.2f}"
    return start + f"| {row['accuracy']:.2f} +- {row['interval']:.2f} | {difference} | {row['seconds']:.4f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    for flag in ("shot", "head", "kshot"):
        if getattr(args, flag) != parser.get_default(flag):
            raise utils.InputError(
                f"-{flag} is a flag of eval.py. Set -{flag}s, which takes all that are to be compared"
            )
    adopt_trained_flags(parser, args, argv, ignore=("head", "kshot"))
    if len(args.episodes) not in (1, len(args.shots)):
        raise utils.InputError(f"-episodes takes one number, or one for each of the {len(args.shots)} -shots")
    counts = args.episodes * len(args.shots) if len(args.episodes) == 1 else args.episodes
    if args.json not in (None, "-"):
        utils.check_writable(Path(args.json))
    _, device, _ = start(args, one_process=True)
    rows = []
    for shot, count in zip(args.shots, counts, strict=True):
        found = compare(args, device, shot, count)
        if args.json != "-":
            print("\n".join([*([] if rows else [heading(args, device)]), *map(line, found)]), flush=True)
        rows += found
    result = {"rows": rows, "flags": vars(args), "versions": environment(), "weights": fingerprint(args.source)}
    if args.json == "-":
        print(json.dumps(result))
    elif args.json:
        utils.write_output(Path(args.json), json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    utils.run_script(main)
