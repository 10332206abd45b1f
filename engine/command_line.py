"""The command line of every script: a parser that refuses what it does not know, takes flags from files, and fills in defaults
that depend on other flags.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils import InputError, printable, read_json


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_unset = action.default is False or action.default in (None, "", [])  # 0 is a value
        return action.help if is_unset else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        is_number = isinstance(action.default, int | float)
        return "N" if is_number else super()._get_default_metavar_for_optional(action)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Called with the parsed flags, in this order: they fill in defaults that depend on other flags, and check those that do.
        self.completions: list[Callable[[argparse.Namespace], None]] = []
        text = "take flags that are not given from a JSON file: run.json, results.json, a package's config.json, or {flag: value}"
        # SUPPRESS, as the flags in the file are in the namespace, not the file.
        self.add_argument("-config", metavar="FILE", default=argparse.SUPPRESS, help=text)

    def parse_args(self, args: Any = None, namespace: Any = None, *, defaults: Any = None) -> argparse.Namespace:
        """As in argparse; ``defaults``, by flag, replace the parser's own, and the flags in ``-config`` files replace both."""
        words, configured = self._configured(args)
        values, actions = {**(defaults or {}), **configured}, self.actions(words)
        before = {name: (actions[name].default, actions[name].required) for name in values}
        try:
            for name, value in values.items():
                actions[name].default, actions[name].required = value, False
            parsed = super().parse_args(words, namespace)
            self._complete(parsed)
        finally:
            for name, settings in before.items():
                actions[name].default, actions[name].required = settings
        return parsed

    def _complete(self, parsed: argparse.Namespace) -> None:
        try:
            for completion in self.completions:
                completion(parsed)
        except (argparse.ArgumentTypeError, InputError) as error:
            self.error(str(error))
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                action.choices[getattr(parsed, action.dest)]._complete(parsed)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} -h)\n")

    def _get_option_tuples(self, option_string: str) -> list:
        return []  # allow_abbrev=False covers flags with two dashes only: -k would still be read as -kshot

    def actions(self, argv: Sequence[str] | None) -> dict[str, argparse.Action]:
        """The flags by name, with those of the subcommand that the command line names."""
        found, words = {}, sys.argv[1:] if argv is None else argv
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                command = next((word for word in words if word in action.choices), None)
                found |= action.choices[command].actions(words) if command else {}
            elif action.option_strings and action.default is not argparse.SUPPRESS:
                found[action.dest] = action
        return found

    def given(self, argv: Sequence[str] | None) -> set[str]:
        """The names of the flags that are on a command line, or in its ``-config`` files."""
        words, configured = self._configured(argv)
        flags = {word.partition("=")[0] for word in words}
        return {*configured, *(name for name, one in self.actions(words).items() if flags & set(one.option_strings))}

    def _configured(self, argv: Sequence[str] | None) -> tuple[list[str], dict[str, Any]]:
        """A command line without its ``-config`` files, and the flags in them; of several files, the last wins."""
        words, files, configured = [], [], {}
        given = iter(sys.argv[1:] if argv is None else argv)
        for word in given:
            flag, _, file = word.partition("=")
            if flag == "-config" and (file := file or next(given, "")):
                files.append(file)
            else:
                words.append(word)
        known, flags = self.actions(words), {word.partition("=")[0] for word in words}
        for file in files if known else ():  # without a subcommand, which is an error, there are none
            read = self._read_config(file, known, {name for name in known if flags & set(known[name].option_strings)})
            configured |= read
        return words, configured

    def _read_config(self, file: str, known: dict[str, argparse.Action], given: set[str]) -> dict[str, Any]:
        try:
            content = read_json(Path(file), "flags")
        except InputError as error:
            self.error(f"-config: {error}")
        if not isinstance(content, dict):
            self.error(f"-config: {file} is damaged, or not flags (TypeError: it must be an object, {{flag: value}})")
        is_record = isinstance(content.get("flags"), dict)  # of a run, an evaluation or a package
        is_package, script = is_record and "format" in content, content.get("script")
        flags = {name.lstrip("-"): value for name, value in (content["flags"] if is_record else content).items()}
        unknown = [name for name in flags if name not in known]
        if unknown and not is_record:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)[0]
            self.error(f"-config {file}: there is no flag -{printable(unknown[0])}; the nearest is -{near}")
        if is_record:
            is_other = script != self.prog.split()[0] if script else bool(unknown)
            left_out = {*unknown, *OF_ONE_START, *(SCRIPT_FLAGS if is_other else ())}
            kept = set(TRAINED_FLAGS if is_package else flags) - left_out
            flags = {name: flags[name] for name in flags if name in kept}
        try:  # null and false mean not given; 0 is a value
            flags = {name: value for name, value in flags.items() if value not in (None, []) and value is not False}
            names = flags.keys() - given
            return {name: flag_value(known[name], flags[name], is_of_package=is_package) for name in names}
        except ValueError as error:
            self.error(f"-config {file}: {printable(str(error))}")


# Flags with which weights should be used as they were trained. Those of one view have no meaning for another.
VIEW_FLAGS = ("patch_list", "patch_ratio", "num_patch", "feature_pyramid", "map_size")
TRAINED_FLAGS = (
    *("dataset", "backbone", "backbone_layer", "deepemd", "image_size", "interpolation", *VIEW_FLAGS),
    *("head", "temperature", "metric", "norm", "weights", "weight_power", "kshot"),
)
# Flags that no record passes on: it would resume that run, or overwrite its files.
OF_ONE_START = ("resume", "json", "csv", "save", "picture", "out")
# Flags that mean something else in another script, or whose default is each script's own.
SCRIPT_FLAGS = ("set", "sfc_lr", "max_epoch", "bs", "lr", "step_size", "gamma", "save_every", "extra_dir")


def flag_value(action: argparse.Action, value: Any, *, is_of_package: bool = False) -> Any:
    """A value from a JSON file, parsed as on the command line; ValueError, which names the flag, if it is refused."""
    if is_of_package and re.match(r"timm:(hf[-_]hub|local-dir):", str(value)):
        raise ValueError(f"-{action.dest}: {value} is at another place. If you trust it, give it on the command line")
    if value is None and action.default is None or action.nargs in (0, "?") and isinstance(value, bool):
        return value

    def parse(text: str) -> Any:
        found = action.type(text) if action.type else text
        if action.choices is not None and found not in action.choices:
            raise ValueError(f"{text!r} is unknown; choose from {', '.join(map(str, action.choices))}")
        return found

    try:
        if action.nargs == 0 or isinstance(value, dict | bool | None):
            raise ValueError(f"{json.dumps(value)} is not {'true or false' if action.nargs == 0 else 'a value'}")
        if action.nargs == "+":
            return [parse(str(word)) for word in (value if isinstance(value, list) else [value])]
        return parse(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    except Exception as error:  # a type of argparse has an exception of its own
        raise ValueError(f"-{action.dest}: {error}") from error


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows every default, reports bad flags in one line, and takes flags from the file of ``-config``.

    Its ``completions`` are called with the flags that were parsed, those of a command included. They fill in the defaults that
    depend on other flags, which are None until then, and raise InputError or ArgumentTypeError for flags that do not fit.
    """
    return _Parser(description=description, allow_abbrev=False, formatter_class=_Formatter)
