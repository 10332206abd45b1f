"""Choices by name, and names with options: ``knn``, ``knn:k=3``, ``ipm:form=QP,l2_strength=0.1``."""

from collections.abc import Mapping
from typing import Any

# How options are read, by the type of their default, and what they must be.
_KINDS = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    int: (int, "a whole number of 1 or more"),
    float: (float, "a number"),
    str: (str, "a word"),
}


def check_choice(what: str, name: str, known: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``name`` is a key of ``known``."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")


def parse_choice(
    what: str, text: str, known: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """``NAME[:OPTION=VALUE[,OPTION=VALUE]]`` to the name and its options, which override those ``given`` beside it.

    Each row of ``known`` has ``options``: those that it takes, with their defaults.

    Raises:
        ValueError: an unknown name or option, a value of another type than the default, or a whole number below 1.
    """
    name, colon, assignments = text.partition(":")
    check_choice(what, name, known)
    written = dict(part.partition("=")[::2] for part in assignments.split(",")) if colon else {}
    defaults, options = known[name].options, {}
    for option, value in {**given, **written}.items():
        if option not in defaults:
            taken = ", ".join(defaults) or "none"
            raise ValueError(f"{what} {name} has no option {option!r}; its options are: {taken}")
        options[option] = _read(f"{what} {name}: {option}", str(value), type(defaults[option]))
    return name, options


def _read(what: str, text: str, kind: type) -> Any:
    read, wanted = _KINDS[kind]
    try:
        value = read(text)
        if kind is not int or value >= 1:
            return value
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{what} must be {wanted}; got {text[:40]!r}")
