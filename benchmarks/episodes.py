"""Time and memory of an episode, by variant and shot, compared with the same episode done the published way.

    python benchmarks/episodes.py                        the whole table at 84 pixels (about a quarter of an hour)
    python benchmarks/episodes.py -image_size 32         a quick look
    python benchmarks/episodes.py -only end_to_end       one part: parts, sfc, end_to_end, training

"parts" prints a row per variant and shot; its memory is the peak of a fresh process that runs this project's way alone.

The published way encodes every image of every episode, expands similarities to (Q, W, N, N, C) tensors, and calls the solver once
per pair of query and prototype. It is written here from its description, and runs in the same process on the same threads.
Times are the best of at least two calls. Encoding is measured on one batch and multiplied by the number of images; extrapolated
figures are marked with *.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_memory import megabytes

from dataloader import EpisodeSampler, ImageDataset, SeededEpisodes, episode_labels, make_view
from engine.evaluation import ENCODE_BATCH, Evaluator
from Models import DeepEMD
from Models.sfc import fit_prototypes

WAY, QUERY = 5, 15
VARIANTS = {"fcn": {}, "grid": {"patch_list": (2, 3)}, "sampling": {"num_patch": 9}}
PATCHES = {"fcn": 1, "grid": 13, "sampling": 9}
CPU = torch.device("cpu")


def best_time(work: Callable[[], object], calls: int = 2) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


# --- the published way ---


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
    for i in range(q):
        for j in range(w):
            sides = []
            for weight in (supply[i, j], demand[j, i]):
                weight = F.relu(weight.detach()) + 1e-5
                sides.append((weight * (n / weight.sum().item())).view(-1, 1).numpy())
            flow = cv2.EMD(*sides, cv2.DIST_USER, (1 - similarity[i, j]).detach().numpy())[2]
            flows[i, j] = torch.from_numpy(flow)
    return (similarity * flows).sum((2, 3)) * (12.5 / n)


def published_sfc(support: Tensor, shot: int, passes: int, lr: float) -> Tensor:
    proto = support.view(shot, WAY, *support.shape[1:]).mean(0).clone().requires_grad_()
    optimizer = torch.optim.SGD([proto], lr=lr, momentum=0.9, dampening=0.9)
    labels = torch.arange(WAY).repeat(shot)
    for _ in range(passes):
        for chosen in torch.randperm(len(support)).split(4):
            optimizer.zero_grad()
            F.cross_entropy(published_logits(proto, support[chosen]), labels[chosen]).backward()
            optimizer.step()
    return proto.detach()


# --- parts ---


def random_images(folder: Path, classes: int, per_class: int, size: int) -> None:
    random = np.random.RandomState(0)
    for number in range(classes):
        (folder / "test" / f"class{number:02d}").mkdir(parents=True)
        for image in range(per_class):
            pixels = random.randint(0, 255, (size // 8, size // 8, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            picture.save(folder / "test" / f"class{number:02d}" / f"{image:03d}.jpg", quality=90)


def open_images(folder: Path, deepemd: str, image_size: int) -> ImageDataset:
    view = make_view(deepemd, train=False, image_size=image_size, **VARIANTS[deepemd])
    return ImageDataset("folder", "test", data_dir=str(folder), view=view)


def encoding_times(model: DeepEMD, image_size: int) -> tuple[float, float]:
    """Seconds per image (or patch): ours, and the published way, which encodes an episode's 80 images at once."""
    folded, batch = model.folded(), torch.randn(ENCODE_BATCH["cpu"], 3, image_size, image_size)
    episode = torch.randn(80, 3, image_size, image_size)
    with torch.no_grad():
        folded.encode(batch)
        ours = best_time(lambda: folded.encode(batch)) / len(batch)
        return ours, best_time(lambda: model.encode(episode)) / len(episode)


def head_times(model: DeepEMD, nodes: int) -> tuple[float, float]:
    """Seconds to match 75 queries with 5 prototypes: ours, and the published way."""
    support, query = torch.randn(WAY, 640, nodes).abs(), torch.randn(WAY * QUERY, 640, nodes).abs()
    with torch.no_grad():
        ours = best_time(lambda: model.match(support, query, way=WAY, shot=1), 5)
        return ours, best_time(lambda: published_logits(support, query))


