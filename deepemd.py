"""DeepEMD in one import: load a model, classify images by a few examples of each class, look at a match.

    import deepemd

    model = deepemd.load("checkpoint/glyphs/fcn/1shot-5way/quickstart")
    for answer in model.classify("my_support", "my_images"):
        print(answer.file, answer.class_name, answer.probability)

Wherever an image is expected, it may be a path, a PIL image, or an array ``(H, W, 3)`` or ``(H, W)`` of uint8.
"""

from __future__ import annotations

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dataloader.arguments import add_data_arguments, open_base_images, pixel_statistics, view_of
from dataloader.catalog import DatasetSpec
from dataloader.images import picture_of
from dataloader.readers import image_files, read_split
from dataloader.views import View
from engine.arguments import add_run_arguments, flag_words, loader_processes
from engine.command_line import make_parser
from engine.evaluation import encode_images
from engine.start import choose_device
from engine.statistics import prepare_statistics
from engine.weights_flags import adopt_trained_flags
from Models import DeepEMD
from Models.arguments import add_model_arguments, add_weights_arguments, open_model
from Models.backbones import BACKBONES
from Models.matching import Matching
from pictures.match import draw_match
from pictures.matches import Panel, ViewedImage, check_head, panels_of, view_file, view_image
from utils import InputError, available_cores, named_generator, warn

READ_AHEAD = 32  # images read at once
Picture = str | Path | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture]


def load(source: str | Path, *, device: str | int | torch.device | None = None, **flags: Any) -> Model:
    """A model for evaluation.

    Args:
        source: whatever ``-model_dir`` takes (a run folder, a checkpoint, a package, ``hf://owner/name``), or a backbone with
            the weights it comes with, such as ``timm:NAME``.
        device: ``"cpu"``, ``"cuda"``, or the number of a GPU, also as ``"cuda:1"``. None for a GPU if there is one.
        flags: flags of ``predict.py`` by name, as in ``norm="standard"``; they override those of the run or package.

    InputError for a source that cannot be loaded, or flags that ``predict.py`` would not accept.
    """
    parser = make_parser("deepemd.load")
    add_model_flags(parser)
    parser.error = _refuse  # an exception, where a script ends
    kind = "backbone" if str(source).partition(":")[0] in BACKBONES else "model_dir"
    gpu = None if device is None else str(device).removeprefix("cuda").removeprefix(":") or "0"
    words = flag_words({kind: str(source), "gpu": gpu, **flags})
    args = parser.parse_args(words)
    adopt_trained_flags(parser, args, words)
    chosen, device_ids = choose_device(args.gpu)
    with torch.random.fork_rng():  # random weights are those of the seed, and the caller's draws stay as they are
        torch.manual_seed(args.seed)
        return Model.open(args, chosen, device_ids)[0]


def add_model_flags(parser: ArgumentParser) -> None:
    """The flags that :meth:`Model.open` reads."""
    add_data_arguments(parser, has_splits=False)
    add_weights_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_run_arguments(parser, has_folder=False)


class Prototypes(NamedTuple):
    """What represents the classes."""

    nodes: Tensor  # (W, C, N)
    classes: list[str]  # W names
    examples: list[ViewedImage]  # W images that are drawn for the classes
    files: list[str]  # the names of their files


class Answer(NamedTuple):
    """The classification of an image: its classes by descending probability."""

    file: str
    ranking: list[tuple[str, float]]
    cost: float | None  # per unit of mass, of the match with the best class; None for a head without a matching
    viewed: ViewedImage
    nodes: Tensor  # (C, N)
    abstain: float = 0.0

    @property
    def class_name(self) -> str | None:
        """The most probable class; None ("none of the classes") where its probability is below ``abstain``."""
        return self.ranking[0][0] if self.probability >= self.abstain else None

    @property
    def probability(self) -> float:
        return self.ranking[0][1]

    @property
    def runner_up(self) -> str | None:
        """The second class; None where there is only one."""
        return self.ranking[1][0] if len(self.ranking) > 1 else None

    def __repr__(self) -> str:
        shown = ("file", "class_name", "probability", "runner_up", "cost")
        return f"Answer({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


class Match(NamedTuple):
    """How the nodes of one image were matched with those of another."""

    nodes: tuple[Tensor, Tensor]  # (C, M) and (C, N)
    weights: tuple[Tensor, Tensor]  # (M,) and (N,), each of which sums to M
    flow: Tensor  # (M, N)
    similarity: Tensor  # (M, N)
    logit: float
    cost: float  # per unit of mass: 0 is a perfect match
    panels: tuple[list[Panel], list[Panel]]  # what is drawn of the images
    matching: Matching

    def draw(self, *, title: str = "", flows: int = 10) -> Figure:
        """Both images, with the strongest flows between them."""
        return draw_match(self.panels[0], [self.panels[1]], self.matching, names=[""], title=title, top=flows)

    def __repr__(self) -> str:
        return f"Match(cost={self.cost:.4f}, {self.flow.shape[0]} x {self.flow.shape[1]} nodes)"

    def _repr_png_(self) -> bytes:
        """The picture, in a notebook."""
        written = io.BytesIO()
        self.draw().savefig(written, format="png")
        return written.getvalue()


