"""Flags that are taken from the run that trained the weights."""

import argparse
import json
from pathlib import Path

import pytest

from dataloader.arguments import add_data_arguments
from engine.command_line import make_parser
from engine.weights_flags import adopt_trained_flags, as_words
from Models.arguments import add_model_arguments, add_weights_arguments
from Models.package import find_record
from utils import InputError

TRAINED = {"dataset": "fc100", "image_size": 32, "deepemd": "fcn", "feature_pyramid": [2, 1], "head": "knn"}
TRAINED |= {"temperature": 5.0, "norm": "none", "kshot": "mean", "patch_list": [2, 3], "way": 20}
TRAINED |= {"sfc_lr": 0.1, "lr": 0.0005}


def build_parser(*, has_commands=False):
    parser = make_parser("test")
    if has_commands:
        parser.add_argument("-shape", choices={"round": 1})
        commands = parser.add_subparsers(dest="command")
        commands.add_parser("other")
        parser, whole = commands.add_parser("pair"), parser
    add_weights_arguments(parser)
    parser.add_argument("-way", type=int, default=5)
    add_data_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    return whole if has_commands else parser


def adopt(*argv, **settings):
    parser = build_parser()
    args = parser.parse_args(argv)
    adopt_trained_flags(parser, args, argv, **settings)
    return args


@pytest.fixture
def folder(tmp_path) -> str:
    (tmp_path / "run.json").write_text(json.dumps({"script": "train_meta.py", "flags": TRAINED}))
    (tmp_path / "max_acc.pth").write_bytes(b"")
    return str(tmp_path)


@pytest.mark.parametrize("file", ["", "/max_acc.pth", "/epoch-3.pth"])
def test_flags_that_are_not_given_are_those_of_the_weights(folder, file, capsys):
    args = adopt("-model_dir", folder + file)
    for name in ("dataset", "image_size", "head", "temperature", "norm", "kshot"):
        assert getattr(args, name) == TRAINED[name]
    assert (args.feature_pyramid, args.patch_list) == ((2, 1), (2, 3))
    assert (args.way, args.sfc_lr) == (5, 100.0)  # the protocol of an evaluation, and defaults of its own
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"flags of the run that trained the weights ({folder}/run.json): -dataset fc100 -image_size 32 -feature_pyramid 2,1 "
        "-head knn -temperature 5.0 -norm none -kshot mean"
    )


@pytest.mark.parametrize("size", [["-image_size", "84"], ["-image_size=84"]])
def test_given_flags_are_kept_with_a_warning(folder, capsys, size):
    """Also if the value given is the default."""
    given = ["-dataset", "fc100", "-head", "knn", "-temperature", "5", "-norm", "center", "-kshot", "mean"]
    args = adopt("-model_dir", folder, *size, *given, "-feature_pyramid", "2,1")
    assert (args.image_size, args.norm) == (84, "center")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: -image_size 84 -norm center differs from the run that trained the weights "
        f"({folder}/run.json): -image_size 32 -norm none"
    )


def test_flags_of_another_view_are_left_alone(folder, capsys):
    """A pyramid would be refused with patches."""
    args = adopt("-model_dir", folder, "-deepemd", "grid", "-patch_list", "5")
    assert (args.feature_pyramid, args.patch_list, args.image_size) == (None, (5,), 32)
    assert "-deepemd grid differs" in capsys.readouterr().err


def test_flags_can_be_ignored(folder):
    args = adopt("-model_dir", folder, ignore=("head", "kshot"))
    assert (args.head, args.kshot, args.image_size) == ("deepemd", "sfc", 32)


def test_flags_of_a_command(folder):
    parser = build_parser(has_commands=True)
    argv = ["pair", "-model_dir", folder, "-temperature", "3"]
    args = parser.parse_args(argv)
    adopt_trained_flags(parser, args, argv)
    assert (args.image_size, args.temperature) == (32, 3)


def test_the_command_line_of_this_process_is_the_default(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", "-model_dir", folder, "-image_size", "64"])
    parser = build_parser()
    args = parser.parse_args()
    adopt_trained_flags(parser, args, None)
    assert (args.image_size, args.dataset) == (64, "fc100")


@pytest.mark.parametrize("weights", [[], ["-model_dir", "none"], ["-model_dir", "elsewhere/max_acc.pth"]])
def test_other_weights_are_used_as_before(folder, monkeypatch, capsys, weights):
    """Without weights, and with published ones, which have no record; a run.json in the working folder is none."""
    monkeypatch.chdir(folder)
    Path("elsewhere").mkdir()
    parser = build_parser()
    assert adopt(*weights) == parser.parse_args(weights)
    assert capsys.readouterr().err == ""


def test_records_of_earlier_versions_lack_flags(folder, capsys):
    Path(folder, "run.json").write_text('{"flags": {"image_size": 32}}')
    args = adopt("-model_dir", folder)
    assert args == argparse.Namespace(**{**vars(adopt("-model_dir", "none")), "model_dir": folder, "image_size": 32})


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"flags": []}', '{"flags": 3}', '{"flags": null}', "{}", '{"flags": {"image_size": 32']
    + [
        json.dumps({"flags": {"temperature": 3.0, **wrong}})
        for wrong in (
            {"image_size": 10**9},
            {"image_size": "large"},
            {"image_size": True},
            {"image_size": {}},
            {"head": "unknown"},
            {"norm": "unknown"},
            {"temperature": -1},
            {"temperature": float("nan")},
            {"feature_pyramid": [0]},
            {"feature_pyramid": "abc"},
            {"patch_list": [[2]]},
        )
    ],
)
def test_a_damaged_record_is_ignored_with_a_warning(folder, capsys, content):
    Path(folder, "run.json").write_text(content)
    assert vars(adopt("-model_dir", folder)) == {**vars(adopt("-model_dir", "none")), "model_dir": folder}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder}/run.json is damaged, or not the flags of a run")


