"""Choices by name, and names with options: ``knn``, ``knn:k=3``, ``ipm:form=QP,l2_strength=0.1``."""

import math
from collections.abc import Mapping
from typing import Any


def check_choice(what: str, name: str, known: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``name`` is a key of ``known``."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")


def parse_choice(what: str, text: str, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``NAME[:OPTION=VALUE[,OPTION=VALUE]]`` to the name and its options.

    Args:
        what: the kind of choice, for messages.
        known: the rows to choose from. The ``options`` of a row are the names that it takes, with their defaults.

    Raises:
        ValueError: an unknown name or option, or a value of another type than the default. The message lists the known ones.
    """
    name, colon, assignments = text.partition(":")
    check_choice(what, name, known)
    options: dict[str, Any] = {}
    for assignment in assignments.split(",") if colon else ():
        option, equals, value = assignment.partition("=")
        check_option(f"{what} {name}", option, known[name].options)
        if not equals or option in options:
            raise ValueError(f"{what} {text!r}: write each option once, as in {name}:{option}=VALUE")
        options[option] = _parse_value(f"{what} {name}: {option}", value, known[name].options[option])
    return name, options


def check_option(owner: str, option: str, known: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``owner`` takes the option."""
    if option not in known:
        raise ValueError(f"{owner} has no option {option!r}; its options are: {', '.join(known) or 'none'}")


def _parse_value(what: str, text: str, default: Any) -> Any:
    """The value in ``text``, of the type of the default."""
    readers = {bool: {"true": True, "false": False}.__getitem__, int: int, float: float}
    try:
        value = readers.get(type(default), str)(text)
        if not isinstance(value, float) or math.isfinite(value):
            return value
    except (KeyError, ValueError):
        pass
    kind = {bool: "true or false", int: "a whole number"}.get(type(default), "a number")
    raise ValueError(f"{what} must be {kind}; got {text[:40]!r}")