class Model(NamedTuple):
    """A network for evaluation, and the view that it sees images through."""

    network: DeepEMD
    view: View
    seed: int
    device: torch.device

    @classmethod
    def open(
        cls, args: Namespace, device: torch.device, device_ids: Sequence[int], *, needs_statistics: bool = True
    ) -> tuple[Model, str]:
        """The model that the flags of :func:`add_model_flags` describe, and what its weights are (a path, or "none").

        ``needs_statistics``: also get the statistics that its ``-norm`` needs.
        """
        network, weights = open_model(args, device=device, device_ids=device_ids, **pixel_statistics(args))
        if needs_statistics:
            workers = loader_processes(args) if "num_workers" in args else 0
            source = {"open_train": partial(open_base_images, args), "num_workers": workers}
            prepare_statistics(args, network, weights, device=device, **source)
        return cls(network.folded(), view_of(args, train=False), args.seed, device), weights

    def classify(
        self, support: str | Path | Mapping[str, Pictures] | Prototypes, queries: Pictures, *, abstain: float = 0.0
    ) -> list[Answer]:
        """The class of each query.

        Args:
            support: a few examples of each class, in any number: a folder ``<class>/<image>``, or images or folders of images by
                the name of their class; or what :meth:`prototypes` made of them.
            queries: images, or folders of them at any depth.
            abstain: the probability below which an answer has no class.

        InputError if images cannot be read, or there are none.
        """
        if not isinstance(abstain, Real) or not 0 <= abstain <= 1:
            raise InputError(f"abstain is a probability, from 0 to 1; got {abstain!r}")
        prototypes = support if isinstance(support, Prototypes) else self.prototypes(support)
        return list(self.answers(prototypes, _listed(queries), abstain=abstain))

    @torch.no_grad()
    def match(self, a: Picture, b: Picture) -> Match:
        """The optimal matching of two images. InputError for a head without one, or an image that cannot be read."""
        check_head(self.network.settings.head)
        viewed = [self.read(image, ("pair", number)) for number, image in enumerate((a, b))]
        nodes = self.encode_viewed(viewed)  # (2, C, N)
        matching = Matching(*(part[0].cpu() for part in self.network.matching(nodes[1:], nodes[:1])))
        _, flow, similarity, supply, demand = (part[0] for part in matching)
        logit = float(matching.logits[0])
        cost = max(0.0, 1 - logit / self.network.settings.temperature)  # rounding may leave -1e-7
        panels = tuple(self.panels(one, nodes.shape[-1]) for one in viewed)
        return Match(tuple(nodes.cpu()), (supply, demand), flow, similarity, logit, cost, panels, matching)

    @torch.no_grad()
    def encode(self, images: Pictures) -> Tensor:
        """The nodes of images, ``(B, C, N)``."""
        found = [self.encode_viewed(viewed) for _, viewed in self.read_all(_listed(images))]
        if not found:
            raise InputError("there is no image to encode")
        return torch.cat(found)

    @torch.no_grad()
    def prototypes(self, support: str | Path | Mapping[str, Pictures]) -> Prototypes:
        """The prototypes of the classes of ``support``, as for :meth:`classify`. A single example is its class's prototype."""
        images, labels, classes = _examples(support)
        nodes = torch.cat([self.encode_viewed(viewed) for _, viewed in self.read_all(images)])  # (S, C, N)
        label = torch.tensor(labels)
        order = named_generator(self.seed, "sfc", "predict")
        proto = self.network.prototypes(nodes, way=len(classes), labels=label, generator=order)
        similarity = torch.cosine_similarity(nodes, proto[label.to(nodes.device)], dim=1).mean(1).tolist()
        # A class is shown by the example whose nodes are nearest to those of its prototype.
        names = [_name(image, k) for k, image in enumerate(images)]
        places = sorted(zip(labels, similarity, names, range(len(images)), strict=True))
        nearest = {label: k for label, _, _, k in places}
        shown = [nearest[label] for label in range(len(classes))]
        examples = [self.read(images[k], k) for k in shown]
        return Prototypes(proto, classes, examples, [Path(names[k]).name for k in shown])

    @torch.no_grad()
    def answers(
        self, prototypes: Prototypes, images: Iterable[Picture], *, abstain: float = 0.0, skip: bool = False
    ) -> Iterator[Answer]:
        """The answers of :meth:`classify`, one by one; with ``skip``, a warning names images that cannot be read."""
        proto, settings = prototypes.nodes.to(self.device), self.network.settings
        for names, viewed in self.read_all(images, skip=skip):
            nodes = self.encode_viewed(viewed)
            logits = self.network.match(proto, nodes, way=len(proto), shot=1).cpu()  # (B, W)
            for name, row, *image in zip(names, logits, viewed, nodes, strict=True):
                probability = row.double().softmax(0).tolist()
                ranking = [(prototypes.classes[k], probability[k]) for k in row.argsort(descending=True, stable=True)]
                cost = max(0.0, 1 - float(row.max()) / settings.temperature) if settings.uses_solver else None
                yield Answer(name, ranking, cost, *image, abstain)

    @torch.no_grad()
    def draw(self, prototypes: Prototypes, answer: Answer, *, flows: int = 10) -> Figure:
        """The image beside the class that was predicted and the runner-up, with the flows between them."""
        check_head(self.network.settings.head)
        chosen = [prototypes.classes.index(name) for name, _ in answer.ranking[:2]]
        matching = self.network.matching(prototypes.nodes.to(self.device)[chosen], answer.nodes[None])
        images = (answer.viewed, *(prototypes.examples[k] for k in chosen))
        query, *protos = (self.panels(one, answer.nodes.shape[-1]) for one in images)
        matching = Matching(*(part[0].cpu() for part in matching))
        names = [f"{name}, {100 * probability:.1f} %" for name, probability in answer.ranking[:2]]
        notes = [f"shown by {prototypes.files[k]}" for k in chosen]
        return draw_match(query, protos, matching, names=names, title=Path(answer.file).name, notes=notes, top=flows)

    def read(self, image: Picture, place: Any = 0) -> ViewedImage:
        """An image as the network sees it. The random draws of a view depend on its name, or without one on its place."""
        if isinstance(image, str | Path):
            name = place if isinstance(place, tuple) else (Path(image).name,)
            seed = named_generator(self.seed, "predict", *name).initial_seed()
            return view_file(str(image), self.view, seed, advice="")
        name = place if isinstance(place, tuple) else ("", place)
        return view_image(picture_of(image), self.view, named_generator(self.seed, "predict", *name).initial_seed())

    def read_all(
        self, images: Iterable[Picture], *, skip: bool = False
    ) -> Iterator[tuple[Sequence[str], Sequence[ViewedImage]]]:
        """Names of images, and the images, some at a time. With ``skip``, those that cannot be read are named and left out."""
        numbered = enumerate(images)
        with ThreadPoolExecutor(available_cores()) as pool:
            while batch := list(islice(numbered, READ_AHEAD)):
                readable = []
                for name, viewed in [(_name(image, k), pool.submit(self.read, image, k)) for k, image in batch]:
                    try:
                        readable.append((name, viewed.result()))
                    except InputError as error:
                        if not skip:
                            raise
                        warn(f"left out: {error}")
                if readable:
                    yield tuple(zip(*readable, strict=True))

    def encode_viewed(self, viewed: Sequence[ViewedImage]) -> Tensor:
        """The nodes of images as :meth:`read` gives them, ``(B, C, N)``."""
        return encode_images(self.network, torch.stack([one.pixels for one in viewed]), device=self.device)

    def panels(self, viewed: ViewedImage, nodes: int) -> list[Panel]:
        """What is drawn of an image with this number of nodes."""
        return panels_of(viewed, self.view, nodes, self.network.feature_pyramid)


