"""DeepEMD, the network: images -> nodes -> logits, in the order of the paper (section numbers refer to it).

Axes: E episodes, W way, K shot, Q queries, C channels, N nodes, P patches, B any batch.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import data_parallel

from Models.emd import SOLVERS
from Models.heads import find_head, head_logits, takes_solver
from Models.matching import Matching, match_nodes
from Models.resnet import ResNet12
from Models.sfc import KSHOT, fit_prototypes, mean_prototypes


class DeepEMD(nn.Module):
    """A ResNet-12 whose feature maps are compared by optimal transport.

    Args:
        feature_pyramid: sizes of further maps that the feature map is pooled to, as in ``(2, 1)``; whole images only.
        head: a key of :data:`Models.heads.HEADS`. A head ignores the settings that it has no use for.
        temperature, metric, norm: see :func:`Models.matching.match_nodes`.
        solver, form, l2_strength, emd_gradient: see :mod:`Models.emd`. Solvers without such an option are not given it, and
            heads without a solver none of them.
        kshot: a key of :data:`Models.sfc.KSHOT`: where prototypes come from, for ``shot > 1``.
        sfc_lr, sfc_wd, sfc_update_step, sfc_bs: learning rate, weight decay, passes and batch size of
            :func:`Models.sfc.fit_prototypes`, for ``shot > 1`` and ``kshot`` ``sfc``.
        mean, std: see :class:`Models.encoder.Encoder`.
        amp: a key of :data:`Models.encoder.AMP`: the number format of the encoder's convolutions. The head stays in float32
            and float64.
        compiled: run the encoder through ``torch.compile``.
        checkpoint_activations: see :class:`Models.resnet.ResNet12`.
        device_ids: with more than one CUDA device, the encoder is spread over them by torch's DataParallel, and so is the
            head if its solver works on the device. The module itself lives on the first.

    Raises:
        ValueError: an unknown choice, or settings that do not go together.
    """

    def __init__(
        self,
        *,
        feature_pyramid: Sequence[int] | None = None,
        head: str = "deepemd",
        temperature: float = 12.5,
        metric: str = "cosine",
        norm: str = "center",
        solver: str = "opencv",
        form: str = "L2",
        l2_strength: float = 1e-6,
        emd_gradient: str = "full",
        kshot: str = "sfc",
        sfc_lr: float = 0.1,
        sfc_wd: float = 0.0,
        sfc_update_step: int = 100,
        sfc_bs: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        amp: str = "off",
        compiled: bool = False,
        checkpoint_activations: bool = False,
        device_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if compiled and checkpoint_activations:
            raise ValueError("compiled and checkpoint_activations do not go together; leave one out")
        if compiled and len(device_ids) > 1:
            raise ValueError(
                f"compiled and {len(device_ids)} devices do not go together: DataParallel's replicas cannot be compiled; "
                "name one device, or leave compiled out"
            )
        find_head(head)  # raises for an unknown one
        if kshot not in KSHOT:
            raise ValueError(f"expected kshot to be one of {', '.join(KSHOT)}; got {kshot!r}")
        self.encoder = ResNet12(mean=mean, std=std, amp=amp, checkpoint_activations=checkpoint_activations)
        self.compiled = compiled
        if compiled:
            self.encoder.compile()  # in place: no other module, no other key names
        self.feature_pyramid = tuple(feature_pyramid or ())
        self.head = {"head": head, "temperature": temperature, "metric": metric, "norm": norm}
        self.solver = solver
        self.solver_options = {"form": form, "l2_strength": l2_strength, "gradient": emd_gradient}
        self.kshot = kshot
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
            images: ``(W*K + W*Q, 3, H, W)``, or ``(W*K + W*Q, P, 3, H, W)`` as patches, 8-bit or normalised floats; support
                first, and both parts class-interleaved: ``c0 c1 .. c0 c1 ..``.
            way, shot: W and K.
            solver: overrides the one given to the constructor; ignored by heads without a solver.
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
        settings = self._head_settings(solver or self.solver)
        proto = self.prototypes(support, way=way, shot=shot, solver=solver, generator=generator)
        if len(self.device_ids) < 2 or "solver" not in settings or SOLVERS[settings["solver"]].device == "cpu":
            return head_logits(proto, query, **settings)
        # DataParallel cuts dimension 0 of its inputs: the queries there, and one copy of the prototypes per device.
        # Inputs are zipped, so that with fewer cuts than devices the copies left over are dropped.
        query = query.movedim(-3, 0)
        copies = proto.expand(len(self.device_ids), *proto.shape)
        return data_parallel(_Head(settings), (query, copies), self.device_ids).movedim(0, -2)

    def prototypes(
        self,
        support: Tensor,
        *,
        way: int,
        shot: int | None = None,
        labels: Tensor | None = None,
        solver: str | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """The sets of nodes that stand for the classes: ``(..., K*W, C, N)`` to ``(..., W, C, N)``.

        Where classes have different numbers of images, ``labels (S,)`` says which of ``support (..., S, C, N)`` are whose.
        """
        if shot == 1:
            return support
        if self.kshot == "mean" or support.shape[-3] == way:
            return mean_prototypes(support, way=way, shot=shot, labels=labels)
        # Section 3.5: the structured fully connected layer.
        settings = self._head_settings(solver or self.solver)
        return fit_prototypes(support, way=way, shot=shot, labels=labels, generator=generator, **self.sfc, **settings)

    def matching(self, proto: Tensor, query: Tensor, *, solver: str | None = None) -> Matching:
        """How the head ``deepemd`` matches queries ``(..., Q, C, M)`` with prototypes ``(..., W, C, N)``: the flow too.

        Raises:
            ValueError: another head, which has no flow.
        """
        if self.head["head"] != "deepemd":
            raise ValueError(f"expected the head deepemd; got {self.head['head']}, which has no flow")
        settings = self._head_settings(solver or self.solver)
        return match_nodes(proto, query, **{key: value for key, value in settings.items() if key != "head"})

    def _run_encoder(self, images: Tensor) -> Tensor:
        return (
            self.encoder(images) if len(self.device_ids) < 2 else data_parallel(self.encoder, images, self.device_ids)
        )

    def folded(self) -> "DeepEMD":
        """A copy for evaluation, with the same weights and a faster encoder (see :meth:`Models.encoder.Encoder.folded`)."""
        model = copy.deepcopy(self).eval()
        model.encoder = self.encoder.folded()
        if self.compiled:
            model.encoder.compile()
        return model

    def _head_settings(self, solver: str) -> dict[str, Any]:
        if not takes_solver(self.head["head"]):
            return self.head
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
        return head_logits(proto[0], query.movedim(0, -3), **self.settings).movedim(-2, 0)
