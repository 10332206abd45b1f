"""Heads and norms on the same features and the same episodes: accuracies, and paired differences.

    python benchmarks/heads.py -dataset fc100 -image_size 32 -model_dir checkpoint/pre_train/fc100/... -solver simplex
    python benchmarks/heads.py -heads deepemd,knn:k=3 -norms center -shots 5 -kshots sfc,mean -json heads.json ...

Takes the flags of eval.py and finds its accuracies, but encodes every image once for all rows. Each row also has its difference
from pooled features (cosine) and from the optimal matching (deepemd), both standardised, on the same episodes, with the 95 %
interval of that difference. Everything but the seconds is the same from run to run.
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
from dataloader import ImageDataset, episode_labels
from dataloader import arguments as data
from dataloader.episodes import SeededEpisodes
from dataloader.features import FeatureSet
from engine import arguments
from engine.command_line import make_parser
from engine.evaluation import Evaluator
from engine.run import environment, fingerprint
from engine.start import start
from engine.statistics import prepare_statistics
from engine.weights_flags import adopt_trained_flags
from Models import DeepEMD
from Models.arguments import (
    SCALED_SFC_LR,
    add_model_arguments,
    add_weights_arguments,
    build_model,
    head_choice,
    open_model,
)
from Models.choices import check_choice
from Models.heads import HEADS
from Models.matching import NORMS
from Models.sfc import KSHOT, FitError
from Models.statistics import OF_STATISTICS
from utils import whole_numbers

Name = tuple[str, str, str | None]  # of a row: the head, the norm, and kshot if there is more than one shot
OF_ROWS = ("shot", "head", "norm", "kshot")  # flags of eval.py of which this takes lists
# What every row is compared with, on the same features: the fair pooled baseline, and the method of the paper.
BASELINES = {"cosine_difference": "cosine", "difference": "deepemd"}
CSV_COLUMNS = ("shot", "head", "norm", "kshot", "episodes", "accuracy", "interval")
CSV_COLUMNS += tuple(name for key in BASELINES for name in (key, f"{key}_interval"))
CSV_COLUMNS += ("seconds", "failed")


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
            self.accuracies[name] += (100 * (logits.argmax(2) == labels).double().sum(1) / len(labels)).tolist()
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
    parser = make_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("comparison")
    heads, kshots = partial(names, head_choice), partial(names, partial(check_choice, "kshot", known=KSHOT))
    group.add_argument("-heads", type=heads, default=",".join(HEADS), help="heads to compare")
    norms = partial(names, partial(check_choice, "norm", known=NORMS))
    group.add_argument("-norms", type=norms, default="none,base,standard", help="norms to compare each head under")
    group.add_argument("-shots", type=whole_numbers, default="1,5", help="support images per class")
    group.add_argument("-kshots", type=kshots, default=",".join(KSHOT), help="prototypes, for shots above 1")
    counts = "episodes for each of -shots, or one number for all"
    group.add_argument("-episodes", type=whole_numbers, default="600,200", help=counts)
    arguments.add_set_argument(group)
    data.add_features_argument(group)
    arguments.add_json_argument(group)
    arguments.add_csv_argument(group, "head, norm and way to prototypes")
    data.add_data_arguments(parser)
    data.add_episode_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_weights_arguments(parser)
    arguments.add_evaluation_arguments(parser)
    arguments.add_run_arguments(parser, has_folder=False)
    for action in parser._actions:
        if action.dest in OF_ROWS:
            action.help = argparse.SUPPRESS
    return parser


def open_shared(args: argparse.Namespace, device: torch.device, dataset: ImageDataset | FeatureSet) -> DeepEMD:
    """The model whose encoder and statistics all rows have. Norms whose statistics cannot be computed are dropped from
    ``args.norms``.
    """
    needing = [norm for norm in args.norms if norm in OF_STATISTICS]
    flags = argparse.Namespace(**{**vars(args), "head": args.heads[0], "norm": (needing or args.norms)[-1]})
    shared, args.source = open_model(flags, device=device, device_ids=(), **data.pixel_statistics(args))
    source = {"open_train": partial(data.open_base_images, flags, dataset)}
    source |= {"num_workers": arguments.loader_processes(args), "train_nodes": getattr(dataset, "train_nodes", None)}
    try:
        prepare_statistics(flags, shared, args.source, device=device, **source)
    except utils.InputError as error:
        if args.statistics or len(needing) == len(args.norms):
            raise
        utils.status(f"rows of -norm {' and '.join(needing)} are left out: {error}")
        args.norms = tuple(norm for norm in args.norms if norm not in OF_STATISTICS)
    return shared


def build_models(args: argparse.Namespace, shared: DeepEMD, own_lr: bool) -> dict[Name, DeepEMD]:
    """A model for each row. ``own_lr``: each norm has its own learning rate of the prototype fit, as ``-sfc_lr`` is not given."""
    models: dict[Name, DeepEMD] = {}
    for head, norm, kshot in product(args.heads, args.norms, args.kshots if args.shot > 1 else (None,)):
        if norm == "center" and "none" in args.norms and not HEADS[head.partition(":")[0]].weighs_nodes:
            continue  # this head has no such norm
        rate = SCALED_SFC_LR if own_lr and norm in OF_STATISTICS else args.sfc_lr
        changed = {"head": head, "norm": norm, "kshot": kshot or args.kshot, "sfc_lr": rate}
        model = build_model(argparse.Namespace(**{**vars(args), **changed}), encoder=shared.encoder)
        if norm in OF_STATISTICS:
            model.use_statistics(shared.settings.statistics)
        models[head, norm, kshot] = model
    return models


def baseline_norm(args: argparse.Namespace, head: str) -> str:
    """The norm of the row of a head that the others are compared with."""
    norm = "standard" if "standard" in args.norms else args.norms[0]
    return "none" if norm == "center" and "none" in args.norms and not HEADS[head].weighs_nodes else norm


def compare(
    args: argparse.Namespace, evaluator: Evaluator, shared: DeepEMD, shot: int, episodes: SeededEpisodes, own_lr: bool
) -> list[dict[str, Any]]:
    """One row for each head, each norm and, above one shot, each way to prototypes."""
    args.shot = evaluator.shot = shot
    comparison, count = Comparison(build_models(args, shared, own_lr)), len(episodes)
    evaluator(comparison, episodes, title=f"{shot}-shot")
    kshot, rows = args.kshots[0] if shot > 1 else None, []
    for name, accuracies in comparison.accuracies.items():
        row = {"head": name[0], "norm": name[1], "shot": shot, "kshot": name[2], "episodes": count}
        if name in comparison.failed:
            rows.append({**row, "failed": comparison.failed[name]})
            continue
        row["accuracy"], row["interval"] = utils.mean_confidence_interval(accuracies)
        for key, head in BASELINES.items():
            baseline = head, baseline_norm(args, head), kshot
            if baseline in comparison.accuracies and baseline not in comparison.failed:
                pairs = zip(accuracies, comparison.accuracies[baseline], strict=True)
                difference = utils.mean_confidence_interval([value - other for value, other in pairs])
                row[key], row[f"{key}_interval"] = difference
        rows.append({**row, "seconds": comparison.seconds[name] / count, "accuracies": accuracies})
    return rows


def may_overlap(args: argparse.Namespace) -> bool:
    """Whether the encoder may have been trained on images of the test classes: pretrained ones are, on most photographs, and
    of the letters of ``glyphs`` alone is it known that they are not."""
    is_pretrained = args.backbone.startswith("timm:") and args.backbone_weights != "none"
    return bool(args.features) or is_pretrained and args.dataset != "glyphs"


def heading(args: argparse.Namespace, device: torch.device) -> str:
    """What the table is of, and its head."""
    baselines = [f"{head}, {baseline_norm(args, head)}" for head in BASELINES.values()]
    nodes = (
        f"{args.dataset} {args.set}, {args.backbone}, {args.deepemd}, {args.image_size} pixels, weights {args.source}"
    )
    above = f" (above one shot, by -kshot {args.kshots[0]})" if max(args.shots) > 1 else ""
    star, leak = "", ""
    if may_overlap(args):
        star = " \\*"
        leak = "\\* The encoder may have been trained on images of the test classes: compare these accuracies with each other, "
        leak += "not with few-shot results of other encoders.\n\n"
    return (
        f"{args.features or nodes}, {args.way}-way, {args.query} queries per class, seed {args.seed}. Accuracies in percent "
        f"with 95 % intervals; differences from {' and from '.join(baselines)}{above}, on the same episodes. Seconds per "
        f"episode of the head alone, prototypes included, on {device.type}.\n\n{leak}"
        f"| shot | head | norm | prototypes | episodes | accuracy{star} | vs {' | vs '.join(baselines)} | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| {row['shot']} | {row['head']} | {row['norm']} | {row['kshot'] or ''} | {row['episodes']} "
    if "failed" in row:
        return start + "| diverged | | | |"
    cells = [f"{row['accuracy']:.2f} +- {row['interval']:.2f}"]
    for key in BASELINES:
        cells += [f"{round(row[key], 2) + 0.0:+.2f} +- {row[f'{key}_interval']:.2f}" if key in row else ""]
    return f"{start}| {' | '.join(cells)} | {row['seconds']:.4f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    for flag in OF_ROWS:
        if getattr(args, flag) != parser.get_default(flag):
            advice = f"Set -{flag}s, which takes all that are to be compared"
            raise utils.InputError(f"-{flag} is a flag of eval.py. {advice}")
    adopt_trained_flags(parser, args, argv, ignore=OF_ROWS)
    if len(args.episodes) not in (1, len(args.shots)):
        raise utils.InputError(f"-episodes takes one number, or one for each of the {len(args.shots)} -shots")
    counts = args.episodes * len(args.shots) if len(args.episodes) == 1 else args.episodes
    arguments.check_outputs(args.json, args.csv)
    own_lr = "sfc_lr" not in parser.given(argv)
    _, device, _ = start(args, one_process=True)
    dataset, tasks, rows = data.open_dataset(args, args.set, train=False), [], []
    for shot, count in zip(args.shots, counts, strict=True):  # all before any work, as classes may be too small for one
        args.shot = shot
        tasks.append((shot, data.draw_episodes(args, dataset, count, seed=args.seed, name=args.set)))
    shared = open_shared(args, device, dataset)
    evaluator = arguments.make_evaluator(args, dataset, device=device, keep_nodes=True)
    for shot, episodes in tasks:
        found = compare(args, evaluator, shared, shot, episodes, own_lr)
        if args.json != "-":
            print("\n".join([*([] if rows else [heading(args, device)]), *map(line, found)]), flush=True)
        rows += found
    result = {"rows": rows, "may_overlap": may_overlap(args), "flags": vars(args)}
    result |= {"versions": environment(), "weights": fingerprint(args.source)}
    result |= {"encoder": shared.encoder.identity(), "data": dataset.fingerprint()}
    if args.json == "-":
        print(json.dumps(result))
    elif args.json:
        utils.write_output(Path(args.json), json.dumps(result, indent=1).encode())
    if args.csv:
        utils.write_csv(Path(args.csv), CSV_COLUMNS, [[row.get(name) for name in CSV_COLUMNS] for row in rows])


if __name__ == "__main__":
    utils.run_script(main)
