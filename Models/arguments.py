"""The flags of the model, and the model that they describe."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from Models.deepemd import DeepEMD
from Models.emd import SOLVERS, EmdError, emd, set_threads
from Models.emd.forms import FORMS
from Models.emd.simplex import GRADIENTS
from Models.encoder import AMP
from Models.heads import HEADS, HeadSettings
from Models.matching import METRICS, NORMS
from Models.package import is_package, locate, read_config, weights_file
from Models.sfc import KSHOT
from Models.weights import load_encoder_weights
from utils import InputError, available_cores, number_between, status, whole_numbers

# The flags that are arguments of DeepEMD by the same name.
OF_DEEPEMD = (
    *("feature_pyramid", "head", "temperature", "metric", "norm", "solver", "form", "l2_strength", "emd_gradient"),
    *("kshot", "sfc_lr", "sfc_wd", "sfc_update_step", "sfc_bs", "amp", "checkpoint_activations"),
)


def _choice(what: str, text: str) -> str:
    """An argparse type: a key of HEADS or SOLVERS, which may carry options, as in ``ipm:form=QP,l2_strength=0.1``."""
    try:
        settings = HeadSettings(**{what: text})
        if settings.solver_options:
            check_solver(settings)  # the solver itself knows which values its options have
    except (EmdError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


head_choice, solver_choice = partial(_choice, "head"), partial(_choice, "solver")


def add_model_arguments(parser: argparse.ArgumentParser, *, sfc_lr: float = 0.1) -> None:
    """The flags that :func:`build_model` reads. ``sfc_lr`` is the script's default."""
    # Beyond these bounds, float32 overflows or a run is silent for hours.
    rate, decay = number_between(1e-12, 1e6, float), number_between(0, 1e6, float)
    count, threads = number_between(1, 10_000, int), number_between(1, 1024, int)
    named = {"metavar": "NAME[:OPTION=VALUE,...]"}

    group = parser.add_argument_group("head")
    heads = f"how queries are compared with prototypes. {_rows(HEADS)}"
    group.add_argument("-head", type=head_choice, default="deepemd", help=heads, **named)
    group.add_argument("-temperature", type=rate, default=12.5, help="scale of the logits; proto has none")
    group.add_argument("-metric", choices=METRICS, default="cosine", help="deepemd: similarity of two nodes")
    norms = "deepemd: what is done to nodes before they are compared; other heads do not change them"
    group.add_argument("-norm", choices=NORMS, default="center", help=norms)
    sizes = "fcn only: sizes of further maps that the feature map is pooled to, as in 2,1 (default: none)"
    group.add_argument("-feature_pyramid", type=whole_numbers, metavar="SIZES", help=sizes)

    group = parser.add_argument_group("solver of the optimal transport, for -head deepemd; other heads ignore it")
    group.add_argument("-solver", type=solver_choice, default="opencv", help=_rows(SOLVERS), **named)
    group.add_argument("-form", choices=FORMS, default="L2", help="form of the quadratic program of qpth and ipm")
    group.add_argument("-l2_strength", type=rate, default=1e-6, help="weight of the quadratic term of form L2")
    gradients = f"gradient of simplex: {_words(GRADIENTS)}"
    group.add_argument("-emd_gradient", choices=GRADIENTS, default="full", help=gradients)
    cores = "threads of the solvers on the CPU (default: this process's share of the cores)"
    group.add_argument("-solver_threads", type=threads, help=cores)

    group = parser.add_argument_group("prototypes, for -shot above 1")
    group.add_argument("-kshot", choices=KSHOT, default="sfc", help=_words(KSHOT))
    group.add_argument("-sfc_lr", type=rate, default=sfc_lr, help="sfc: learning rate")
    group.add_argument("-sfc_wd", type=decay, default=0.0, help="sfc: weight decay")
    group.add_argument("-sfc_update_step", type=count, default=100, help="sfc: passes over the support images")
    group.add_argument("-sfc_bs", type=count, default=4, help="sfc: support images per step")

    group = parser.add_argument_group("encoder")
    group.add_argument("-amp", choices=AMP, default="off", help="number format of the convolutions")
    group.add_argument("-compile", action="store_true", help="run the encoder through torch.compile; one device only")
    less = "in training, compute the encoder's activations twice instead of keeping them: less memory, more time"
    group.add_argument("-checkpoint_activations", action="store_true", help=less)


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag that :func:`open_model` reads beside those of :func:`add_model_arguments`."""
    text = "weights: a checkpoint, the folder of a run or of a package (export.py), hf://owner/name[@revision], "
    text += 'https://...#sha256=..., or "none" for random ones (default: deepemd_trained_model/<dataset>/<deepemd>/max_acc.pth)'
    action = parser.add_argument_group("weights").add_argument("-model_dir", metavar="SOURCE", help=text)
    action.locate = locate  # for engine.weights_flags, which finds the flags beside them


def build_model(
    args: argparse.Namespace, *, device_ids: Sequence[int] = (), val_solver: str | None = None, **statistics: Any
) -> DeepEMD:
    """The model that the flags of :func:`add_model_arguments` describe; also sets the threads of the solvers.

    ``device_ids``, and ``mean`` and ``std`` of the pixels, are for :class:`Models.deepemd.DeepEMD`. ``val_solver`` is a second
    solver of the script. InputError for flags that exclude each other, EmdError for a solver that cannot be used here.
    """
    if args.feature_pyramid and args.deepemd != "fcn":
        raise InputError(f"-feature_pyramid requires -deepemd fcn; with -deepemd {args.deepemd}, the nodes are patches")
    if args.compile and args.checkpoint_activations:
        raise InputError("-compile and -checkpoint_activations exclude each other")
    if args.compile and len(device_ids) > 1:
        raise InputError(f"-compile works on one GPU. Name one with -gpu instead of {args.gpu}, or leave -compile out")
    settings = {name: getattr(args, name) for name in OF_DEEPEMD}
    model = DeepEMD(**settings, **statistics, compiled=args.compile, device_ids=device_ids)
    edge, size = args.image_size // model.encoder.stride, max(model.feature_pyramid, default=0)
    if size > edge:
        maps = f"the feature map, which is {edge} x {edge} for -image_size {args.image_size}"
        raise InputError(f"-feature_pyramid {size} is larger than {maps}")
    if model.settings.uses_solver:
        for solver in {args.solver, val_solver or args.solver}:
            check_solver(model.settings.with_solver(solver, model.solver_options))
    set_threads(args.solver_threads or available_cores())
    return model


def open_model(
    args: argparse.Namespace, *, device: torch.device, device_ids: Sequence[int], **statistics: Any
) -> tuple[DeepEMD, str]:
    """The model of :func:`build_model` with the weights of ``-model_dir``, and what those are: a path, or "none".

    A package brings the ``mean`` and ``std`` of its pixels, and the statistics of its base classes. InputError for weights
    that cannot be loaded, and errors as for :func:`build_model`.
    """
    source = args.model_dir or f"deepemd_trained_model/{args.dataset}/{args.deepemd}/max_acc.pth"
    weights = weights_file(source) if source != "none" else None
    if weights and is_package(weights):
        config = read_config(weights)
        statistics = {"mean": config["mean"], "std": config["std"]}
    model = build_model(args, device_ids=device_ids, **statistics).to(device)
    status(f"weights: {source}" + (f" ({weights})" if "://" in source else ""))
    if not weights:
        return model, source
    hint = "Set -model_dir, or download the published weights: bash download_trained_model.sh"
    load_encoder_weights(model, weights, hint=hint)
    return model, str(weights)


def check_solver(settings: HeadSettings) -> None:
    """Solve one small problem, so that a missing or broken library, or a bad option, is an error before the run."""
    one = torch.ones(2)
    try:
        emd(torch.eye(2), one, one, solver=settings.solver, **settings.solver_options)
    except EmdError:
        raise
    except Exception as error:  # an installed library that does not work fails in its own ways
        fault = f"{type(error).__name__}: {error}"
        raise InputError(f"-solver {settings.solver} does not work here ({fault})") from error


def _words(choices: dict[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in choices.items())


def _rows(table: dict[str, Any]) -> str:
    """The rows of HEADS or SOLVERS for a help text: what each is, and its options."""
    described = {}
    for name, row in table.items():
        options = ", ".join(f"{option}={default}" for option, default in row.options.items())
        described[name] = row.summary + (f" (options: {options})" if options else "")
    return _words(described)