def test_a_record_that_is_a_folder_is_ignored_with_a_warning(folder, capsys):
    record = Path(folder, "run.json")
    record.unlink(missing_ok=True)
    record.mkdir()
    adopt("-model_dir", folder)
    record.rmdir()
    assert "cannot read the flags of a run" in capsys.readouterr().err


@pytest.fixture
def package(tmp_path) -> str:
    package = tmp_path / "package"
    package.mkdir()
    write_config(package, TRAINED)
    (package / "model.safetensors").write_bytes(b"")
    return str(package)


def write_config(package: str | Path, flags: object) -> None:
    config = {"format": 1, "backbone": "resnet12", "mean": [0, 0, 0], "std": [1, 1, 1], "results": []}
    Path(package, "config.json").write_text(json.dumps({**config, "flags": flags, "weights": {"sha256": "0" * 64}}))


@pytest.mark.parametrize("file", ["", "/model.safetensors"])
def test_flags_of_a_package_are_taken(package, file, capsys):
    args = adopt("-model_dir", package + file, "-head", "fusion")
    found = (args.image_size, args.norm, args.feature_pyramid, args.head, args.sfc_lr)
    assert found == (32, "none", (2, 1), "fusion", 100)
    adopted, differing = capsys.readouterr().err.splitlines()
    assert adopted.startswith(f"flags of the package ({package}/config.json): -dataset fc100 -image_size 32")
    assert differing == f"warning: -head fusion differs from the package ({package}/config.json): -head knn"


@pytest.mark.parametrize("flags", [3, None, [], {"image_size": "large"}, {"image_size": 0}, {"backbone": "conv4"}])
def test_a_damaged_package_is_refused(package, flags):
    write_config(package, flags)
    with pytest.raises(InputError, match="is damaged, or not the description of a package|cannot be used: -image_size"):
        adopt("-model_dir", package)


@pytest.mark.parametrize("name", ["timm:hf-hub:a/b", "timm:hf_hub:a/b", "timm:local-dir:/etc"])
def test_a_package_may_not_name_a_network_at_another_place(package, name):
    """Unless it is given: the Hub is not asked for it, and no folder is read."""
    flags = {**TRAINED, "backbone": name}
    config = json.loads(Path(package, "config.json").read_text())
    Path(package, "config.json").write_text(json.dumps({**config, "backbone": name, "flags": flags}))
    with pytest.raises(InputError, match="is at another place. If you trust it, give it on the command line"):
        adopt("-model_dir", package)
    assert adopt("-model_dir", package, "-backbone", "conv4").backbone == "conv4"


def test_a_run_beside_a_package_is_preferred(package):
    Path(package, "max_acc.pth").write_bytes(b"")
    assert adopt("-model_dir", package).image_size == 84
    assert adopt("-model_dir", f"{package}/model.safetensors").image_size == 32


def test_a_source_is_looked_up_where_its_flag_says(package, capsys):
    parser = build_parser()
    _, flags = find_record(package)
    parser.actions([])["model_dir"].record = {"hf://me/mine": (Path(package, "config.json"), flags)}.get
    argv = ["-model_dir", "hf://me/mine"]
    args = parser.parse_args(argv)
    adopt_trained_flags(parser, args, argv)
    assert (args.image_size, args.model_dir) == (32, "hf://me/mine")
    assert "flags of the package (hf://me/mine): " in capsys.readouterr().err


def test_flags_of_a_config_file_are_given_flags(package, tmp_path, capsys):
    (tmp_path / "flags.json").write_text('{"image_size": 64}')
    assert adopt("-model_dir", package, "-config", str(tmp_path / "flags.json")).image_size == 64
    assert "warning: -image_size 64 differs" in capsys.readouterr().err


def test_defaults_that_depend_on_other_flags_follow_them(package):
    """The parser's own defaults stay, and so does what a script has set since."""
    parser = build_parser()
    parser.completions.append(lambda args: vars(args).update(num_patch=3 if args.norm == "none" else 9))
    argv = ["-model_dir", package]
    args = parser.parse_args(argv)
    args.seed = 77
    adopt_trained_flags(parser, args, argv)
    assert (args.num_patch, args.norm, args.seed) == (3, "none", 77)
    assert (parser.parse_args([]).norm, parser.parse_args([]).image_size) == ("center", 84)


def test_flags_as_words():
    flags = {"sizes": (2, 1), "rate": 0.5, "compile": True, "amp": False, "gpu": None, "levels": [3], "map_size": 0}
    assert as_words(flags) == "-sizes 2,1 -rate 0.5 -compile no -amp no -gpu -levels 3 -map_size 0"
