"""The flags of the model, and the model they ask for."""

import argparse
from collections.abc import Sequence

import torch

from Models.deepemd import DeepEMD
from Models.emd import SOLVERS, EmdError, emd
from Models.emd.forms import FORMS
from Models.emd.simplex import GRADIENTS
from Models.encoder import AMP
from Models.heads import HEADS, takes_solver
from Models.matching import METRICS, NORMS
from Models.sfc import KSHOT
from Models.weights import load_encoder_weights
from utils import InputError, number_above_zero, number_at_least, status, whole_numbers


def add_model_arguments(parser: argparse.ArgumentParser, *, sfc_lr: float = 0.1) -> None:
    """The flags that :func:`build_model` reads. ``sfc_lr`` is the script's default."""
    count, rate = number_at_least(1, int), number_above_zero(float)

    group = parser.add_argument_group("head")
    group.add_argument("-head", choices=HEADS, default="deepemd", help="how queries are compared with prototypes")
    group.add_argument("-temperature", type=rate, default=12.5, help="scale of the logits; proto has none")
    group.add_argument("-metric", choices=METRICS, default="cosine", help="deepemd: similarity of two nodes")
    norms = "deepemd: what is done to nodes before they are compared; other heads take them as they are"
    group.add_argument("-norm", choices=NORMS, default="center", help=norms)
    group.add_argument(
        "-feature_pyramid",
        type=whole_numbers,
        metavar="SIZES",
        help="fcn only: sizes of further maps that the feature map is pooled to, as in 2,1 (default: none)",
    )

    group = parser.add_argument_group("solver of the optimal transport, for -head deepemd; other heads ignore it")
    summaries = "; ".join(f"{name}: {solver.summary}" for name, solver in SOLVERS.items())
    group.add_argument("-solver", choices=SOLVERS, default="opencv", help=summaries)
    group.add_argument("-form", choices=FORMS, default="L2", help="form of the quadratic program of qpth and ipm")
    group.add_argument("-l2_strength", type=rate, default=1e-6, help="weight of the quadratic term of form L2")
    gradients = "; ".join(f"{name}: {what}" for name, what in GRADIENTS.items())
    group.add_argument("-emd_gradient", choices=GRADIENTS, default="full", help=f"gradient of simplex: {gradients}")

    group = parser.add_argument_group("prototypes, for -shot above 1")
    kshots = "; ".join(f"{name}: {what}" for name, what in KSHOT.items())
    group.add_argument("-kshot", choices=KSHOT, default="sfc", help=kshots)
    group.add_argument("-sfc_lr", type=rate, default=sfc_lr, help="sfc: learning rate")
    group.add_argument("-sfc_wd", type=number_at_least(0, float), default=0.0, help="sfc: weight decay")
    group.add_argument("-sfc_update_step", type=count, default=100, help="sfc: passes over the support images")
    group.add_argument("-sfc_bs", type=count, default=4, help="sfc: support images per step")

    group = parser.add_argument_group("encoder")
    group.add_argument("-amp", choices=AMP, default="off", help="number format of the convolutions")
    group.add_argument("-compile", action="store_true", help="run the encoder through torch.compile; one device only")
    group.add_argument(
        "-checkpoint_activations",
        action="store_true",
        help="in training, compute the encoder's activations twice instead of keeping them: less memory, more time",
    )


def build_model(args: argparse.Namespace, *, device_ids: Sequence[int] = (), **statistics: Sequence[float]) -> DeepEMD:
    """The model that the flags of :func:`add_model_arguments` ask for; ``statistics`` are the ``mean`` and ``std`` of its pixels.

    Raises:
        InputError: flags that do not go together.
        EmdError: a solver that the flags name cannot be used here.
    """
    if args.feature_pyramid and args.deepemd != "fcn":
        raise InputError(
            f"-feature_pyramid goes with -deepemd fcn; got -deepemd {args.deepemd}, whose nodes are patches"
        )
    if args.compile and args.checkpoint_activations:
        raise InputError("-compile and -checkpoint_activations do not go together; leave one out")
    if args.compile and len(device_ids) > 1:
        raise InputError(f"-compile works on one GPU; got -gpu {args.gpu}. Name one GPU, or leave -compile out")
    if takes_solver(args.head):
        for solver in {args.solver, vars(args).get("val_solver", args.solver)}:
            check_solver(solver)
    return DeepEMD(
        feature_pyramid=args.feature_pyramid,
        head=args.head,
        temperature=args.temperature,
        metric=args.metric,
        norm=args.norm,
        solver=args.solver,
        form=args.form,
        l2_strength=args.l2_strength,
        emd_gradient=args.emd_gradient,
        kshot=args.kshot,
        sfc_lr=args.sfc_lr,
        sfc_wd=args.sfc_wd,
        sfc_update_step=args.sfc_update_step,
        sfc_bs=args.sfc_bs,
        **statistics,
        amp=args.amp,
        compiled=args.compile,
        checkpoint_activations=args.checkpoint_activations,
        device_ids=device_ids,
    )


def open_model(
    args: argparse.Namespace, *, device: torch.device, device_ids: Sequence[int], **statistics: Sequence[float]
) -> tuple[DeepEMD, str]:
    """The model that the flags ask for with the weights of ``-model_dir``, and what those are: a path, or "none".

    Raises:
        InputError: flags that do not go together, or weights that cannot be loaded.
        EmdError: as :func:`build_model`.
    """
    model = build_model(args, device_ids=device_ids, **statistics).to(device)
    weights = args.model_dir or f"deepemd_trained_model/{args.dataset}/{args.deepemd}/max_acc.pth"
    status(f"weights: {weights}")
    if weights != "none":
        load_encoder_weights(model, weights, hint="Name yours with -model_dir, or run: bash download_trained_model.sh")
    return model, weights


def check_solver(solver: str) -> None:
    """Solve one small problem, so that a missing or broken library is reported before the run.

    Raises:
        EmdError: the solver cannot be used here.
    """
    one = torch.ones(2)
    try:
        emd(torch.eye(2), one, one, solver=solver)
    except EmdError:
        raise
    except Exception as error:  # a library that is there and does not work says so in its own ways
        raise InputError(f"-solver {solver} does not work here ({type(error).__name__}: {error})") from error