def sfc_times(nodes: int, solver: str, episodes: int, **options: str) -> float:
    """Seconds per episode for 100 passes over 25 support images, in batches of 4, ``episodes`` fitted at once."""
    support = torch.randn(episodes, 5 * WAY, 640, nodes, generator=torch.Generator().manual_seed(0)).abs()
    settings = {"way": WAY, "shot": 5, "lr": 100.0, "batch_size": 4, "solver": solver, **options}
    fit_prototypes(support, steps=1, **settings)
    return 100 / 10 * best_time(lambda: fit_prototypes(support, steps=10, **settings)) / episodes


def published_sfc_time(nodes: int) -> float:
    support = torch.randn(5 * WAY, 640, nodes, generator=torch.Generator().manual_seed(0)).abs()
    published_sfc(support, 5, 1, 100.0)
    return 100 / 3 * best_time(lambda: published_sfc(support, 5, 3, 100.0))


def peak_memory(deepemd: str, shot: int, image_size: int) -> None:
    """Print the peak memory of this process, in MB, over the encoding and the matching of 8 episodes."""
    model = DeepEMD(sfc_update_step=2).eval().folded()
    images = torch.randn(max(1, ENCODE_BATCH["cpu"] // PATCHES[deepemd]), PATCHES[deepemd], 3, image_size, image_size)
    with torch.no_grad():
        nodes = model.encode(images[:, 0] if deepemd == "fcn" else images).shape[2]
        episodes = torch.randn(8, WAY * (shot + QUERY), 640, nodes).abs()
        model.match(episodes[:, : WAY * shot], episodes[:, WAY * shot :], way=WAY, shot=shot)
    print(megabytes("VmHWM"))


def memory_in_a_fresh_process(deepemd: str, shot: int, image_size: int) -> float:
    command = [sys.executable, __file__, "-image_size", str(image_size), "-memory_of", f"{deepemd};{shot}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parts(folder: Path, model: DeepEMD, image_size: int) -> None:
    ours, published = encoding_times(model, image_size)
    side = image_size // 16
    print("\nSeconds per episode, nothing cached; solver opencv, 8 episodes fitted at once\n")
    print(
        "| variant | shot | loading | encoding* | head | SFC* | published way: encoding* | head | SFC* | ratio | peak memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for deepemd, patches in PATCHES.items():
        data = open_images(folder, deepemd, image_size)
        loading = best_time(lambda data=data: [data[index, 1] for index in range(20)]) / 20
        nodes = side * side if deepemd == "fcn" else patches
        head, published_head = head_times(model, nodes)
        for shot in (1, 5):
            images = WAY * (shot + QUERY)
            fit, published_fit = (sfc_times(nodes, "opencv", 8), published_sfc_time(nodes)) if shot > 1 else (0.0, 0.0)
            now = images * patches * ours, head, fit
            before = images * patches * published, published_head, published_fit
            print(
                f"| {deepemd} | {shot} | {images * loading:.2f} | {now[0]:.2f} | {now[1]:.3f} | {now[2]:.2f} | {before[0]:.2f} "
                f"| {before[1]:.3f} | {before[2]:.1f} | {sum(before) / sum(now):.1f}x "
                f"| {memory_in_a_fresh_process(deepemd, shot, image_size):.0f} MB |",
                flush=True,
            )


def sfc(image_size: int) -> None:
    """5-shot: the structured fully connected layer, 100 passes over 25 support images in batches of 4."""
    side = image_size // 16
    print("\nSeconds per 5-shot episode in the structured fully connected layer (100 passes)\n")
    print("| nodes | published way* | solver | 1 episode | ratio | 8 episodes at once, per episode | ratio |")
    print("|---|---|---|---|---|---|---|")
    for nodes in sorted({side * side, 9, 13}):
        published = published_sfc_time(nodes)
        for solver, options in (("opencv", {}), ("simplex", {}), ("simplex", {"gradient": "cost"})):
            one, eight = (sfc_times(nodes, solver, episodes, **options) for episodes in (1, 8))
            name = ", ".join([solver, *(f"-emd_gradient {value}" for value in options.values())])
            print(
                f"| {nodes} | {published:.1f} | {name} | {one:.2f}* | {published / one:.0f}x "
                f"| {eight:.2f}* | {published / eight:.0f}x |",
                flush=True,
            )


def end_to_end(folder: Path, model: DeepEMD, image_size: int) -> None:
    """1-shot fcn, as eval.py runs it."""
    data = open_images(folder, "fcn", image_size)
    side = image_size // 16
    encode, published_encode = encoding_times(model, image_size)
    head, published_head = head_times(model, side * side)
    published = 80 * published_encode + published_head

    def run(count: int, feature_cache: str) -> tuple[float, list[float]]:
        episodes = SeededEpisodes(EpisodeSampler(data.labels, count, WAY, 1 + QUERY), seed=1, name="test")
        start = time.perf_counter()
        evaluator = Evaluator(data, way=WAY, shot=1, device=CPU, seed=1, num_workers=1, feature_cache=feature_cache)
        accuracies = evaluator(model, episodes).accuracies
        return time.perf_counter() - start, accuracies

    seconds, uncached = run(4, "off")
    print(f"\n1-shot fcn, {image_size} pixels. Published way: {published:.2f} s per episode*.")
    print(
        f"Without the cache, 4 episodes: {seconds / 4:.2f} s per episode, {seconds / (4 * 80 * encode):.2f}x of encoding "
        f"those images alone; the head takes {100 * head / (80 * encode):.1f} % of that"
    )
    seconds, cached = run(200, "auto")
    print(
        f"With the cache, 200 episodes over {len(data)} images: {seconds / 200:.3f} s per episode, "
        f"{200 * published / seconds:.0f}x faster than the published way"
    )
    print(
        f"Accuracies of the first 4 episodes with and without: {'the same' if cached[:4] == uncached else 'NOT the same'}"
    )
    protocol, before = 12000 * encode + 5000 * head, 5000 * published
    print(
        f"Extrapolated to the full protocol (5000 episodes over 12,000 images): {protocol / 60:.0f} min against "
        f"{before / 3600:.1f} h, {before / protocol:.0f}x*"
    )


def training(model: DeepEMD, image_size: int) -> None:
    """A meta-training epoch: 50 steps, then 1000 validation episodes over 9,600 images."""
    encode, published_encode = encoding_times(model, image_size)
    side = image_size // 16
    head, published_head = head_times(model, side * side)
    images, labels = torch.randn(80, 3, image_size, image_size), episode_labels(WAY, QUERY)
    model.train()

    def step(logits_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        nodes = model.encode(images)
        F.cross_entropy(logits_of(nodes[:WAY], nodes[WAY:]), labels).backward()

    ours = best_time(lambda: step(lambda s, q: model.match(s, q, way=WAY, shot=1)), 2)
    theirs = best_time(lambda: step(published_logits), 2)
    model.eval()
    now, before = 50 * ours + 9600 * encode + 1000 * head, 50 * theirs + 1000 * (80 * published_encode + published_head)
    print(
        f"\nA meta-training epoch of 50 steps and 1000 validation episodes, fcn, {image_size} pixels, extrapolated*: "
        f"{now / 60:.0f} min against {before / 60:.0f} min, {before / now:.1f}x faster "
        f"(a step: {ours:.1f} s against {theirs:.1f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-image_size", type=int, default=84)
    parser.add_argument("-only", choices=("parts", "sfc", "end_to_end", "training"))
    parser.add_argument("-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-memory_of", help=argparse.SUPPRESS)  # used by memory_in_a_fresh_process
    args = parser.parse_args()
    if args.memory_of:
        deepemd, shot = args.memory_of.split(";")
        peak_memory(deepemd, int(shot), args.image_size)
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.threads} threads, {args.image_size} pixels, 5-way, 15 queries per class")
    model = DeepEMD().eval()
    with tempfile.TemporaryDirectory() as folder:
        random_images(Path(folder), classes=20, per_class=25, size=160)
        if args.only in (None, "parts"):
            parts(Path(folder), model, args.image_size)
        if args.only in (None, "sfc"):
            sfc(args.image_size)
        if args.only in (None, "end_to_end"):
            end_to_end(Path(folder), model, args.image_size)
        if args.only in (None, "training"):
            training(model, args.image_size)


if __name__ == "__main__":
    main()
