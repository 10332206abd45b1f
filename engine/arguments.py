"""The flags that scripts share beside those of the data and the model, and the commands that they print."""

import contextlib
import hashlib
import io
import json
import re
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from engine.command_line import flag_value
from engine.evaluation import Evaluator
from engine.run import LAST_STATE, read_record, result_flags
from engine.training import FitSettings
from utils import RECORD, InputError, available_cores, check_writable, number_at_least, number_between

# Flags that belong to one stage of training and mean nothing to the next.
STAGE_FLAGS = ("max_epoch", "bs", "lr", "step_size", "gamma", "resume", "save_every", "backbone_weights")


def add_training_arguments(
    parser: ArgumentParser, *, max_epoch: int, bs: int, bs_help: str, lr: float, step_size: int, gamma: float
) -> None:
    """The flags that :func:`fit_settings` and a script's validation read, with the script's defaults."""
    count, steps, rate = number_at_least(1, int), number_at_least(0, int), number_at_least(1e-12, float)
    group = parser.add_argument_group("training")
    group.add_argument("-max_epoch", type=count, default=max_epoch, help="epochs to train")
    group.add_argument("-bs", type=number_between(1, 10_000, int), default=bs, help=bs_help)
    group.add_argument("-lr", type=rate, default=lr, help="learning rate")
    group.add_argument("-step_size", type=count, default=step_size, help="epochs between drops of the learning rate")
    group.add_argument("-gamma", type=rate, default=gamma, help="factor of a drop")
    group.add_argument("-save_all", action="store_true", help="keep the weights of every epoch, as epoch-<n>.pth")
    every = "steps between saves of the state within an epoch; 0 saves it once an epoch"
    group.add_argument("-save_every", type=steps, default=0, help=every)
    own = "with FOLDER, resume the run in FOLDER with its own flags"
    resume = f"resume the run in the folder that the other flags name, or start it if there is none; {own}"
    group.add_argument("-resume", nargs="?", const="", metavar="FOLDER", help=resume)
    group = parser.add_argument_group("validation")
    group.add_argument("-set", choices=("val", "test"), default="val", help="split to validate on")
    group.add_argument("-random_val_task", action="store_true", help="draw new validation episodes every epoch")


def parse_run(
    script: str, parser: ArgumentParser, argv: Sequence[str] | None, folder_of: Callable[[Namespace], Path]
) -> tuple[Namespace, Path, bool]:
    """The flags of a training script, the folder of its run, and whether this resumes the run that is there.

    With ``-resume FOLDER``, flags that are not given are those of the run in there; else ``folder_of`` gives the folder that
    the flags name. InputError if there is nothing to resume, or flags that decide the result differ from those of the run.
    """
    args = parser.parse_args(argv)
    folder = Path(args.resume) if args.resume else folder_of(args)
    if args.resume is None or not (folder / LAST_STATE).is_file():
        if args.resume:
            raise InputError(f"-resume {folder}: nothing to resume, there is no {LAST_STATE}")
        return args, folder, False
    record = read_record(folder)
    recorded = record["flags"]
    if record["script"] != script:
        raise InputError(f"-resume: {folder} holds a run of {record['script']}, not of {script}")
    if args.resume:  # the recorded flags are checked as those of a user are
        actions, message = parser.actions(argv), io.StringIO()
        try:
            with contextlib.redirect_stderr(message):
                known = {name: flag_value(actions[name], value) for name, value in recorded.items() if name in actions}
                args = parser.parse_args(argv, defaults=known)
        except (SystemExit, ValueError) as error:
            reason = message.getvalue().strip() or error
            raise InputError(f"{folder / RECORD} has flags that cannot be used ({reason})") from None
    if args.seed == 0:
        args.seed = recorded["seed"]  # the one that was drawn
    flags = json.loads(json.dumps(result_flags(args)))
    if flags["max_epoch"] > recorded["max_epoch"]:  # a run may be made longer
        del flags["max_epoch"]
    different = [name for name, value in flags.items() if value != recorded.get(name, value)]
    if different:
        listed = ", ".join(f"-{name} {flags[name]} (was {recorded[name]})" for name in different)
        advice = "Resume it with its own flags, or start another run with -extra_dir"
        raise InputError(f"-resume: the run in {folder} has other flags: {listed}. {advice}")
    return args, folder, True


def fit_settings(args: Namespace, **more: Any) -> FitSettings:
    """The settings of :func:`engine.training.fit` that the flags give; ``more`` are the script's own."""
    names = ("max_epoch", "lr", "step_size", "gamma", "save_all", "save_every")
    flags = {name: getattr(args, name) for name in names}
    return FitSettings(**flags, half_precision=args.amp == "float16", **more)


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """The flags that :func:`make_evaluator` reads beside those of the data; they decide speed and memory, not results."""
    group = parser.add_argument_group("speed of evaluation")
    auto = "auto: encode each image once per set of weights, where its view is not random"
    group.add_argument("-feature_cache", choices=("auto", "off"), default="auto", help=auto)
    group.add_argument("-episode_batch", type=number_between(1, 1000, int), default=8, help="episodes matched together")


def add_run_arguments(parser: ArgumentParser, *, has_folder: bool = True) -> None:
    """The flags that :func:`engine.start.start` reads, and ``-extra_dir`` where the script writes to a folder."""
    group, seed = parser.add_argument_group("run"), number_between(0, 2**63 - 1, int)
    group.add_argument("-gpu", help='GPUs to use, as in 0 or 0,1,2,3, or "cpu" (default: one GPU, else the CPU)')
    group.add_argument("-seed", type=seed, default=1, help="of every random draw; 0 draws a seed")
    kernels = "on a GPU, use deterministic kernels: repeatable, and slower"
    group.add_argument("-deterministic", action="store_true", help=kernels)
    if has_folder:
        results = "checkpoint/eval/<extra_dir>/results.txt"
        subfolder = f"subfolder of the run folder, to keep runs apart; eval.py adds its result to {results}"
        group.add_argument("-extra_dir", type=folder_name, metavar="NAME", default="", help=subfolder)


