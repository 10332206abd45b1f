"""The flags of the model, and the model that they describe."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from Models.backbones import BACKBONES, backbone_class, make_encoder, plan_backbone
from Models.deepemd import DeepEMD
from Models.emd import SOLVERS, EmdError, emd, set_threads
from Models.emd.forms import FORMS
from Models.emd.simplex import GRADIENTS
from Models.encoder import AMP, Encoder, NoEncoder, Plan
from Models.heads import HEADS, HeadSettings
from Models.matching import METRICS, NORMS, WEIGHTS
from Models.package import find_record, is_package, read_config, weights_file
from Models.sfc import KSHOT
from Models.statistics import OF_STATISTICS
from Models.weights import load_encoder_weights
from utils import STATISTICS_FILE, InputError, available_cores, check_node_count, number_between, status, whole_numbers

# The flags that are arguments of DeepEMD by the same name.
OF_DEEPEMD = (
    *("map_size", "feature_pyramid", "head", "temperature", "metric", "norm", "weights", "weight_power"),
    *("solver", "form", "l2_strength", "emd_gradient"),
    *("kshot", "sfc_lr", "sfc_wd", "sfc_update_step", "sfc_bs"),
)
# In spaces where the deviations of all channels are alike, the rate for raw features overshoots.
SCALED_SFC_LR = 0.1


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
    group.add_argument("-metric", choices=METRICS, default="cosine", help="deepemd, chamfer: similarity of two nodes")
    norms = f"what is done to nodes before they are compared. {_words(NORMS)}. center changes only deepemd and chamfer"
    group.add_argument("-norm", choices=NORMS, default="center", help=norms)
    source = "norm base and standard: a file of statistics, or a folder of images (at any depth, not those that are classified) "
    source += f"to compute them from (default: {STATISTICS_FILE} beside the weights, else 20 images per training class)"
    group.add_argument("-statistics", metavar="FOLDER|FILE", help=source)
    weights = f"deepemd, chamfer: weights of the nodes. {_words(WEIGHTS)}"
    group.add_argument("-weights", choices=WEIGHTS, default="cross", help=weights)
    power = "weights cross: power that they are raised to"
    group.add_argument("-weight_power", type=number_between(0, 10, float), default=1.0, help=power)
    sizes = "fcn only: sizes of further maps that the feature map is pooled to, as in 2,1 (default: none)"
    group.add_argument("-feature_pyramid", type=whole_numbers, metavar="SIZES", help=sizes)

    group = parser.add_argument_group("solver of the optimal transport, for -head deepemd; other heads ignore it")
    group.add_argument("-solver", type=solver_choice, default="opencv", help=_rows(SOLVERS), **named)
    group.add_argument("-form", choices=FORMS, default="L2", help="form of the quadratic program of qpth and ipm")
    group.add_argument("-l2_strength", type=rate, default=1e-6, help="weight of the quadratic term of form L2")
    gradients = f"gradient of simplex: {_words(GRADIENTS)}"
    group.add_argument("-emd_gradient", choices=GRADIENTS, default="full", help=gradients)
    cores = "threads of the solvers on the CPU (default: this process's share of the cores)"
    group.add_argument("-solver_threads", type=threads, metavar="N", help=cores)

    group = parser.add_argument_group("prototypes, for -shot above 1")
    group.add_argument("-kshot", choices=KSHOT, default="sfc", help=_words(KSHOT))
    scaled = "" if sfc_lr == SCALED_SFC_LR else f"; {SCALED_SFC_LR} with -norm base and standard"
    rates = f"sfc: learning rate (default: {sfc_lr}{scaled})"
    group.add_argument("-sfc_lr", type=rate, metavar="N", help=rates)
    group.add_argument("-sfc_wd", type=decay, default=0.0, help="sfc: weight decay")
    group.add_argument("-sfc_update_step", type=count, default=100, help="sfc: passes over the support images")
    group.add_argument("-sfc_bs", type=count, default=4, help="sfc: support images per step")

    group = parser.add_argument_group("encoder")
    shown = {"metavar": "NAME[:MODEL]", "default": "resnet12"}
    summaries = {name: backbone.summary for name, backbone in BACKBONES.items()}
    group.add_argument("-backbone", type=_backbone, help=_words(summaries), **shown)
    layer = "timm: layer whose map is used; -2 is the last but one (default: the last)"
    group.add_argument("-backbone_layer", type=number_between(-1000, 1000, int), metavar="LAYER", help=layer)
    weights = "timm: a file (.pth, .safetensors), hub for the published weights, none for random ones "
    weights += "(default: hub, unless the weights come from a checkpoint of this project)"
    group.add_argument("-backbone_weights", metavar="FILE|hub|none", help=weights)
    cells = "fcn only: pool the map to so many cells along an edge; 0 keeps it (default: 0; timm: 5, or the map's edge)"
    group.add_argument("-map_size", type=number_between(0, 1024, int), metavar="N", help=cells)
    group.add_argument("-amp", choices=AMP, default="off", help="number format of the convolutions")
    group.add_argument("-compile", action="store_true", help="run the encoder through torch.compile; one device only")
    less = "in training, compute the encoder's activations twice instead of keeping them: less memory, more time"
    group.add_argument("-checkpoint_activations", action="store_true", help=less)
    # Before the defaults of other packages, which do not know the backbone.
    parser.completions.insert(0, partial(_complete, sfc_lr=sfc_lr))


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag that :func:`open_model` reads beside those of :func:`add_model_arguments`."""
    text = "weights: a checkpoint, the folder of a run or of a package (export.py), hf://owner/name[@revision], "
    text += 'https://...#sha256=..., or "none" for random ones (default: deepemd_trained_model/<dataset>/<deepemd>/max_acc.pth)'
    action = parser.add_argument_group("weights").add_argument("-model_dir", metavar="SOURCE", help=text)
    action.record = find_record  # for engine.weights_flags, which takes flags from it


