"""-config FILE: flags from a JSON file, in every script."""

import importlib
import json
from pathlib import Path

import pytest
from test_house import BENCHMARKS, SCRIPTS

from engine.command_line import make_parser
from utils import number_between, whole_numbers


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    parser = make_parser("test")
    parser.add_argument("-lr", type=number_between(0, 1, float), default=0.5)
    parser.add_argument("-seed", type=number_between(-9, 9, int), default=1)
    parser.add_argument("-sizes", type=whole_numbers)
    parser.add_argument("-query", nargs="+", default=[])
    parser.add_argument("-norm", choices=("none", "center"), default="center")
    parser.add_argument("-set", default="test")
    parser.add_argument("-resume", nargs="?", const="")
    parser.add_argument("-fast", action="store_true")
    return parser


@pytest.fixture
def parse(parser, tmp_path):
    """Flags from files with these contents, in the place of F in the words."""

    def parse(content, *words):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return parser.parse_args([word.replace("FILE", str(path)) for word in words or ("-config", "FILE")])

    return parse


DEFAULTS = {"lr": 0.5, "seed": 1, "sizes": None, "query": [], "norm": "center", "set": "test"}
DEFAULTS |= {"resume": None, "fast": False}
CONTENT = {"lr": 0, "seed": -3, "sizes": [2, 1], "query": ["a", "b"], "norm": "none", "fast": True, "resume": None}
FOUND = {**DEFAULTS, "lr": 0.0, "seed": -3, "sizes": (2, 1), "query": ["a", "b"], "norm": "none", "fast": True}


@pytest.mark.parametrize("content", [CONTENT, {f"-{name}": value for name, value in CONTENT.items()}])
@pytest.mark.parametrize("words", [("-config", "FILE"), ("-config=FILE",)])
def test_flags_come_from_the_file(parse, content, words):
    assert vars(parse(content, *words)) == FOUND


@pytest.mark.parametrize("words", [("-lr", "0.25", "-config", "FILE"), ("-config=FILE", "-lr=0.25")])
def test_given_flags_win(parse, words):
    assert vars(parse(CONTENT, *words)) == {**FOUND, "lr": 0.25}


def test_what_is_null_or_false_is_not_given(parse):
    assert vars(parse({"lr": None, "fast": False, "query": []})) == DEFAULTS


def test_of_several_files_the_last_wins(parse, tmp_path):
    (tmp_path / "first.json").write_text('{"lr": 0.1, "seed": 2}')
    args = parse({"lr": 0.2}, "-config", str(tmp_path / "first.json"), "-config", "FILE")
    assert (args.lr, args.seed) == (0.2, 2)


def test_the_record_of_a_run_sets_what_the_script_has(parse):
    """Without -resume, which would resume that run. Another script's -set and learning rate mean something else."""
    flags = {"lr": 0.25, "set": "val", "norm": "none", "resume": "", "unknown": 3}
    for record, expected in (
        ({"script": "train.py", "flags": flags}, {"lr": 0.25, "set": "val", "norm": "none"}),
        ({"script": "other.py", "flags": flags}, {"norm": "none"}),
        ({"flags": flags}, {"norm": "none"}),  # of an evaluation at the end of another script
        ({"flags": {"lr": 0.25, "set": "val"}}, {"lr": 0.25, "set": "val"}),
        ({"format": 1, "image_size": 3, "flags": {"norm": "none", "map_size": 5}}, {"norm": "none"}),
    ):
        assert vars(parse(record)) == {**DEFAULTS, **expected}


