"""Time and memory of an episode, by variant and shot, compared with the same episode done the published way.

    python benchmarks/episodes.py                        the whole table at 84 pixels (about a quarter of an hour)
    python benchmarks/episodes.py -image_size 32         a quick look
    python benchmarks/episodes.py -only end_to_end       one part: parts, sfc, end_to_end, training

The published way, written here from its description, encodes every image of every episode, expands similarities to
(Q, W, N, N, C) tensors, and calls the solver once per pair of query and prototype. Times are the best of at least two calls
on the same threads; those marked with * are extrapolated. Memory is the peak of a fresh process that runs our way alone.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from timeit import repeat
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import make_images, megabytes, print_row

from dataloader import EpisodeSampler, ImageDataset, SeededEpisodes, episode_labels, make_view
from engine.command_line import make_parser
from engine.evaluation import ENCODE_BATCH, Evaluator
from Models import DeepEMD
from Models.sfc import fit_prototypes
from utils import number_between

WAY, QUERY = 5, 15
VARIANTS = {"fcn": {}, "grid": {"patch_list": (2, 3)}, "sampling": {"num_patch": 9}}
PATCHES = {"fcn": 1, "grid": 13, "sampling": 9}


def best_time(work: Callable[[], object], calls: int = 2) -> float:
    return min(repeat(work, number=1, repeat=calls))


def published_weights(left: Tensor, right: Tensor) -> Tensor:
    """Both sides repeated to (A, B, C, N) before they are multiplied."""
    mean = right.mean(2, keepdim=True).expand(-1, -1, left.shape[2])
    product = left.unsqueeze(1).repeat(1, len(right), 1, 1) * mean.unsqueeze(0).repeat(len(left), 1, 1, 1)
    return F.relu(product.sum(2)) + 1e-3


def published_logits(proto: Tensor, query: Tensor) -> Tensor:
    """(W, C, N) and (Q, C, N) to (Q, W), a pair at a time."""
    supply, demand = published_weights(query, proto), published_weights(proto, query)
    query, proto = (nodes - nodes.mean(1, keepdim=True) for nodes in (query, proto))
    q, w, n = len(query), len(proto), query.shape[2]
    left = query.transpose(1, 2)[:, None, :, None].expand(q, w, n, n, -1)
    right = proto.transpose(1, 2)[None, :, None].expand(q, w, n, n, -1)
    similarity = F.cosine_similarity(left, right, dim=-1)
    flows = torch.empty_like(similarity)
    for i, j in np.ndindex(q, w):
        weights = (F.relu(weight.detach()) + 1e-5 for weight in (supply[i, j], demand[j, i]))
        sides = ((weight * (n / weight.sum().item())).view(-1, 1).numpy() for weight in weights)
        flows[i, j] = torch.from_numpy(cv2.EMD(*sides, cv2.DIST_USER, (1 - similarity[i, j]).detach().numpy())[2])
    return (similarity * flows).sum((2, 3)) * (12.5 / n)


def published_sfc(support: Tensor, passes: int) -> None:
    proto = support.view(-1, WAY, *support.shape[1:]).mean(0).clone().requires_grad_()
    optimizer = torch.optim.SGD([proto], lr=100.0, momentum=0.9, dampening=0.9)
    labels = torch.arange(len(support)) % WAY
    for _ in range(passes):
        for chosen in torch.randperm(len(support)).split(4):
            optimizer.zero_grad()
            F.cross_entropy(published_logits(proto, support[chosen]), labels[chosen]).backward()
            optimizer.step()


class Basis(NamedTuple):
    """Seconds, ours and the published way."""

    encode: float  # an image (or patch)
    published_encode: float  # the same among the 80 images of an episode
    head: float  # 75 queries and 5 prototypes of fcn
    published_head: float


def measure_basis(model: DeepEMD, image_size: int) -> Basis:
    folded, images = model.folded(), torch.randn(80, 3, image_size, image_size)
    batch = images[: ENCODE_BATCH["cpu"]]
    with torch.no_grad():
        folded.encode(batch)
        ours, published = best_time(lambda: folded.encode(batch)), best_time(lambda: model.encode(images))
    return Basis(ours / len(batch), published / len(images), *head_times(model, (image_size // 16) ** 2))


def head_times(model: DeepEMD, nodes: int) -> tuple[float, float]:
    """Seconds to match 75 queries with 5 prototypes: ours, and the published way."""
    support, query = torch.randn(WAY, 640, nodes).abs(), torch.randn(WAY * QUERY, 640, nodes).abs()
    with torch.no_grad():
        ours = best_time(lambda: model.match(support, query, way=WAY, shot=1), 5)
        return ours, best_time(lambda: published_logits(support, query))


def support_nodes(episodes: int, nodes: int) -> Tensor:
    return torch.randn(episodes, 5 * WAY, 640, nodes, generator=torch.Generator().manual_seed(0)).abs()


def sfc_time(nodes: int, episodes: int, **solver: str) -> float:
    """Seconds per episode for 100 passes over 25 support images, in batches of 4, ``episodes`` fitted at once."""
    fit = partial(fit_prototypes, support_nodes(episodes, nodes), way=WAY, shot=5, lr=100.0, batch_size=4, **solver)
    fit(steps=1)
    return 100 / 10 * best_time(lambda: fit(steps=10)) / episodes


def published_sfc_time(nodes: int) -> float:
    support = support_nodes(1, nodes)[0]
    published_sfc(support, 1)
    return 100 / 3 * best_time(lambda: published_sfc(support, 3))


def peak_memory(deepemd: str, shot: int, image_size: int) -> float:
    """The peak memory of this process, in MB, over the encoding and the matching of 8 episodes."""
    model = DeepEMD(sfc_update_step=2).eval().folded()
    images = torch.randn(max(1, ENCODE_BATCH["cpu"] // PATCHES[deepemd]), PATCHES[deepemd], 3, image_size, image_size)
    with torch.no_grad():
        nodes = model.encode(images[:, 0] if deepemd == "fcn" else images).shape[2]
        episodes = torch.randn(8, WAY * (shot + QUERY), 640, nodes).abs()
        model.match(episodes[:, : WAY * shot], episodes[:, WAY * shot :], way=WAY, shot=shot)
    return megabytes("VmHWM")


def open_images(folder: Path, deepemd: str, image_size: int) -> ImageDataset:
    view = make_view(deepemd, train=False, image_size=image_size, **VARIANTS[deepemd])
    return ImageDataset("folder", "test", data_dir=str(folder), view=view)


def parts(basis: Basis, folder: Path, model: DeepEMD, image_size: int) -> None:
    print("\nSeconds per episode, nothing cached; solver opencv, 8 episodes fitted at once\n")
    published_way = ("published way: encoding*", "head", "SFC*", "ratio", "peak memory")
    print_row("variant", "shot", "loading", "encoding*", "head", "SFC*", *published_way)
    print_row(*["---"] * 11)
    for deepemd, patches in PATCHES.items():
        data = open_images(folder, deepemd, image_size)
        loading = best_time(lambda data=data: [data[index, 1] for index in range(20)]) / 20
        nodes = (image_size // 16) ** 2 if deepemd == "fcn" else patches
        head, published_head = head_times(model, nodes)
        for shot in (1, 5):
            images = WAY * (shot + QUERY)
            fit, published_fit = (sfc_time(nodes, 8), published_sfc_time(nodes)) if shot > 1 else (0.0, 0.0)
            now = images * patches * basis.encode, head, fit
            before = images * patches * basis.published_encode, published_head, published_fit
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                memory = fresh.submit(peak_memory, deepemd, shot, image_size).result()
            figures = [f"{seconds:.3f}" for seconds in (images * loading, *now, *before)]
            print_row(deepemd, shot, *figures, f"{sum(before) / sum(now):.1f}x", f"{memory:.0f} MB")


def sfc(basis: Basis, folder: Path, model: DeepEMD, image_size: int) -> None:
    print("\nSeconds per 5-shot episode in the structured fully connected layer (100 passes)\n")
    print_row("nodes", "published way*", "solver", "1 episode*", "ratio", "8 at once, per episode*", "ratio")
    print_row(*["---"] * 7)
    for nodes in sorted({(image_size // 16) ** 2, 9, 13}):
        published = published_sfc_time(nodes)
        for solver in ("opencv", "simplex", "simplex:gradient=cost"):
            one, eight = (sfc_time(nodes, episodes, solver=solver) for episodes in (1, 8))
            ratios = f"{one:.2f}", f"{published / one:.0f}x", f"{eight:.2f}", f"{published / eight:.0f}x"
            print_row(nodes, f"{published:.1f}", solver, *ratios)


def end_to_end(basis: Basis, folder: Path, model: DeepEMD, image_size: int) -> None:
    """1-shot fcn, as eval.py runs it."""
    data = open_images(folder, "fcn", image_size)
    published, encoding = 80 * basis.published_encode + basis.published_head, 80 * basis.encode

    def run(count: int, feature_cache: str) -> tuple[float, list[float]]:
        episodes = SeededEpisodes(EpisodeSampler(data.labels, count, WAY, 1 + QUERY), seed=1, name="test")
        settings = {"device": torch.device("cpu"), "num_workers": 1, "feature_cache": feature_cache}
        start = time.perf_counter()
        accuracies = Evaluator(data, way=WAY, shot=1, seed=1, **settings)(model, episodes).accuracies
        return (time.perf_counter() - start) / count, accuracies

    print(f"\n1-shot fcn, {image_size} pixels, seconds per episode. Published way: {published:.2f}*")
    seconds, uncached = run(4, "off")
    print(f"Without the cache, 4 episodes: {seconds:.2f}, {seconds / encoding:.2f}x of encoding their images alone")
    seconds, cached = run(200, "auto")
    ratio = f"{published / seconds:.0f}x faster than the published way"
    print(f"With the cache, 200 episodes over {len(data)} images: {seconds:.3f}, {ratio}")
    print(f"The first 4 episodes have the same accuracies with and without: {cached[:4] == uncached}")
    now, before = 12000 * basis.encode + 5000 * basis.head, 5000 * published
    times = f"{now / 60:.0f} min against {before / 3600:.1f} h, {before / now:.0f}x"
    print(f"The full protocol, 5000 episodes over 12,000 images, extrapolated*: {times}")


def training(basis: Basis, folder: Path, model: DeepEMD, image_size: int) -> None:
    """A meta-training epoch: 50 steps, then 1000 validation episodes over 9,600 images."""
    images, labels = torch.randn(80, 3, image_size, image_size), episode_labels(WAY, QUERY)

    def step(logits_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        nodes = model.encode(images)
        F.cross_entropy(logits_of(nodes[:WAY], nodes[WAY:]), labels).backward()

    model.train()
    ours = best_time(lambda: step(partial(model.match, way=WAY, shot=1)))
    theirs = best_time(lambda: step(published_logits))
    now = 50 * ours + 9600 * basis.encode + 1000 * basis.head
    before = 50 * theirs + 1000 * (80 * basis.published_encode + basis.published_head)
    times = f"{now / 60:.0f} min against {before / 60:.0f} min, {before / now:.1f}x faster"
    print(f"\nA meta-training epoch, fcn, extrapolated*: {times} (a step: {ours:.1f} s against {theirs:.1f} s)")


PARTS = {"parts": parts, "sfc": sfc, "end_to_end": end_to_end, "training": training}


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("-image_size", type=number_between(16, 1024, int), default=84, help="pixels along an edge")
    parser.add_argument("-only", choices=PARTS, help="measure this part (default: all of them)")
    threads = number_between(1, 1024, int)
    parser.add_argument("-threads", type=threads, default=torch.get_num_threads(), help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.threads} threads, {args.image_size} pixels, 5-way, 15 queries per class")
    model = DeepEMD().eval()
    basis = measure_basis(model, args.image_size)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        for name in [args.only] if args.only else PARTS:
            PARTS[name](basis, Path(folder), model, args.image_size)


if __name__ == "__main__":
    main()
