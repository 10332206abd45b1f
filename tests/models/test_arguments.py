"""The flags of the model: what they take, what they refuse, and the model that comes of them."""

import argparse
import sys

import pytest
import torch

from engine.command_line import make_parser
from Models import arguments
from Models.arguments import add_model_arguments, add_weights_arguments, build_model, open_model, solver_choice
from Models.emd import SOLVERS, MissingLibraryError, SolverError, on_cpu, simplex
from Models.heads import HEADS
from utils import InputError, available_cores


def parse(*flags: str, **defaults: object) -> argparse.Namespace:
    parser = make_parser("test")
    add_model_arguments(parser)
    add_weights_arguments(parser)
    args = parser.parse_args(flags)
    return argparse.Namespace(**{"deepemd": "fcn", "image_size": 84, "dataset": "cub", **defaults, **vars(args)})


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The threads of the solvers are a setting of the process."""
    monkeypatch.setattr(on_cpu, "_threads", None)


def test_defaults_are_the_published_ones():
    model = build_model(parse())
    assert model.settings.head == "deepemd"
    assert (model.settings.solver, model.settings.solver_options) == ("opencv", {})
    assert (model.sfc.lr, model.sfc.weight_decay, model.sfc.steps, model.sfc.batch_size) == (0.1, 0.0, 100, 4)
    assert model.kshot == "sfc"
    assert model.feature_pyramid == ()


def test_options_of_heads_and_solvers_are_kept_as_given():
    args = parse("-head", "knn:k=3", "-solver", "ipm:form=QP", "-form", "L2", "-l2_strength", "0.1", "-kshot", "mean")
    assert (args.head, args.solver) == ("knn:k=3", "ipm:form=QP")
    model = build_model(args)
    assert model.settings.head_options == {"k": 3}
    assert model.settings.solver_options.items() >= {"form": "QP", "l2_strength": 0.1}.items()  # the option wins
    assert model.kshot == "mean"


@pytest.mark.parametrize("solver", SOLVERS)
def test_older_flags_reach_the_solvers_that_have_such_an_option(solver):
    args = parse("-head", "proto", "-solver", solver, "-form", "QP", "-l2_strength", "0.1", "-emd_gradient", "cost")
    given = {"form": "QP", "l2_strength": 0.1, "gradient": "cost"}
    expected = {option: value for option, value in given.items() if option in SOLVERS[solver].options}
    assert build_model(args).settings.solver_options == expected


HUGE = "9" * 400


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-head dot", f"unknown head 'dot'; choose one of {', '.join(HEADS)}"),
        ("-head knn:q=3", "head knn has no option 'q'; its options are: k"),
        ("-head knn:k=0", "k must be a whole number of 1 or more; got '0'"),
        (f"-head knn:k={HUGE}{HUGE * 12}", "k must be a whole number of 1 or more; got '999"),
        ("-head proto:k=3", "head proto has no option 'k'; its options are: none"),
        ("-solver glpk", f"unknown solver 'glpk'; choose one of {', '.join(SOLVERS)}"),
        ("-solver opencv:form=L2", "solver opencv has no option 'form'"),
        ("-solver ipm:forms=L2", "solver ipm has no option 'forms'; its options are: form, l2_strength"),
        ("-solver ipm:form=LP", "L2, QP"),
        ("-solver ipm:l2_strength=-1", "l2_strength"),
        ("-solver ipm:l2_strength=much", "solver ipm: l2_strength must be a number; got 'much'"),
        ("-solver ipm:l2_strength=nan", "l2_strength must be above 0; it is nan"),
        ("-solver ipm:differentiable_flow=1", "differentiable_flow must be true or false; got '1'"),
        ("-solver simplex:gradient=half", "full, cost"),
        ("-solver simplex:", "solver simplex has no option ''"),
        *((f"-temperature {value}", "a number from") for value in ("0", "-1", "nan", "inf", "1e300", HUGE)),
        *((f"-l2_strength {value}", "a number from") for value in ("0", "1e300")),
        *((f"-sfc_lr {value}", "a number from") for value in ("0", "1e39", "inf")),
        *((f"-sfc_wd {value}", "a number from") for value in ("-1", "1e39", "nan")),
        *((f"-sfc_update_step {value}", "a whole number from 1 to") for value in ("0", "1.5", "1000000", HUGE)),
        *((f"-sfc_bs {value}", "a whole number from 1 to") for value in ("0", "1e3", "1000000", HUGE)),
        *((f"-solver_threads {value}", "a whole number from 1 to") for value in ("0", "1000000", HUGE)),
        *((f"-feature_pyramid {value}", "whole numbers above 0") for value in ("0", "2,,1", "-1", HUGE)),
    ],
)
def test_bad_values_are_refused_in_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        parse(*flags.split())
    found = capsys.readouterr().err
    assert end.value.code == 2
    assert message in found
    assert found.count("\n") == 1


@pytest.mark.parametrize(
    "flags", ["-solver qpth", "-solver ipm -emd_gradient cost", "-head knn:k=100 -sfc_update_step 10000"]
)
def test_good_values_are_taken(flags):
    parse(*flags.split())


@pytest.mark.parametrize(
    ("flags", "place", "message"),
    [
        ("-feature_pyramid 2,1", {"deepemd": "grid"}, "-feature_pyramid requires -deepemd fcn; with -deepemd grid,"),
        ("-feature_pyramid 2,6", {}, "-feature_pyramid 6 is larger than the feature map, which is 5 x 5 for -image_size 84"),
        ("-feature_pyramid 999999", {"image_size": 1024}, "which is 64 x 64 for -image_size 1024"),
        ("-feature_pyramid 2", {"image_size": 16}, "which is 1 x 1 for -image_size 16"),
        ("-compile -checkpoint_activations", {}, "-compile and -checkpoint_activations exclude each other"),
        ("-model_dir nowhere", {}, "no checkpoint at nowhere. Set -model_dir, download the published weights (bash "),
        ("", {}, "no checkpoint at deepemd_trained_model/cub/fcn/max_acc.pth. Set -model_dir, download the published weights "
         "(bash download_trained_model.sh), or use a pretrained network instead, which is downloaded once: -backbone timm:"),
    ],
)  # fmt: skip
def test_flags_that_exclude_each_other_are_refused(tmp_path, monkeypatch, flags, place, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        open_model(parse(*flags.split(), **place), device=torch.device("cpu"), device_ids=())
    assert message in str(error.value)


@pytest.mark.parametrize("flags", ["-map_size 7", "-backbone_layer -2", "-backbone_weights none -map_size 21"])
def test_flags_beside_a_checkpoint_are_checked_when_its_backbone_is_known(flags):
    args = parse("-model_dir", "checkpoint/of/another/backbone", *flags.split())
    with pytest.raises(InputError, match=r"-map_size \d+ is larger than|-backbone_layer is for timm"):
        build_model(args)


def test_a_pyramid_may_be_as_large_as_the_map():
    assert build_model(parse("-feature_pyramid", "5,2,1")).feature_pyramid == (5, 2, 1)


def test_random_weights_have_the_statistics_of_the_data():
    model, weights = open_model(
        parse("-model_dir", "none"), device=torch.device("cpu"), device_ids=(), mean=(0.1, 0.2, 0.3)
    )
    assert weights == "none"
    assert model.encoder.mean == (0.1, 0.2, 0.3)


def test_solvers_have_the_threads_of_the_flag_or_all_cores():
    build_model(parse("-solver_threads", "3"))
    assert on_cpu._threads == 3
    build_model(parse())
    assert on_cpu._threads == available_cores()


def test_a_missing_library_is_reported_before_the_run(monkeypatch):
    for name in ("qpth", "qpth.qp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError):
        build_model(parse("-solver", "qpth"))
    with pytest.raises(MissingLibraryError):
        build_model(parse(), val_solver="qpth")
    with pytest.raises(argparse.ArgumentTypeError, match="needs qpth: pip install qpth"):
        solver_choice("qpth:form=QP")
    build_model(parse("-solver", "qpth", "-head", "cosine"), val_solver="qpth")  # which has no solver


def test_opencv_starts_without_numba(monkeypatch):
    monkeypatch.setattr(simplex, "_kernel", lambda: pytest.fail("compiled"))
    build_model(parse("-solver", "opencv"))


def test_a_solver_that_does_not_work_is_reported_before_the_run(monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(arguments, "emd", fail)
    error = OSError("libc is too old")
    with pytest.raises(InputError, match="-solver opencv does not work here .OSError: libc is too old"):
        build_model(parse())
    error = SolverError("no")
    with pytest.raises(argparse.ArgumentTypeError, match="no"):
        solver_choice("ipm:form=QP")