def test_of_a_package_only_the_flags_of_its_model_are_taken(parser, parse):
    """It may come from a stranger, and name files to write. Another record would overwrite its own files."""
    for name in ("json", "out", "statistics", "backbone"):
        parser.add_argument(f"-{name}")
    flags = {"norm": "none", "lr": 0.25, "json": "a", "statistics": "b", "out": "c"}
    default = {**DEFAULTS, **dict.fromkeys(("json", "out", "statistics", "backbone")), "norm": "none"}
    assert vars(parse({"format": 1, "flags": flags})) == default
    assert vars(parse({"script": "train.py", "flags": flags})) == {**default, "lr": 0.25, "statistics": "b"}
    flags["backbone"] = "timm:hf-hub:a/b"
    with pytest.raises(SystemExit):
        parse({"format": 1, "flags": flags})
    assert parse({"format": 1, "flags": flags}, "-config", "FILE", "-backbone", "conv4").backbone == "conv4"
    assert parse({"script": "train.py", "flags": flags}).backbone == "timm:hf-hub:a/b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sede": 1}, "there is no flag -sede; the nearest is -seed"),
        ({"zzzz": 1}, "there is no flag -zzzz; the nearest is -"),
        ({"help": True}, "there is no flag -help"),
        ({"config": "other.json"}, "there is no flag -config"),
        ({"lr": 7}, "-lr: '7' is not a number from 0 to 1"),
        ({"lr": "x"}, "-lr: 'x' is not a number from 0 to 1"),
        ({"lr": True}, "-lr: true is not a value"),
        ({"lr": {}}, "-lr: {} is not a value"),
        ({"lr": [0.1, 0.2]}, "is not a number"),
        ({"lr": float("nan")}, "is not a number"),
        ({"norm": "nothing"}, "-norm: 'nothing' is unknown; choose from none, center"),
        ({"fast": "yes"}, '-fast: "yes" is not true or false'),
        ({"flags": {"lr": 7}}, "-lr: '7' is not a number from 0 to 1"),
        ([1], "is damaged, or not flags (TypeError: it must be an object"),
        ("", "is damaged, or not flags"),
        ("{", "is damaged, or not flags"),
        ("[" * 100_000, "is damaged, or not flags"),
    ],
)
def test_other_files_are_refused(parse, capsys, content, message):
    with pytest.raises(SystemExit) as end:
        parse(content)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert message in line
    assert line.endswith("(see train.py -h)")


def test_a_file_that_is_not_there_is_named(parse, capsys):
    for words, message in (
        (["-config", "nowhere.json"], "cannot read flags from nowhere.json"),
        (["-config"], "expected one"),
    ):
        with pytest.raises(SystemExit):
            parse({}, *words)
        assert message in capsys.readouterr().err


def test_a_command_takes_its_own_flags(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text('{"lr": 3, "sizes": "1"}')
    parser = make_parser("test")
    commands = parser.add_subparsers(dest="command")
    added = commands.add_parser("curves")
    added.add_argument("files", nargs="+")
    added.add_argument("-lr", type=int)
    added.add_argument("-sizes", type=whole_numbers)
    for words in (["-config", str(path), "curves", "a", "b"], ["curves", "a", "b", "-config", str(path)]):
        args = parser.parse_args(words)
        assert (args.lr, args.sizes, args.files) == (3, (1,), ["a", "b"])
    with pytest.raises(SystemExit) as end:  # a command is missing
        parser.parse_args(["-config", str(path), "a"])
    assert end.value.code == 2


@pytest.mark.parametrize("script", sorted(SCRIPTS | (BENCHMARKS & {"benchmarks.heads"})))
def test_every_script_takes_a_file(script, tmp_path, capsys, monkeypatch):
    path = Path(tmp_path, "flags.json")
    path.write_text('{"temperatur": 3}')
    module = importlib.import_module(script)
    words = ["episode"] if script == "visualize" else []
    with pytest.raises(SystemExit):
        module.build_parser().parse_args([*words, "-config", str(path)])
    assert "there is no flag -temperatur; the nearest is -temperature" in capsys.readouterr().err


def test_a_flag_that_is_required_may_come_from_the_file(parser, tmp_path):
    parser.add_argument("-out", required=True)
    (tmp_path / "flags.json").write_text('{"out": "there"}')
    assert parser.parse_args(["-config", str(tmp_path / "flags.json")]).out == "there"
    with pytest.raises(SystemExit):
        parser.parse_args([])
