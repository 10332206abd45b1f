"""DeepEMD: images -> nodes -> weights and similarity -> optimal transport -> logits, in the order of the paper.

Zhang, Cai, Lin, Shen: "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and
Structured Classifiers", CVPR 2020. Section numbers refer to it.

Axes: E episodes, W way, K shot, Q queries, C channels, N and M nodes, P patches, B any batch.
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import data_parallel

from Models.emd import SOLVERS, emd, scale_to_mass
from Models.emd.forms import FORMS
from Models.emd.simplex import GRADIENTS
from Models.resnet import ResNet12
from Models.sfc import fit_prototypes
from utils import InputError, number_above_zero, number_at_least, whole_numbers

METRICS = {"cosine": "cosine similarity of two nodes"}
NORMS = {"center": "subtract each node's own mean over channels", "none": "leave the nodes as they are"}

AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

WEIGHT_FLOOR = 1e-3
SMALLEST_NORM = 1e-8


# --- Section 3.4: the weights of the nodes, by cross-reference --------------------------------------------------------


def cross_reference_weights(nodes: Tensor, other: Tensor) -> Tensor:
    """How much of each node matters, judged by what it is compared with (equation 8).

    A node that looks like the *average* node of the other image is likely to lie on what both images share, and one
    that does not is likely background: ``weight_i = relu(<node_i, mean_j other_j>) + 1e-3``. Taken on the nodes as the
    encoder gives them, not centred.

    Args:
        nodes: ``(..., A, C, N)``.
        other: ``(..., B, C, M)``, with the same leading axes.

    Returns:
        ``(..., A, B, N)``: the weights of the nodes of each A against each B, at least 1e-3, not scaled.
    """
    return F.relu(other.mean(-1).unsqueeze(-3) @ nodes) + WEIGHT_FLOOR  # (..., 1, B, C) x (..., A, C, N)


# --- Section 3.3: the cost of moving mass between two nodes -----------------------------------------------------------


def cosine_similarity_map(query: Tensor, proto: Tensor, *, norm: str = "center") -> Tensor:
    """Cosine similarity of every query node with every prototype node (equation 6: cost = 1 - similarity).

    Args:
        query: ``(..., Q, C, N)``.
        proto: ``(..., W, C, M)``.
        norm: a key of ``NORMS``; ``center`` first subtracts each node's mean over channels.

    Returns:
        ``(..., Q, W, N, M)``, in [-1, 1].
    """
    query, proto = unit_nodes(query, norm), unit_nodes(proto, norm)
    # One matrix product per episode: (Q*N, C) x (C, W*M).
    q, n = query.shape[-3], query.shape[-1]
    w, m = proto.shape[-3], proto.shape[-1]
    left = query.transpose(-2, -1).flatten(-3, -2)  # (..., Q*N, C)
    right = proto.transpose(-3, -2).flatten(-2)  # (..., C, W*M)
    return (left @ right).unflatten(-1, (w, m)).unflatten(-3, (q, n)).transpose(-3, -2)


def unit_nodes(nodes: Tensor, norm: str) -> Tensor:
    """Nodes ``(..., C, N)`` as the similarity sees them: centred, if ``norm`` says so, and scaled to length 1."""
    check_geometry("cosine", norm)
    if norm == "center":
        nodes = nodes - nodes.mean(-2, keepdim=True)
    return F.normalize(nodes, dim=-2, eps=SMALLEST_NORM)


# --- Section 3.2: optimal matching -> logits --------------------------------------------------------------------------


def emd_logits(
    proto: Tensor,
    query: Tensor,
    *,
    temperature: float = 12.5,
    metric: str = "cosine",
    norm: str = "center",
    solver: str = "opencv",
    **options: Any,
) -> Tensor:
    """Logits of queries against prototypes: how much alike they are under the best matching of their nodes.

    The flow is the optimal one for ``cost = 1 - similarity`` and weights scaled to sum to N on both sides, and the logit
    is ``temperature / N * sum(flow * similarity)`` (equation 7), which for equal masses is
    ``temperature * (1 - EMD / N)``.

    Args:
        proto: ``(..., W, C, N)``, one set of nodes per class.
        query: ``(..., Q, C, M)``, with the same leading axes (episodes).
        temperature: the scale of the logits.
        metric, norm: keys of ``METRICS`` and ``NORMS``.
        solver, options: see :func:`Models.emd.emd`.

    Returns:
        ``(..., Q, W)``.
    """
    if proto.shape[:-3] != query.shape[:-3] or proto.shape[-2] != query.shape[-2]:
        raise ValueError(
            "expected proto (..., W, C, N) and query (..., Q, C, M) with the same leading axes and C; "
            f"got {tuple(proto.shape)} and {tuple(query.shape)}"
        )
    check_geometry(metric, norm)
    query_weight = cross_reference_weights(query, proto)  # (..., Q, W, M)
    proto_weight = cross_reference_weights(proto, query).transpose(-3, -2)  # (..., Q, W, N)
    similarity = cosine_similarity_map(query, proto, norm=norm)  # (..., Q, W, M, N)
    return matching_logits(similarity, query_weight, proto_weight, temperature=temperature, solver=solver, **options)


def matching_logits(
    similarity: Tensor, query_weight: Tensor, proto_weight: Tensor, *, temperature: float, solver: str, **options: Any
) -> Tensor:
    """The last step of :func:`emd_logits`: similarity ``(..., M, N)`` and weights ``(..., M)``, ``(..., N)`` to ``(...)``."""
    mass = similarity.shape[-2]
    supply, demand = scale_to_mass(query_weight, mass), scale_to_mass(proto_weight, mass)
    distance, flow = emd(1 - similarity, supply, demand, solver=solver, **options)
    # sum(flow * similarity) = sum(flow) - <cost, flow>. The sum of the flow is the mass, but for what an iterative
    # solver leaves undone, and that belongs to the logit (equation 7 as published).
    return temperature / mass * (flow.sum((-2, -1)) - distance)


def check_geometry(metric: str, norm: str) -> None:
    """Raises ValueError for what is no key of ``METRICS`` and ``NORMS``."""
    for name, value, known in (("metric", metric, METRICS), ("norm", norm, NORMS)):
        if value not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(known)}; got {value!r}")


# --- The network ------------------------------------------------------------------------------------------------------


class DeepEMD(nn.Module):
    """A ResNet-12 whose output is compared by optimal transport.

    Args:
        feature_pyramid: sizes of further maps that the feature map is pooled to, as in ``(2, 1)``; whole images only.
        temperature, metric, norm: see :func:`emd_logits`.
        solver, form, l2_strength, emd_gradient: see :mod:`Models.emd`. Solvers without such an option are not given it.
        sfc_lr, sfc_wd, sfc_update_step, sfc_bs: learning rate, weight decay, passes and batch size of
            :func:`Models.sfc.fit_prototypes`, for ``shot > 1``.
        checkpoint_activations: see :class:`Models.resnet.ResNet12`.
        amp: a key of ``AMP``: the number format of the encoder's convolutions. The head stays in float32 and float64.
        compiled: run the encoder through ``torch.compile``.
        device_ids: with more than one CUDA device, the encoder and the matching are spread over them by torch's
            DataParallel. The module itself lives on the first.
    """

    def __init__(
        self,
        *,
        feature_pyramid: Sequence[int] | None = None,
        temperature: float = 12.5,
        metric: str = "cosine",
        norm: str = "center",
        solver: str = "opencv",
        form: str = "L2",
        l2_strength: float = 1e-6,
        emd_gradient: str = "full",
        sfc_lr: float = 0.1,
        sfc_wd: float = 0.0,
        sfc_update_step: int = 100,
        sfc_bs: int = 4,
        checkpoint_activations: bool = False,
        amp: str = "off",
        compiled: bool = False,
        device_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if amp not in AMP:
            raise ValueError(f"expected amp to be one of {', '.join(AMP)}; got {amp!r}")
        self.encoder = ResNet12(checkpoint_activations=checkpoint_activations)
        self.amp = amp
        self.compiled = compiled
        if compiled:
            self.encoder.compile()  # in place: no other module, no other key names
        self.feature_pyramid = tuple(feature_pyramid or ())
        self.head = {"temperature": temperature, "metric": metric, "norm": norm}
        self.solver = solver
        self.solver_options = {"form": form, "l2_strength": l2_strength, "gradient": emd_gradient}
        self.sfc = {"lr": sfc_lr, "weight_decay": sfc_wd, "steps": sfc_update_step, "batch_size": sfc_bs}
        self.device_ids = list(device_ids)

    def forward(
        self,
        images: Tensor,
        *,
        way: int,
        shot: int,
        solver: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One episode: the logits of its queries.

        Args:
            images: ``(W*K + W*Q, 3, H, W)``, or ``(W*K + W*Q, P, 3, H, W)`` as patches; support first, and both
                parts class-interleaved: ``c0 c1 .. c0 c1 ..``.
            way, shot: W and K.
            solver: in the place of the one given to the constructor.
            generator: draws the order of the support images in the structured fully connected layer.

        Returns:
            ``(W*Q, W)``; the label of query i is ``i % W``.
        """
        nodes = self.encode(images)  # support and queries in one batch, so batch norm sees the whole episode
        support, query = nodes[: way * shot], nodes[way * shot :]
        return self.match(support, query, way=way, shot=shot, solver=solver, generator=generator)

    def encode(self, images: Tensor) -> Tensor:
        """Images to nodes (section 3.1): ``(B, 3, H, W)`` or ``(B, P, 3, H, W)`` to ``(B, 640, N)``.

        A whole image becomes the cells of its feature map, row by row, behind those of its feature pyramid.
        Patches are encoded on their own and averaged to one node each, so N = P.
        """
        if images.dim() == 5:
            maps = self._run_encoder(images.flatten(0, 1))  # (B*P, 640, h, w)
            return maps.mean((-2, -1)).unflatten(0, images.shape[:2]).transpose(1, 2)
        maps = self._run_encoder(images)  # (B, 640, h, w)
        levels = [F.adaptive_avg_pool2d(maps, size) for size in self.feature_pyramid]
        return torch.cat([level.flatten(2) for level in (*levels, maps)], dim=2)

    def match(
        self,
        support: Tensor,
        query: Tensor,
        *,
        way: int,
        shot: int,
        solver: str | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Nodes to logits: ``(..., K*W, C, N)`` and ``(..., Q, C, N)`` to ``(..., Q, W)``, for one or many episodes.

        Arguments as for :meth:`forward`; ``generator`` may be one per episode.
        """
        head = self._head_settings(solver or self.solver)
        proto = support
        if shot > 1:  # section 3.5: the structured fully connected layer
            proto = fit_prototypes(support, way=way, shot=shot, generator=generator, **self.sfc, **head)
        if len(self.device_ids) < 2:
            return emd_logits(proto, query, **head)
        # DataParallel cuts dimension 0 of its inputs: the queries there, and one copy of the prototypes per device.
        # Inputs are zipped, so that with fewer cuts than devices the copies left over are dropped.
        query = query.movedim(-3, 0)
        copies = proto.expand(len(self.device_ids), *proto.shape)
        return data_parallel(_Head(head), (query, copies), self.device_ids).movedim(0, -2)

    def _run_encoder(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=AMP[self.amp], enabled=AMP[self.amp] is not None):
            is_single = len(self.device_ids) < 2
            maps = self.encoder(images) if is_single else data_parallel(self.encoder, images, self.device_ids)
        return maps.float() if self.amp != "off" else maps

    def folded(self) -> "DeepEMD":
        """A copy for evaluation, with the same weights and a faster encoder (see :meth:`Models.resnet.ResNet12.folded`)."""
        model = copy.copy(self)
        model._modules = {"encoder": self.encoder.folded()}
        if self.compiled:
            model.encoder.compile()
        return model.eval()

    def _head_settings(self, solver: str) -> dict[str, Any]:
        if solver not in SOLVERS:
            raise ValueError(f"expected solver to be one of {', '.join(SOLVERS)}; got {solver!r}")
        taken = {key: value for key, value in self.solver_options.items() if key in SOLVERS[solver].options}
        return {**self.head, "solver": solver, **taken}


class _Head(nn.Module):
    """What one DataParallel replica does: its share of the queries ``(Q, ..., C, N)`` against ``(1, ..., W, C, N)``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, query: Tensor, proto: Tensor) -> Tensor:
        return emd_logits(proto[0], query.movedim(0, -3), **self.settings).movedim(-2, 0)


