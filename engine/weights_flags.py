"""The flags that a checkpoint was trained with, from the ``run.json`` of its run."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils import InputError, read_json, status, warn

# Flags that weights should be used with as they were trained. Those of one view mean nothing to another.
VIEW_FLAGS = ("patch_list", "patch_ratio", "num_patch", "feature_pyramid", "map_size")
TRAINED_FLAGS = (
    *("dataset", "backbone", "backbone_layer", "deepemd", "image_size", "interpolation", *VIEW_FLAGS),
    *("head", "temperature", "metric", "norm", "weights", "weight_power", "kshot"),
)


def adopt_trained_flags(parser: Any, args: Any, argv: Sequence[str] | None, *, ignore: Sequence[str] = ()) -> None:
    """Replace the defaults of :data:`TRAINED_FLAGS` by those in ``run.json`` beside the weights of ``-model_dir``.

    ``args``, parsed by ``parser`` from ``argv``, is changed in place, but for the flags to ``ignore``. A line lists the flags
    taken from there, and a warning those given that differ. Without such a file, as beside the published weights, nothing
    changes; a damaged one is ignored with a warning.
    """
    weights = Path(args.model_dir or "none")
    path = (weights if weights.is_dir() else weights.parent) / "run.json"
    if args.model_dir in (None, "none") or not os.path.lexists(path):
        return
    actions = {action.dest: action for action in _actions(parser, args)}
    names = [name for name in TRAINED_FLAGS if name in actions and name not in ignore]

    def parse(run: Any) -> dict[str, Any]:
        return {name: _parse(actions[name], value) for name, value in run["flags"].items() if name in names}

    try:
        trained = read_json(path, "the flags of a run", parse)
    except InputError as error:
        warn(f"{error}. It is ignored: flags that are not given keep their defaults")
        return
    words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    given = {name for name in trained if words & set(actions[name].option_strings)}
    if "deepemd" in given and args.deepemd != trained["deepemd"]:
        trained = {name: value for name, value in trained.items() if name not in VIEW_FLAGS}
    changed = {name: value for name, value in trained.items() if value != getattr(args, name)}
    adopted = {name: value for name, value in changed.items() if name not in given}
    if adopted:
        status(f"flags of the run that trained the weights ({path}): {as_words(adopted)}")
        vars(args).update(adopted)
    if differing := {name: value for name, value in changed.items() if name in given}:
        here = as_words({name: getattr(args, name) for name in differing})
        warn(f"{here} differs from the run that trained the weights ({path}): {as_words(differing)}")


def as_words(flags: dict[str, Any]) -> str:
    """Flags as on the command line; "no -name" for one that is not set."""
    words = []
    for name, value in flags.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        words.append(f"no -{name}" if value in (None, False) else f"-{name}" if value is True else f"-{name} {text}")
    return " ".join(words)


def _actions(parser: Any, args: Any) -> Iterator[Any]:
    """The arguments of a parser, and those of the command that was chosen if it has several."""
    for action in parser._actions:
        yield action
        command = action.choices.get(getattr(args, action.dest, None)) if isinstance(action.choices, dict) else None
        if hasattr(command, "_actions"):
            yield from _actions(command, args)


def _parse(action: Any, value: Any) -> Any:
    """A value of ``run.json`` as the parser would have it; ValueError if it would not accept it."""
    if value is None and action.default is None:
        return None
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        value = action.type(text) if action.type else text
    except Exception as error:  # a type of argparse has an exception of its own
        raise ValueError(f"-{action.dest}: {error}") from error
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"-{action.dest} {value} is unknown")
    return value