def folder_name(text: str) -> str:
    """An argparse type: a relative path that stays below the folder it is joined to."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        raise ArgumentTypeError(f"{text!r} is not the name of a folder below checkpoint/, as in trial-2")
    return text


def add_set_argument(group: Any) -> None:
    group.add_argument("-set", choices=("train", "val", "test"), default="test", help="split to draw from")


def add_test_episode_argument(group: Any, help: str = "episodes; the paper: 5000 for 1-shot, 600 for 5-shot") -> None:
    group.add_argument("-test_episode", type=number_at_least(1, int), default=5000, help=help)


def add_json_argument(group: Any, what: str = "the results") -> None:
    group.add_argument("-json", metavar="FILE", help=f'also write {what} to FILE; "-" prints them and nothing else')


def add_csv_argument(group: Any, what: str) -> None:
    table = f"also write a table to FILE: a row for each {what}"
    group.add_argument("-csv", type=_table_file, metavar="FILE", help=table)


def check_outputs(*paths: str | Path | None) -> None:
    """InputError for a file that cannot be written, or that two outputs name, before any work; None and "-" are none."""
    files: set[Path] = set()
    for path in paths:
        if path in (None, "-"):
            continue
        check_writable(Path(path))
        file = Path(path).resolve()
        if file in files and (file.is_file() or not file.exists()):  # not /dev/null
            raise InputError(f"{path} is named for two outputs; give each a file of its own")
        files.add(file)


def _table_file(text: str) -> str:
    if text == "-":
        raise ArgumentTypeError('a table needs the name of a file; "-" is for -json')
    return text


def loader_processes(args: Namespace) -> int:
    """Processes that load images for this one."""
    return min(8, available_cores()) if args.num_workers is None else args.num_workers


def make_evaluator(args: Namespace, dataset: Dataset, **more: Any) -> Evaluator:
    """An evaluator of episodes of the shape that the flags ask for; ``more`` are its other arguments."""
    names = ("way", "shot", "seed", "feature_cache", "episode_batch")
    flags = {name: getattr(args, name) for name in names}
    return Evaluator(dataset, num_workers=loader_processes(args), **flags, **more)


def folder_number(value: float, digits: int) -> str:
    """A number in the name of a folder: as many decimals as published, or all of them where that would round it."""
    rounded = f"{value:.{digits}f}"
    return rounded if float(rounded) == value else repr(value)


def encoder_suffix(args: Namespace) -> str:
    """What the encoder adds to the name of a run folder: nothing for the published one."""
    name = args.backbone
    if name == "resnet12":
        return ""
    # A path has characters that a folder's name cannot have; without them, two paths may read alike.
    backbone, _, model = name.partition(":")
    plain = re.sub(r"[^\w.-]+", "-", model)
    digest = hashlib.sha256(name.encode()).hexdigest()[:6] if plain != model else ""
    return "-".join(["", backbone, *filter(None, [plain, digest])])


def resume_command(script: str, argv: Sequence[str] | None, args: Namespace) -> str:
    """The command line that resumes a run that was stopped: as it was given, with the seed that was drawn."""
    words = list(sys.argv[1:] if argv is None else argv)
    text = f" {' '.join(words)} ".replace("-seed=", "-seed ")
    if " -seed 0 " in text and f" -seed {args.seed} " not in text:
        words += ["-seed", str(args.seed)]
    return shlex.join(["python", script, *words, *([] if "-resume" in words else ["-resume"])])


def next_command(
    script: str, parser: ArgumentParser, args: Namespace, *, leave_out: Iterable[str] = (), **changed: Any
) -> str:
    """The command line of the next stage, with the flags of this one, whose parser it is, that are not at their default.

    Flags to ``leave_out`` are those that the next stage does not have or should not take over, beside :data:`STAGE_FLAGS`;
    ``changed`` are those that this stage does not have, or that are others in the next stage.
    """
    left_out = {*STAGE_FLAGS, *leave_out}
    given = {name: value for name, value in vars(args).items() if name not in left_out} | changed
    return shlex.join(["python", script, *_words(parser, given)])


def _words(parser: ArgumentParser, flags: dict[str, Any]) -> list[str]:
    """Flags as words of a command line, without those at their default, in the order of the parser."""
    defaults = defaults_beside(parser, flags)
    return flag_words({**defaults, **flags}, defaults)


def defaults_beside(parser: ArgumentParser, flags: dict[str, Any]) -> dict[str, Any]:
    """The default of every flag; of those that depend on other flags, the one beside these."""
    defaults = vars(parser.parse_args([]))
    dependent = [name for name, value in defaults.items() if value is not None and parser.get_default(name) is None]
    others = {name: value for name, value in flags.items() if name in defaults and name not in dependent}
    found = parser.parse_args([], defaults=others) if dependent and others else None
    return {name: getattr(found, name) if found and name in dependent else value for name, value in defaults.items()}


def flag_words(flags: dict[str, Any], defaults: dict[str, Any] | None = None) -> list[str]:
    """Flags as words of a command line, without those that are at their default, None or False."""
    words = []
    for name, value in flags.items():
        text = _joined(value)
        if value is None or value is False or defaults and text == _joined(defaults.get(name)):
            continue
        if text is True:
            words.append(f"-{name}")
        elif str(text).startswith("-"):
            words.append(f"-{name}={text}")
        else:
            words += [f"-{name}", str(text)]
    return words


def _joined(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value