# --- Command line -----------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser, *, sfc_lr: float = 0.1) -> None:
    """The flags that :func:`build_model` reads. ``sfc_lr`` is the script's default."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-temperature", type=number_above_zero(float), default=12.5, help="scale of the logits (default: %(default)s)"
    )
    group.add_argument(
        "-metric", choices=METRICS, default="cosine", help="similarity of two nodes (default: %(default)s)"
    )
    group.add_argument(
        "-norm", choices=NORMS, default="center", help="what is done to nodes before it (default: %(default)s)"
    )
    group.add_argument(
        "-feature_pyramid",
        type=whole_numbers,
        metavar="SIZES",
        help="fcn only: further maps the feature map is pooled to, as in 2,1 (default: none)",
    )
    solvers = "; ".join(f"{name}: {solver.summary}" for name, solver in SOLVERS.items())
    group.add_argument("-solver", choices=SOLVERS, default="opencv", help=f"{solvers} (default: %(default)s)")
    group.add_argument(
        "-form",
        choices=FORMS,
        default="L2",
        help="form of the quadratic program of qpth and ipm (default: %(default)s)",
    )
    group.add_argument(
        "-l2_strength",
        type=number_above_zero(float),
        default=1e-6,
        help="weight of the quadratic term of form L2 (default: %(default)s)",
    )
    group.add_argument(
        "-emd_gradient",
        choices=GRADIENTS,
        default="full",
        help="gradient of simplex: "
        + "; ".join(f"{name}: {what}" for name, what in GRADIENTS.items())
        + " (default: %(default)s)",
    )
    group.add_argument(
        "-amp", choices=AMP, default="off", help="number format of the encoder, not the head (default: %(default)s)"
    )
    group.add_argument("-compile", action="store_true", help="run the encoder through torch.compile")
    group.add_argument(
        "-checkpoint_activations",
        action="store_true",
        help="in training, compute the encoder's activations twice instead of keeping them: less memory, more time",
    )
    group = parser.add_argument_group("structured fully connected layer, for -shot above 1")
    group.add_argument(
        "-sfc_lr", type=number_above_zero(float), default=sfc_lr, help="learning rate (default: %(default)s)"
    )
    group.add_argument(
        "-sfc_wd", type=number_at_least(0, float), default=0.0, help="weight decay (default: %(default)s)"
    )
    group.add_argument(
        "-sfc_update_step",
        type=number_above_zero(int),
        default=100,
        help="passes over the support (default: %(default)s)",
    )
    group.add_argument(
        "-sfc_bs", type=number_above_zero(int), default=4, help="support images per step (default: %(default)s)"
    )


def build_model(args: argparse.Namespace, *, device_ids: Sequence[int] = ()) -> DeepEMD:
    """The model that the flags of :func:`add_model_arguments` ask for.

    Raises:
        EmdError: a solver named by the flags cannot be used here.
        InputError: flags that do not go together.
    """
    for solver in {args.solver, getattr(args, "val_solver", args.solver)}:
        emd(
            torch.zeros(1, 1), torch.ones(1), torch.ones(1), solver=solver
        )  # a missing library is told now, not at the first batch
    if args.feature_pyramid and getattr(args, "deepemd", "fcn") != "fcn":
        raise InputError(
            f"-feature_pyramid goes with -deepemd fcn; got -deepemd {args.deepemd}, whose nodes are patches"
        )
    names = "temperature metric norm feature_pyramid solver form l2_strength emd_gradient sfc_lr sfc_wd sfc_update_step sfc_bs"
    names += " checkpoint_activations amp"
    return DeepEMD(
        device_ids=device_ids, compiled=args.compile, **{name: getattr(args, name) for name in names.split()}
    )
