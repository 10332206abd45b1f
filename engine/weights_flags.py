"""The flags that weights were trained with, from the ``run.json`` of their run or the ``config.json`` of their package."""

import os
from collections.abc import Sequence
from typing import Any

from engine.command_line import TRAINED_FLAGS, VIEW_FLAGS, flag_value
from utils import InputError, read_json, status, warn


def adopt_trained_flags(parser: Any, args: Any, argv: Sequence[str] | None, *, ignore: Sequence[str] = ()) -> None:
    """Replace the defaults of :data:`TRAINED_FLAGS` by those of the weights of ``-model_dir``.

    ``args``, parsed by ``parser`` from ``argv``, is changed in place, except for the flags to ``ignore``; defaults that depend on
    other flags follow them. A line lists the flags taken from there, and a warning those given that differ. Without a record,
    as beside the published weights, nothing changes; a damaged ``run.json`` is ignored with a warning. InputError for a
    damaged ``config.json``, and for a source that cannot be fetched.
    """
    if args.model_dir in (None, "none"):
        return
    actions = parser.actions(argv)
    path, flags = actions["model_dir"].record(args.model_dir)
    owner = "run that trained the weights" if flags is None else "package"
    if flags is None and not os.path.lexists(path):
        return
    names = [name for name in TRAINED_FLAGS if name in actions and name not in ignore]

    def parse(found: dict[str, Any]) -> dict[str, Any]:
        foreign = found.keys() - parser.given(argv) if flags else ()
        kept = {name: value for name, value in found.items() if name in names}
        return {name: flag_value(actions[name], value, is_of_package=name in foreign) for name, value in kept.items()}

    try:
        trained = (
            parse(flags) if flags else read_json(path, "the flags of a run", lambda record: parse(record["flags"]))
        )
    except InputError as error:
        warn(f"{error}. It is ignored: flags that are not given keep their defaults")
        return
    except ValueError as error:
        raise InputError(f"{path} has a flag that cannot be used: {error}") from error
    given = parser.given(argv) & set(trained)
    if "deepemd" in given and args.deepemd != trained["deepemd"]:
        trained = {name: value for name, value in trained.items() if name not in VIEW_FLAGS}
    changed = {name: value for name, value in trained.items() if value != getattr(args, name)}
    adopted = {name: value for name, value in changed.items() if name not in given}
    where = f"({args.model_dir if '://' in args.model_dir else path})"
    if adopted:
        status(f"flags of the {owner} {where}: {as_words(adopted)}")
        before, after = vars(parser.parse_args(argv)), vars(parser.parse_args(argv, defaults=adopted))
        vars(args).update({name: value for name, value in after.items() if name not in before or value != before[name]})
    if differing := {name: value for name, value in changed.items() if name in given}:
        here = as_words({name: getattr(args, name) for name in differing})
        warn(f"{here} differs from the {owner} {where}: {as_words(differing)}")


def as_words(flags: dict[str, Any]) -> str:
    """Flags as on the command line; "no -name" for one that is not set."""

    def words(name: str, value: Any) -> str:
        if value is None or value is False:
            return f"no -{name}"
        text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        return f"-{name}" if value is True else f"-{name} {text}"

    return " ".join(words(name, value) for name, value in flags.items())