def _backbone(text: str) -> str:
    """An argparse type: a row of BACKBONES."""
    try:
        backbone_class(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _plan(args: argparse.Namespace) -> Plan:
    size = getattr(args, "image_size", None)
    given = {"layer": args.backbone_layer, "weights": args.backbone_weights}
    return plan_backbone(args.backbone, image_size=size, **given)


def _complete(args: argparse.Namespace, *, sfc_lr: float) -> None:
    """Fill in the defaults that depend on the backbone and the norm; InputError for sizes that do not fit each other."""
    if args.sfc_lr is None:
        args.sfc_lr = SCALED_SFC_LR if args.norm in OF_STATISTICS else sfc_lr
    if getattr(args, "features", None):  # nodes, which no backbone has to make
        return
    # Beside a checkpoint, whose record may name another backbone, flags are checked when it is opened.
    waits = args.backbone == "resnet12" and getattr(args, "model_dir", None) not in (None, "none")
    plan = plan_backbone(args.backbone, image_size=getattr(args, "image_size", None)) if waits else _plan(args)
    is_given = args.map_size is not None
    for name in ("image_size", "map_size", "interpolation"):
        if name in args and getattr(args, name) is None:
            setattr(args, name, getattr(plan, name))
    if getattr(args, "deepemd", "fcn") != "fcn" and not is_given:
        args.map_size = 0
    if not waits:
        _check_map(args, plan)


def _check_map(args: argparse.Namespace, plan: Plan) -> None:
    """Raise InputError unless the map can be pooled as ``-map_size`` says, to nodes that are not too many."""
    if getattr(args, "deepemd", "fcn") != "fcn":
        if args.map_size:
            raise InputError(f"-map_size requires -deepemd fcn; with -deepemd {args.deepemd}, the nodes are patches")
        return
    if args.map_size > plan.edge:
        where = f"the feature map, which is {plan.edge} x {plan.edge} for -image_size {plan.image_size}"
        raise InputError(f"-map_size {args.map_size} is larger than {where}")
    check_node_count((args.map_size or plan.edge) ** 2)


def build_model(
    args: argparse.Namespace,
    *,
    device_ids: Sequence[int] = (),
    val_solver: str | None = None,
    weights: str | None = None,
    encoder: Encoder | None = None,
    **statistics: Any,
) -> DeepEMD:
    """The model that the flags of :func:`add_model_arguments` describe; also sets the threads of the solvers.

    ``device_ids``, and ``mean`` and ``std`` of the pixels, are for :class:`Models.deepemd.DeepEMD`. ``val_solver`` is a second
    solver of the script. ``weights`` override ``-backbone_weights``. An ``encoder`` overrides all flags of the encoder, and with
    ``-features`` there is none. InputError for flags that exclude each other, EmdError for a solver that cannot be used here.
    """
    settings = {name: getattr(args, name) for name in OF_DEEPEMD}
    if takes_nodes(args):
        settings |= {"map_size": 0, "feature_pyramid": None, "encoder": NoEncoder()}
    else:
        settings |= {"encoder": _encoder(args, device_ids, encoder, weights, statistics), "compiled": args.compile}
    model = DeepEMD(**settings, device_ids=device_ids).float()  # whatever the default of the caller's torch
    if model.settings.uses_solver:
        for solver in {args.solver, val_solver or args.solver}:
            check_solver(model.settings.with_solver(solver, model.solver_options))
    set_threads(args.solver_threads or available_cores())
    return model


def takes_nodes(args: argparse.Namespace) -> bool:
    """Whether the script is given nodes, by ``-features``, instead of images."""
    return bool(getattr(args, "features", None))


def _encoder(
    args: argparse.Namespace,
    device_ids: Sequence[int],
    encoder: Encoder | None,
    weights: str | None,
    statistics: dict[str, Any],
) -> Encoder:
    """An ``encoder``, or if it is None the one that the flags describe, after a check of them."""
    if args.feature_pyramid and args.deepemd != "fcn":
        raise InputError(f"-feature_pyramid requires -deepemd fcn; with -deepemd {args.deepemd}, the nodes are patches")
    if args.compile and args.checkpoint_activations:
        raise InputError("-compile and -checkpoint_activations exclude each other")
    if args.compile and len(device_ids) > 1:
        raise InputError(f"-compile works on one GPU. Name one with -gpu instead of {args.gpu}, or leave -compile out")
    plan = _plan(args)
    edge, size = plan.edge, max(args.feature_pyramid or (), default=0)
    if size > edge:
        maps = f"the feature map, which is {edge} x {edge} for -image_size {args.image_size}"
        raise InputError(f"-feature_pyramid {size} is larger than {maps}")
    _check_map(args, plan)
    if args.feature_pyramid:
        pooled = sum(size**2 for size in args.feature_pyramid)
        check_node_count((args.map_size or plan.edge) ** 2 + pooled, ", and shorten -feature_pyramid")
    if encoder is None:
        settings = {"layer": args.backbone_layer, "weights": weights or args.backbone_weights, **statistics}
        settings |= {"amp": args.amp, "checkpoint_activations": args.checkpoint_activations}
        encoder = make_encoder(args.backbone, image_size=plan.image_size, **settings)
        if encoder.weights != "none":
            status(f"weights: {encoder.weights}")
        if encoder.comes_with_weights and args.deepemd != "fcn":
            status(f"-deepemd {args.deepemd}: every patch of an image is a whole pass of {encoder.name}")
    return encoder


def open_model(
    args: argparse.Namespace, *, device: torch.device, device_ids: Sequence[int], **statistics: Any
) -> tuple[DeepEMD, str]:
    """The model of :func:`build_model` with the weights of ``-model_dir``, and what those are: a path, "none", or a name.

    A backbone that comes with weights of its own has them if there is no ``-model_dir``. A package brings the ``mean`` and
    ``std`` of its pixels, and its statistics of training nodes. InputError for weights that cannot be loaded, and errors as
    for :func:`build_model`.
    """
    if takes_nodes(args):
        return build_model(args, device_ids=device_ids).to(device), "none"
    source = args.model_dir
    if source is None and not backbone_class(args.backbone)[0].comes_with_weights:
        source = f"deepemd_trained_model/{args.dataset}/{args.deepemd}/max_acc.pth"
    weights = weights_file(source) if source not in (None, "none") else None
    if weights and is_package(weights):
        config = read_config(weights)
        statistics = {"mean": config["mean"], "std": config["std"]}
    given = starting_weights(args, source)
    model = build_model(args, device_ids=device_ids, weights=given, **statistics).to(device)
    if not weights:
        if model.encoder.weights == "none":
            status("weights: none")
        return model, model.encoder.weights
    status(f"weights: {source}" + (f" ({weights})" if "://" in source else ""))
    hint = (
        "Set -model_dir, download the published weights (bash download_trained_model.sh), or use a pretrained network"
    )
    hint += " instead, which is downloaded once: -backbone timm:tf_efficientnet_lite0"
    load_encoder_weights(model, weights, hint=hint)
    return model, str(weights)


def starting_weights(args: argparse.Namespace, trained: str | None) -> str | None:
    """What the encoder is built with, for ``build_model``, before the checkpoint ``trained`` is loaded, if there is one.

    InputError if the flags name two sources of weights.
    """
    if trained in (None, "none"):
        return args.backbone_weights or trained
    if args.backbone_weights not in (None, "none"):
        what = f"-backbone_weights {args.backbone_weights} and the checkpoint {trained}"
        raise InputError(f"{what} are two sources of weights: leave one out")
    return "none"


def check_solver(settings: HeadSettings) -> None:
    """Solve one small problem, so that a missing or broken library, or a bad option, is an error before the run."""
    one = torch.ones(2)
    try:
        emd(torch.eye(2) + 1, one, one, solver=settings.solver, **settings.solver_options)
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
