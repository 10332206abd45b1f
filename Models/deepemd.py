"""DeepEMD, the network: images -> nodes -> logits, in the order of the paper (section numbers refer to it).

Axes: E episodes, W way, K shot, Q queries, C channels, N nodes, P patches, B any batch.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import data_parallel

from Models.backbones import BACKBONES
from Models.choices import check_choice
from Models.emd import SOLVERS, settle
from Models.encoder import Encoder, NoEncoder
from Models.heads import HeadSettings, head_logits, match_with
from Models.matching import Matching
from Models.sfc import KSHOT, Draws, FitSettings, fit_prototypes, mean_prototypes
from Models.statistics import NodeStatistics, needed_statistics
from utils import InputError


class DeepEMD(nn.Module):
    """An encoder whose feature maps are compared by optimal transport.

    Args:
        map_size: edge of the map that the feature map of a whole image is pooled to, 0 to keep it.
        feature_pyramid: sizes of further maps that the feature map is pooled to, as in ``(2, 1)``; whole images only.
        head, temperature, metric, norm, weights, weight_power, solver: see :class:`Models.heads.HeadSettings`.
        form, l2_strength, emd_gradient: given to every solver that has such an option (``emd_gradient`` is its ``gradient``),
            unless ``solver`` sets the option itself.
        kshot: a key of :data:`Models.sfc.KSHOT`: where prototypes come from, for ``shot > 1``.
        sfc_lr, sfc_wd, sfc_update_step, sfc_bs: learning rate, weight decay, passes and batch size of the fit by ``sfc``.
        encoder: a ResNet-12 if None; :class:`Models.encoder.NoEncoder` for a model that is given nodes.
        compiled: run the encoder through ``torch.compile``; on one device, without ``checkpoint_activations``.
        device_ids: with more than one CUDA device, the encoder is spread over them by torch's DataParallel, and so is the
            head if its solver works on the device. The module itself is on the first.
        encoder_settings: of that ResNet-12: ``mean``, ``std``, ``amp`` and ``checkpoint_activations``, as for
            :class:`Models.encoder.Encoder`. The head is always in float32 and float64.

    ValueError for an unknown choice, a number out of range, or settings for an encoder that is given.
    """

    def __init__(
        self,
        *,
        map_size: int = 0,
        feature_pyramid: Sequence[int] | None = None,
        head: str = "deepemd",
        temperature: float = 12.5,
        metric: str = "cosine",
        norm: str = "center",
        weights: str = "cross",
        weight_power: float = 1.0,
        solver: str = "opencv",
        form: str = "L2",
        l2_strength: float = 1e-6,
        emd_gradient: str = "full",
        kshot: str = "sfc",
        sfc_lr: float = 0.1,
        sfc_wd: float = 0.0,
        sfc_update_step: int = 100,
        sfc_bs: int = 4,
        encoder: Encoder | NoEncoder | None = None,
        compiled: bool = False,
        device_ids: Sequence[int] = (),
        **encoder_settings: Any,
    ) -> None:
        super().__init__()
        if encoder is not None and encoder_settings:
            raise ValueError(f"{', '.join(encoder_settings)}: set this where the encoder is made, which is given")
        check_choice("kshot", kshot, KSHOT)
        self.encoder = BACKBONES["resnet12"](**encoder_settings) if encoder is None else encoder
        self.map_size, self.feature_pyramid, self.kshot = map_size, tuple(feature_pyramid or ()), kshot
        self.compiled, self.device_ids = compiled, list(device_ids)
        if compiled:
            self.encoder.compile()  # in place: no other module, no other key names
        self.solver_options = {"form": form, "l2_strength": l2_strength, "gradient": emd_gradient}
        similarity = {"temperature": temperature, "metric": metric, "norm": norm}
        settings = HeadSettings(head=head, **similarity, weights=weights, weight_power=weight_power)
        self.settings = settings.with_solver(solver, self.solver_options)
        self.sfc = FitSettings(sfc_lr, sfc_wd, sfc_update_step, sfc_bs)

    def forward(
        self, images: Tensor, *, way: int, shot: int, solver: str | None = None, generator: Draws = None
    ) -> Tensor:
        """One episode: the logits of its queries.

        Args:
            images: ``(W*K + W*Q, 3, H, W)``, or ``(W*K + W*Q, P, 3, H, W)`` as patches, 8-bit or normalised floats; support
                first, and both parts class-interleaved: ``c0 c1 .. c0 c1 ..``. Others are a ValueError.
            solver: overrides the one given to the constructor; ignored by heads without a solver.
            generator: draws the order of the support images in the structured fully connected layer.

        Returns:
            ``(W*Q, W)``; the label of query i is ``i % W``.
        """
        nodes = self.encode(images)  # support and queries in one batch, so batch norm sees the whole episode
        if min(way, shot) < 1 or len(nodes) <= way * shot:
            needed = f"{way * shot} support images and queries"
            raise ValueError(f"{way} way {shot} shot needs {needed}; got {len(nodes)} images")
        support, query = nodes[: way * shot], nodes[way * shot :]
        return self.match(support, query, way=way, shot=shot, solver=solver, generator=generator)

    def encode(self, images: Tensor) -> Tensor:
        """Images to nodes (section 3.1): ``(B, 3, H, W)`` or ``(B, P, 3, H, W)`` to ``(B, C, N)``.

        A whole image becomes the cells of its feature map, pooled to ``map_size``, row by row, behind those of its feature
        pyramid. Patches are encoded on their own and averaged to one node each, so N = P. ValueError as for :meth:`forward`, and
        for a map smaller than ``map_size``.
        """
        if images.dim() == 5:
            maps = self._run_encoder(images.flatten(0, 1))  # (B*P, C, h, w)
            return maps.mean((-2, -1)).unflatten(0, images.shape[:2]).transpose(1, 2)  # (B, C, P)
        maps = self._run_encoder(images)  # (B, C, h, w)
        if self.map_size > min(maps.shape[2:]):
            raise ValueError(f"map_size {self.map_size} is larger than the feature map, {tuple(maps.shape[2:])}")
        levels = [_pool(maps, size) for size in self.feature_pyramid]
        maps = _pool(maps, self.map_size) if self.map_size else maps
        return torch.cat([level.flatten(2) for level in (*levels, maps)], dim=2)

    def match(
        self, support: Tensor, query: Tensor, *, way: int, shot: int, solver: str | None = None, generator: Draws = None
    ) -> Tensor:
        """Nodes ``(..., K*W, C, N)`` and ``(..., Q, C, N)`` to logits ``(..., Q, W)``; ``generator`` may be one per episode."""
        proto = self.prototypes(support, way=way, shot=shot, solver=solver, generator=generator)
        settings = self._settings(solver)
        if len(self.device_ids) < 2 or not settings.uses_solver or SOLVERS[settings.solver].device == "cpu":
            return head_logits(proto, query, settings)
        # DataParallel cuts dimension 0 of its inputs: the queries there, and one copy of the prototypes per device.
        # Inputs are zipped, so that with fewer cuts than devices the copies left over are dropped.
        query = query.movedim(-3, 0)  # (Q, ..., C, N)
        copies = proto.expand(len(self.device_ids), *proto.shape)  # (devices, ..., W, C, N)
        return data_parallel(_Head(settings), (query, copies), self.device_ids).movedim(0, -2)

    def prototypes(
        self,
        support: Tensor,
        *,
        way: int,
        shot: int | None = None,
        labels: Tensor | None = None,
        solver: str | None = None,
        generator: Draws = None,
    ) -> Tensor:
        """The sets of nodes that stand for the classes, ``(..., W, C, N)``. Arguments as for :func:`fit_prototypes`."""
        if self.kshot == "mean" or shot == 1 or support.shape[-3] == way:
            return mean_prototypes(support, way=way, shot=shot, labels=labels)  # of one image, the image itself
        # Section 3.5: the structured fully connected layer.
        draws = {"generator": generator, "settings": self._settings(solver)}
        return fit_prototypes(support, way=way, shot=shot, labels=labels, **draws, **asdict(self.sfc))

    def matching(self, proto: Tensor, query: Tensor, *, solver: str | None = None) -> Matching:
        """How queries ``(..., Q, C, M)`` are matched with prototypes ``(..., W, C, N)``; ValueError for other heads."""
        if self.settings.head != "deepemd":
            raise ValueError(f"only the head deepemd has a flow; this model has the head {self.settings.head}")
        return match_with(proto, query, self._settings(solver))

    def use_statistics(self, statistics: NodeStatistics | None) -> None:
        """Compare nodes by these statistics of training nodes from now on, as the norms ``base`` and ``standard`` need.

        They are no part of the state dict. InputError if they are those of another number of channels.
        """
        if statistics is not None:
            statistics = statistics.to(next(self.encoder.parameters()).device)
            channels, needed = len(statistics.mean), getattr(self.encoder, "out_channels", None)  # of nodes from a file
            if needed not in (None, channels):
                nodes = f"the nodes of this encoder have {needed}"
                raise InputError(f"the statistics are of {channels} channels; {nodes}. Compute them with this encoder")
        self.settings = replace(self.settings, statistics=statistics)

    @property
    def statistics_hash(self) -> str | None:
        """The SHA-256 of the statistics in use."""
        needed = needed_statistics(self.settings.norm, self.settings.statistics)
        return needed and needed.sha256

    def read_statistics(self, path: str | Path) -> None:
        """:meth:`use_statistics` with those in a file; InputError unless it is one of this encoder."""
        try:
            self.use_statistics(NodeStatistics.read(Path(path)))
        except InputError as error:
            raise InputError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None

    def fit_statistics(self, nodes: Tensor | Iterable[Tensor]) -> None:
        """:meth:`use_statistics` with those of training nodes ``(B, C, N)``, or of batches of them."""
        self.use_statistics(NodeStatistics.of(nodes))

    def folded(self) -> "DeepEMD":
        """A copy for evaluation, with the same weights and a faster encoder (see :meth:`Models.encoder.Encoder.folded`)."""
        model = copy.deepcopy(self).eval()
        model.encoder = self.encoder.folded()
        if self.compiled:
            model.encoder.compile()
        return model

    def settle(self) -> None:
        """Raise what a solver on a GPU has met and not reported yet: see :func:`Models.emd.settle`."""
        settle()

    def _run_encoder(self, images: Tensor) -> Tensor:
        if len(self.device_ids) < 2:
            return self.encoder(images)
        self.encoder.check_images(images)  # an error in a replica would come with its traceback
        return data_parallel(self.encoder, images, self.device_ids)

    def _settings(self, solver: str | None) -> HeadSettings:
        return self.settings if solver is None else self.settings.with_solver(solver, self.solver_options)


class _Head(nn.Module):
    """What one DataParallel replica does: its share of the queries ``(Q, ..., C, N)`` against ``(1, ..., W, C, N)``."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, query: Tensor, proto: Tensor) -> Tensor:
        return head_logits(proto[0], query.movedim(0, -3), self.settings).movedim(-2, 0)


def _pool(maps: Tensor, size: int) -> Tensor:
    """Adaptive average pooling, ``(B, C, h, w)`` to ``(B, C, size, size)``: that of torch has no deterministic CUDA gradient.

    Cell k averages rows ``floor(k h / size)`` to ``ceil((k + 1) h / size)``, then columns likewise.
    """
    for dim in (-2, -1):
        edge = maps.shape[dim]
        bounds = [(k * edge // size, -(-(k + 1) * edge // size)) for k in range(size)]
        maps = torch.cat([maps.narrow(dim, a, b - a).mean(dim, keepdim=True) for a, b in bounds], dim)
    return maps
