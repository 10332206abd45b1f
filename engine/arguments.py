"""The flags of training and evaluation, and the command line of the next stage."""

import argparse
import shlex
from typing import Any

import torch
from torch.utils.data import Dataset

from engine.evaluation import Evaluator
from utils import number_above_zero, number_at_least

# Flags that belong to one stage of training and say nothing about the next.
OF_ONE_STAGE = ("max_epoch", "bs", "lr", "step_size", "gamma")


def add_training_arguments(
    parser: argparse.ArgumentParser, *, max_epoch: int, bs: int, bs_help: str, lr: float, step_size: int, gamma: float
) -> None:
    """The flags that :func:`training_settings` and a script's validation read, with the script's defaults."""
    count, rate = number_at_least(1, int), number_above_zero(float)
    group = parser.add_argument_group("training")
    group.add_argument("-max_epoch", type=count, default=max_epoch, help="epochs to train")
    group.add_argument("-bs", type=count, default=bs, help=bs_help)
    group.add_argument("-lr", type=rate, default=lr, help="learning rate")
    group.add_argument("-step_size", type=count, default=step_size, help="epochs between drops of the learning rate")
    group.add_argument("-gamma", type=rate, default=gamma, help="factor of a drop")
    group.add_argument("-save_all", action="store_true", help="keep the weights of every epoch, as epoch-<n>.pth")

    group = parser.add_argument_group("validation")
    group.add_argument("-set", choices=("val", "test"), default="val", help="split to validate on")
    group.add_argument("-random_val_task", action="store_true", help="draw new validation episodes every epoch")


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`engine.training.fit` takes from the flags."""
    return {
        "max_epoch": args.max_epoch,
        "lr": args.lr,
        "step_size": args.step_size,
        "gamma": args.gamma,
        "save_all": args.save_all,
        "half_precision": args.amp == "float16",
    }


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that :func:`make_evaluator` reads beside those of the data; they decide speed and memory, not results."""
    group = parser.add_argument_group("speed of evaluation")
    group.add_argument(
        "-feature_cache",
        choices=("auto", "off"),
        default="auto",
        help="auto: encode each image once per set of weights, where its view is not random",
    )
    group.add_argument("-episode_batch", type=number_at_least(1, int), default=8, help="episodes matched together")


def make_evaluator(
    args: argparse.Namespace, dataset: Dataset, *, device: torch.device, keep_pixels: bool = False
) -> Evaluator:
    """An evaluator of episodes of the shape that the flags give them."""
    return Evaluator(
        dataset,
        way=args.way,
        shot=args.shot,
        device=device,
        seed=args.seed,
        num_workers=args.num_workers,
        feature_cache=args.feature_cache,
        episode_batch=args.episode_batch,
        keep_pixels=keep_pixels,
    )


def folder_number(value: float, digits: int) -> str:
    """A number in the name of a folder: as many decimals as published, or all of them where that would round it."""
    rounded = f"{value:.{digits}f}"
    return rounded if float(rounded) == value else repr(value)


def next_command(script: str, parser: argparse.ArgumentParser, args: argparse.Namespace, **changed: Any) -> str:
    """The command line of the next stage: every flag that it has too, of a value that is not its default there.

    Flags :data:`OF_ONE_STAGE` are left out.

    Args:
        parser: that of the next stage.
        args: the flags of this one.
        changed: flags that this stage does not have, or whose value is to be another one.
    """
    defaults = vars(parser.parse_args([]))
    given = {name: value for name, value in vars(args).items() if name not in OF_ONE_STAGE} | changed
    words = ["python", script]
    for name in defaults:  # in the order of the parser
        value = given.get(name, defaults[name])
        if value == defaults[name]:
            continue
        words.append(f"-{name}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(words)
