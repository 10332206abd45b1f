"""The flags of training and evaluation, and the command line of the next stage."""

import argparse
import copy
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from engine.distributed import Ranks
from engine.evaluation import Evaluator
from engine.run import LAST_STATE, deciding
from engine.stopping import StopRequest
from utils import LARGEST_SEED, InputError, available_cores, number_above_zero, number_at_least, number_between

# Flags that belong to one stage of training and say nothing about the next.
OF_ONE_STAGE = ("max_epoch", "bs", "lr", "step_size", "gamma", "resume", "save_every")


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
    group.add_argument(
        "-save_every",
        type=number_at_least(0, int),
        default=0,
        help="steps between saves of the state within an epoch; 0 saves it once an epoch",
    )
    group.add_argument(
        "-resume",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="go on with the run in the folder that the other flags name, or start it where there is none; with FOLDER, "
        "go on with the run in there, by its own flags",
    )

    group = parser.add_argument_group("validation")
    group.add_argument("-set", choices=("val", "test"), default="val", help="split to validate on")
    group.add_argument("-random_val_task", action="store_true", help="draw new validation episodes every epoch")


def parse_run(
    script: str,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    folder_of: Callable[[argparse.Namespace], Path],
) -> tuple[argparse.Namespace, Path]:
    """The flags of a training script, and the folder of its run.

    With ``-resume FOLDER``, flags that are not given are those of the run in there.

    Args:
        script: its file name.
        folder_of: the folder that the flags name.

    Raises:
        InputError: ``-resume FOLDER`` without a run in it, or flags that decide the result and are not those of the run.
    """
    args = parser.parse_args(argv)
    if args.resume is None:
        return args, folder_of(args)
    folder = Path(args.resume) if args.resume else folder_of(args)
    if not (folder / LAST_STATE).is_file():
        if args.resume:
            raise InputError(f"-resume {folder}: expected a run with its {LAST_STATE}; there is none")
        return args, folder
    try:
        content = json.loads((folder / "run.json").read_text())
        recorded, by = content["flags"], content["script"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"-resume: expected the flags of the run in {folder / 'run.json'}; {error!r}") from error
    if by != script:
        raise InputError(f"-resume: expected a run of {script} in {folder}; it is one of {by}")
    if args.resume:
        absent = object()
        blank = copy.deepcopy(parser)
        blank.set_defaults(**dict.fromkeys(vars(args), absent))
        given = vars(blank.parse_args(argv))
        for name, value in recorded.items():
            if given.get(name, absent) is absent:
                setattr(args, name, tuple(value) if isinstance(value, list) else value)
    if args.seed == 0:
        args.seed = recorded["seed"]  # the one that was drawn
    now = json.loads(json.dumps(deciding(args)))
    if now["max_epoch"] > recorded["max_epoch"]:  # a run may be made longer
        recorded["max_epoch"] = now["max_epoch"]
    different = [
        f"-{name} {value} (there: {recorded[name]})"
        for name, value in now.items()
        if name in recorded and value != recorded[name]
    ]
    if different:
        raise InputError(
            f"-resume: expected the flags of the run in {folder}; got {', '.join(different)}. Give those of the run, or "
            "start another with -extra_dir"
        )
    return args, folder


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`engine.training.fit` takes from the flags."""
    return {
        "max_epoch": args.max_epoch,
        "lr": args.lr,
        "step_size": args.step_size,
        "gamma": args.gamma,
        "save_all": args.save_all,
        "save_every": args.save_every,
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


def add_run_arguments(parser: argparse.ArgumentParser, *, has_folder: bool = True) -> None:
    """The flags that :func:`engine.start.start` reads, and ``-extra_dir`` where the script writes to a folder."""
    group = parser.add_argument_group("run")
    group.add_argument("-gpu", help='GPUs to use, as in 0 or 0,1,2,3, or "cpu" (default: one GPU, else the CPU)')
    group.add_argument(
        "-seed", type=number_between(0, LARGEST_SEED, int), default=1, help="of every random draw; 0 draws a seed"
    )
    group.add_argument(
        "-deterministic", action="store_true", help="on a GPU, use deterministic kernels: repeatable, and slower"
    )
    if has_folder:
        group.add_argument(
            "-extra_dir",
            type=folder_name,
            default="",
            help="subfolder of the run folder, to keep runs apart; eval.py adds its result to "
            "checkpoint/eval/<extra_dir>/results.txt",
        )


def folder_name(text: str) -> str:
    """An argparse type: a relative path that stays below the folder it is joined to."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        raise argparse.ArgumentTypeError(
            f"expected the name of a folder below checkpoint/, as in trial-2; got {text!r}"
        )
    return text