def _listed(images: Pictures) -> Iterator[Picture]:
    """Images one by one; a folder stands for the images in it, at any depth."""
    several = isinstance(images, Sequence | Iterator) and not isinstance(images, str)
    for image in images if several else [images]:
        yield from image_files([str(image)]) if isinstance(image, str | Path) else [image]


def _examples(support: str | Path | Mapping[str, Pictures]) -> tuple[list[Picture], list[int], list[str]]:
    """Images, the number of the class of each, and the names of the classes."""
    if isinstance(support, Mapping):
        images = [list(_listed(given)) for given in support.values()]
        if not images or not all(images):
            empty = [name for name, found in zip(support, images, strict=True) if not found]
            raise InputError(f"the class {empty[0]!r} has no example" if empty else "there is no class to choose from")
        labels = [label for label, found in enumerate(images) for _ in found]
        return [image for found in images for image in found], labels, [str(name) for name in support]
    if not isinstance(support, str | Path):
        given = type(support).__name__
        raise InputError(f"the examples must be a folder, or a dict from class to images; got a {given}")
    layout = DatasetSpec("folders", folders=(".",), split_folders={"support": "."}, obtain="")
    return read_split(
        layout, str(support), "support", advice="To be used, the support needs a folder of images for each class"
    )


def _name(image: Picture, place: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {place}"


def _refuse(message: str) -> None:
    raise InputError(message)