def add_set_argument(
    group: Any,
    choices: Sequence[str] = ("train", "val", "test"),
    default: str = "test",
    help: str = "split to draw from",
) -> None:
    """The flag ``-set``."""
    group.add_argument("-set", choices=choices, default=default, help=help)


def add_test_episode_argument(
    group: Any, help: str = "episodes; the paper takes 5000 for 1-shot, 600 for 5-shot"
) -> None:
    """The flag ``-test_episode``."""
    group.add_argument("-test_episode", type=number_at_least(1, int), default=5000, help=help)


def add_json_argument(group: Any, what: str = "the results") -> None:
    """The flag ``-json``."""
    group.add_argument("-json", metavar="FILE", help=f'also write {what} to FILE; "-" prints them and nothing else')


def add_rank_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flag that :func:`solver_threads` reads; returns its group, for a script to add to."""
    return parser.add_argument_group("several processes (torchrun, or srun)")


def loader_processes(args: argparse.Namespace, ranks: Ranks) -> int:
    """Processes that load images for this one."""
    return max(1, min(8, available_cores() // ranks.local_size)) if args.num_workers is None else args.num_workers


def solver_threads(args: argparse.Namespace, ranks: Ranks) -> int:
    """Threads for the solvers on the CPU; torchrun leaves torch itself only one."""
    return args.solver_threads or max(1, available_cores() // ranks.local_size)


def make_evaluator(
    args: argparse.Namespace,
    dataset: Dataset,
    *,
    device: torch.device,
    keep_pixels: bool = False,
    ranks: Ranks | None = None,
    stop: StopRequest | None = None,
) -> Evaluator:
    """An evaluator of episodes of the shape that the flags give them."""
    ranks = ranks or Ranks()
    return Evaluator(
        dataset,
        way=args.way,
        shot=args.shot,
        device=device,
        seed=args.seed,
        num_workers=loader_processes(args, ranks),
        feature_cache=args.feature_cache,
        episode_batch=args.episode_batch,
        keep_pixels=keep_pixels,
        ranks=ranks,
        stop=stop,
    )


def folder_number(value: float, digits: int) -> str:
    """A number in the name of a folder: as many decimals as published, or all of them where that would round it."""
    rounded = f"{value:.{digits}f}"
    return rounded if float(rounded) == value else repr(value)


def same_command(script: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command line that goes on with a run that was stopped."""
    return _command(script, parser, vars(args) | {"resume": args.resume or True})  # without a value where it has none


def next_command(script: str, parser: argparse.ArgumentParser, args: argparse.Namespace, **changed: Any) -> str:
    """The command line of the next stage: every flag that it has too, of a value that is not its default there.

    Flags :data:`OF_ONE_STAGE` are left out.

    Args:
        parser: that of the next stage.
        args: the flags of this one.
        changed: flags that this stage does not have, or whose value is to be another one.
    """
    return _command(script, parser, {k: v for k, v in vars(args).items() if k not in OF_ONE_STAGE} | changed)


def _command(script: str, parser: argparse.ArgumentParser, given: dict[str, Any]) -> str:
    defaults = vars(parser.parse_args([]))
    words = ["python", script]
    for name in defaults:  # in the order of the parser
        value = given.get(name, defaults[name])
        if value == defaults[name]:
            continue
        words.append(f"-{name}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(words)
