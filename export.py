"""A run or a checkpoint becomes a package: safetensors, config.json and a model card, to share and to use by name."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import copy
import importlib.util
import math
import os
import re
import shlex
import shutil
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dataloader import arguments as data
from dataloader.views import View
from engine.arguments import add_run_arguments, loader_processes
from engine.command_line import TRAINED_FLAGS, make_parser
from engine.evaluation import encode_images
from engine.run import environment
from engine.start import start
from engine.statistics import prepare_statistics
from engine.weights_flags import adopt_trained_flags, as_words
from Models import DeepEMD
from Models.arguments import OF_DEEPEMD, add_model_arguments, add_weights_arguments, open_model
from Models.backbones import backbone_class
from Models.package import FORMAT, PACKAGE_CONFIG, PACKAGE_WEIGHTS, STATISTICS, find_record, is_package, read_config
from Models.weights import load_encoder_weights
from pictures.canvas import save
from pictures.matches import ViewedImage, match_episode, view_items
from utils import (
    RECORD,
    InputError,
    check_writable,
    file_hash,
    named_generator,
    read_json,
    run_script,
    status,
    warn,
    write_atomically,
    write_json,
)

CARD, PICTURE, GRAPH = "README.md", "match.png", "encoder.onnx"
FILES = (PACKAGE_WEIGHTS, CARD, PICTURE, GRAPH, PACKAGE_CONFIG)  # in the order in which they are put in a package
# What a package records of an evaluation: the flags that decide its result, none of which names a file.
OF_HEAD = tuple(name for name in OF_DEEPEMD if name not in ("map_size", "feature_pyramid"))
OF_EVALUATION = (*TRAINED_FLAGS, *OF_HEAD, "set", "way", "shot", "query", "seed", "test_episode", "fixed_patches")
PROBE = {"way": 5, "shot": 1, "query": 4}  # the episode that a package is checked on
LARGEST_ERROR = 1e-3  # of what onnxruntime computes, relative to the largest node


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("package")
    out = "folder of the package: a new or an empty one, or a package, which is replaced"
    group.add_argument("-out", metavar="DIR", required=True, help=out)
    results = "results.json of eval.py or train_meta.py for these weights: rows of the card's table"
    group.add_argument("-results", nargs="+", default=[], metavar="FILE", help=results)
    spelled = "of the weights, as the Hub spells it: mit, apache-2.0, cc-by-nc-4.0"
    group.add_argument("-license", type=license_name, metavar="NAME", help=spelled)
    group.add_argument("-half", action="store_true", help="store float16; the change in logits is measured")
    onnx = f"add {GRAPH}, from 8-bit images to nodes, checked against onnxruntime"
    group.add_argument("-onnx", action="store_true", help=onnx)
    add_weights_arguments(parser)
    data.add_data_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_run_arguments(parser, has_folder=False)
    return parser


def license_name(text: str) -> str:
    """An argparse type: the Hub refuses a card with a licence that is not spelled like this."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise ArgumentTypeError(f"the Hub spells licences in lower case, as in mit or apache-2.0; got {text!r}")
    return text


def check_out(out: Path) -> None:
    """InputError for a folder that cannot be written, or has other files than a package; hidden ones, as of git, do not count."""
    if out.exists() and not out.is_dir():
        raise InputError(f"-out {out} is a file. Name a folder")
    names = {path.name for path in out.glob("*") if not path.name.startswith(".")} if out.exists() else set()
    if names and not (names <= set(FILES) and PACKAGE_CONFIG in names or names == {CARD}):
        raise InputError(f"-out {out} has other files than a package. Name a new folder, or the one of a package")
    check_writable(out / PACKAGE_CONFIG if out.exists() else out)


# --- What is known of the weights -------------------------------------------------------------------------------------


def read_results(files: Sequence[str], hashes: set[str]) -> list[dict[str, Any]]:
    """The rows of config.json from results.json files; InputError for one of other weights than those with these hashes."""

    def row(content: Any) -> dict[str, Any]:
        flags = dict(content["flags"])
        if "val_solver" in flags:  # of train_meta.py, whose -set is the validation split
            flags |= {"set": "test", "solver": flags["val_solver"]}
        is_set = {name for name, value in flags.items() if value is not None and value is not False}  # 0 is a value
        flags = {name: flags[name] for name in OF_EVALUATION if name in is_set}
        numbers = {name: float(content[name]) for name in ("accuracy", "interval", "loss")}
        if not all(map(math.isfinite, numbers.values())) or not 0 <= numbers["accuracy"] <= 100:
            raise ValueError("its accuracies are not numbers in percent")
        names = {"dataset": str, "set": str, "way": int, "shot": int}
        task = {name: kind(flags[name]) for name, kind in names.items()} | {"episodes": len(content["accuracies"])}
        weights = (content.get("weights") or {}).get("sha256")
        return {**task, **numbers, "flags": flags, "data": content.get("data"), "weights": weights}

    rows = []
    for file in files:
        found = read_json(Path(file), "the results of an evaluation", row)
        if found["weights"] not in hashes:
            known = f"weights of SHA-256 {found['weights'][:12]}..." if found["weights"] else "random weights"
            raise InputError(f"-results {file}: it was measured with {known}, not with those that are exported")
        rows += [found] if found not in rows else []
    return rows


def describe(args: Namespace, model: DeepEMD, weights: Path, stored: Path) -> dict[str, Any]:
    """The content of config.json for ``stored``, the weights of the package, which were written from ``weights``."""
    before = read_config(weights) if is_package(weights) else {}
    path = weights.parent / RECORD
    run = read_json(path, "the flags of a run", dict) if path.is_file() and not before else {}
    source = file_hash(weights) if weights.is_file() else None
    checkpoint = before["weights"].get("checkpoint") if before else source
    about = {"sha256": file_hash(stored), "dtype": "float16" if args.half else "float32", "checkpoint": checkpoint}
    about["parameters"] = sum(part.numel() for part in model.encoder.parameters())
    rows = read_results(args.results, {checkpoint, source, about["sha256"]} - {None})
    kept = [row for row in before.get("results", []) if row["flags"] not in [new["flags"] for new in rows]]
    return {
        "format": FORMAT,
        "backbone": args.backbone,
        "flags": {name: getattr(args, name) for name in TRAINED_FLAGS if name in args},
        "view": args.deepemd,
        "image_size": args.image_size,
        "mean": list(model.encoder.mean),
        "std": list(model.encoder.std),
        "head": {name: getattr(args, name) for name in OF_HEAD},
        "data": before.get("data") or {"set": args.dataset if args.model_dir else None, "fingerprint": run.get("data")},
        "results": kept + rows,
        "weights": about,
        "versions": before.get("versions") or run.get("versions") or environment(),
        "license": args.license or before.get("license"),
    }


# --- Checks on images -------------------------------------------------------------------------------------------------


def make_probe(args: Namespace, view: View) -> tuple[list[ViewedImage], list[str], str]:
    """An episode on which the package is compared with the model: its images, support first, the names of its classes, and
    what it is. Of the test split if the data set is there; random pixels of classes without names otherwise.
    """
    count = PROBE["way"] * (1 + PROBE["query"])
    try:
        dataset = data.open_dataset(args, "test", train=False)
        shape = Namespace(**{**vars(args), **PROBE})
        items = data.draw_episodes(shape, dataset, 1, seed=args.seed, name="test")[0]
        viewed = view_items(dataset, items)
    except InputError as error:
        status(f"{args.dataset} is not there: checked on random images, and no picture ({error})")
        shape = (count, *(view.patches,) * (args.deepemd != "fcn"), 3, args.image_size, args.image_size)
        pixels = torch.randint(0, 256, shape, generator=named_generator(args.seed, "export"), dtype=torch.uint8)
        return [ViewedImage(one, None, []) for one in pixels], [], f"{count} random images"
    names = [dataset.class_names[dataset.labels[index]] for index, _ in items[: PROBE["way"]]]
    return viewed, names, f"an episode of the {args.dataset} test split"


@torch.no_grad()
def measure(model: DeepEMD, pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The nodes ``(W + Q, C, N)`` of an episode and its logits ``(Q, W)``, by the model's solver."""
    nodes, way = encode_images(model.folded(), pixels, device=device), PROBE["way"]
    return nodes, model.match(nodes[:way], nodes[way:], way=way, shot=1)


def draw_picture(
    model: DeepEMD, view: View, viewed: Sequence[ViewedImage], device: torch.device, *, names: Sequence[str], title: str
) -> Figure:
    """The query of an episode that is given to its class with the highest probability, as it is matched."""
    way = PROBE["way"]
    episode = match_episode(model.folded(), view, viewed, way=way, shot=1, device=device)
    probability = episode.matching.logits.softmax(1).tolist()
    number = max(range(len(probability)), key=lambda k: probability[k][k % way])
    return episode.draw(number, names=names, title=title, flows=10, truth=number % way)


def write_graph(model: DeepEMD, pixels: Tensor, nodes: Tensor, path: Path) -> str:
    """Write the encoder as an ONNX graph, and compare what it makes of ``pixels`` with ``nodes``; the result in words."""
    try:
        import onnx  # noqa: F401 - which torch needs to write the file
        import onnxruntime
    except ImportError as error:
        raise InputError(f"-onnx requires two libraries: pip install onnx onnxruntime ({error})") from error
    free = {"images": {0: "B"}, "nodes": {0: "B"}}
    names = {"input_names": ["images"], "output_names": ["nodes"], "dynamic_axes": free}
    network = model.folded().eval().cpu()
    network.forward = network.encode  # what is traced
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns that it sees one shape only
            torch.onnx.export(network, (pixels[:2],), str(path), opset_version=17, dynamo=False, **names)
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
    except Exception as error:  # an operation that ONNX or onnxruntime lacks; three libraries raise errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"-onnx: this encoder cannot be written as a graph ({reason}). Leave -onnx out") from error
    error, largest = float((found - nodes.cpu()).abs().max()), float(nodes.abs().max())
    if not error <= LARGEST_ERROR * largest:
        raise InputError(f"-onnx: onnxruntime finds other nodes, by {error:.2g} of {largest:.2g}. Leave -onnx out")
    return f"at most {error:.1e} from torch's nodes, the largest of which is {largest:.2g}"


# --- The card ---------------------------------------------------------------------------------------------------------


def card(config: dict[str, Any], name: str, notes: Sequence[str], *, has_picture: bool) -> str:
    """The README.md of a package, as the Hub reads it."""
    picture = f"![A query, its classes, and what was matched with what]({PICTURE})\n\n"
    picture += "The query of a test episode that was given to its class with the highest probability.\n\n"
    flags, data_set = config["flags"], (config["data"] or {}).get("set")
    versions = (f"{library} {version}" for library, version in (config["versions"] or {}).items())
    used = as_words({key: value for key, value in flags.items() if value is not None})
    notes = "".join(f"- {note}\n" for note in notes)
    facts = f"{config['weights']['parameters'] / 1e6:.1f} million parameters, images of {config['image_size']} pixels"
    return f"""\
---
{_metadata(config, name)}
---

# {name}

A few-shot image classifier: an image becomes nodes, and images are compared by their nodes, with the head `{flags["head"]}` of
DeepEMD. {f"Trained on {data_set}. " if data_set else ""}Backbone {config["backbone"]}, {facts}.

{picture if has_picture else ""}## Use

From a checkout of DeepEMD; `PACKAGE` is this folder, or `hf://owner/name` where it was uploaded:

```python
import deepemd
model = deepemd.load("PACKAGE")
for answer in model.classify("examples", "photographs"):  # examples/<class>/<image>
    print(answer.file, answer.class_name, answer.probability)
```

```bash
python predict.py -model_dir PACKAGE -support examples -query photographs
python eval.py -model_dir PACKAGE -dataset {flags["dataset"]}
```

## Results

{_table(config)}

## Details

- flags: `{used}`
{notes}- SHA-256 of {PACKAGE_WEIGHTS}: `{config["weights"]["sha256"]}`
- versions: {", ".join(versions)}
- licence of the weights: {config["license"] or "not stated"}
"""


def _metadata(config: dict[str, Any], name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for row in config["results"]:
        task = f"{row['way']}-way {row['shot']}-shot"
        data_set = {"dataset_type": row["dataset"], "dataset_name": row["dataset"], "dataset_split": row["set"]}
        further = f"{row['episodes']} episodes {_further(config, row)}"
        data_set["dataset_config"] = f"{task}, {row['flags'].get('head', '')}, {further}".strip()
        metric = {"metric_type": "accuracy", "metric_value": round(row["accuracy"], 2)}
        metric["metric_name"] = f"accuracy, 95 % interval +- {row['interval']:.2f}"
        results.append(EvalResult(task_type="image-classification", task_name=task, **data_set, **metric))
    known = {"license": config["license"], "library_name": "deepemd", "pipeline_tag": "image-classification"}
    known["tags"] = ["few-shot-learning", "earth-movers-distance", "deepemd"]
    return ModelCardData(**known, **({"model_name": name, "eval_results": results} if results else {})).to_yaml()


def _table(config: dict[str, Any]) -> str:
    if not config["results"]:
        return "None are recorded. `python eval.py` measures them, and `export.py -results` adds them."
    lines = ["Accuracy in percent over episodes, with its 95 % interval.\n"]
    lines += ["| data set | split | task | head | episodes | accuracy | further flags |", "|---" * 7 + "|"]
    for row in config["results"]:
        task, found = f"{row['way']}-way {row['shot']}-shot", f"{row['accuracy']:.2f} ± {row['interval']:.2f}"
        head, further = row["flags"].get("head", ""), _further(config, row)
        cells = (row["dataset"], row["set"], task, head, row["episodes"], found, further)
        lines += [f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"]
    return "\n".join(lines)


def _further(config: dict[str, Any], row: dict[str, Any]) -> str:
    """The flags of an evaluation that have no column of their own, where they are neither defaults nor the package's."""
    usual = {**vars(build_parser().parse_args(["-out", "."])), **config["flags"], "query": 15, "seed": 1}
    others = [key for key in row["flags"] if key not in ("dataset", "set", "way", "shot", "head", "test_episode")]
    pairs = [(as_words({key: row["flags"][key]}), as_words({key: usual.get(key)})) for key in others]
    return " ".join(word for word, default in pairs if word != default)


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_weights(model: DeepEMD, path: Path, *, half: bool) -> None:
    """Write the encoder, and the statistics of training nodes if the model has them."""
    from safetensors.torch import save as to_bytes

    tensors = {}
    for key, value in model.encoder.state_dict().items():
        value = value.detach().cpu().contiguous()
        tensors[key] = value.half() if half and value.is_floating_point() else value.clone()
        if not tensors[key].isfinite().all():
            raise InputError(f"-half: {key} has numbers that float16 does not. Leave -half out")
    if (statistics := model.settings.statistics) is not None:
        tensors |= {f"{STATISTICS}{name}": part.cpu().contiguous() for name, part in vars(statistics).items()}
    write_atomically(path, to_bytes(tensors, metadata={"format": "pt"}))


def write_package(args: Namespace, folder: Path, model: DeepEMD, weights: Path, device: torch.device) -> list[str]:
    """Write all files of a package to a folder, and read the weights back; return what to print about it."""
    view = data.view_of(args, train=False)
    write_weights(model, folder / PACKAGE_WEIGHTS, half=args.half)
    config = describe(args, model, weights, folder / PACKAGE_WEIGHTS)
    write_json(folder / PACKAGE_CONFIG, config)
    (viewed, names, what), notes = make_probe(args, view), []
    pixels = torch.stack([one.pixels for one in viewed])
    _, logits = measure(model, pixels, device)
    read_back = copy.deepcopy(model)
    load_encoder_weights(read_back, folder)
    nodes, stored = measure(read_back, pixels, device)
    change, size = float((stored - logits).abs().max()), f"{(folder / PACKAGE_WEIGHTS).stat().st_size / 1e6:.1f} MB"
    if args.half:
        before = read_config(weights)["weights"] if is_package(weights) else {}
        first = before.get("logit_change")  # of a package in half precision, whose weights change no more
        config["weights"]["logit_change"] = change if first is None else first
        write_json(folder / PACKAGE_CONFIG, config)
        note = f"stored in float16, {size}: logits change by at most {config['weights']['logit_change']:.2g}"
        if first is None:
            flips = f"{int((stored.argmax(1) != logits.argmax(1)).sum())} of {len(logits)} answers change"
            note += f", the largest of which is {float(logits.abs().max()):.2g}; {flips} ({what})"
        if any(row.get("weights") != config["weights"]["sha256"] for row in config["results"]):
            note += ". The results were measured before the conversion"
        notes.append(note)
    elif change:
        raise InputError(f"the package does not compute what {weights} does: logits change by {change:.2g}")
    if args.onnx:
        notes.append(f"{GRAPH}: {write_graph(read_back, pixels, nodes, folder / GRAPH)} ({what})")
    if has_picture := bool(names) and model.settings.head == "deepemd":
        save(draw_picture(read_back, view, viewed, device, names=names, title=what), folder / PICTURE)
    name = Path(os.path.abspath(args.out)).name
    write_atomically(folder / CARD, card(config, name, notes, has_picture=has_picture).encode())
    return [*notes, f"package: {args.out} ({size}, sha256 {config['weights']['sha256']})"]


def put(folder: Path, out: Path) -> None:
    """Move a complete package to its place; until then the earlier one stays intact."""
    if not out.exists():
        folder.rename(out)
        return
    (out / PACKAGE_CONFIG).unlink(missing_ok=True)  # it is moved last: without it, a package is refused
    for name in FILES:
        if (folder / name).exists():
            (folder / name).replace(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    folder.rmdir()


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    is_pretrained = backbone_class(args.backbone)[0].comes_with_weights and args.backbone_weights != "none"
    if args.model_dir == "none" or args.model_dir is None and not is_pretrained:
        parser.error("-model_dir names what is exported: a checkpoint, or the folder of a run")
    if missing := [name for name in ("safetensors", "huggingface_hub") if not importlib.util.find_spec(name)]:
        raise InputError(f"export.py requires {' and '.join(missing)}: pip install {' '.join(missing)}")
    out = Path(args.out)
    check_out(out)
    adopt_trained_flags(parser, args, argv)
    if args.model_dir and "dataset" not in parser.given(argv) and not find_record(args.model_dir)[0].is_file():
        warn(
            f"no {RECORD} beside the weights: the card names {args.dataset} as their training data, unless you set -dataset"
        )
    _, device, device_ids = start(args, one_process=True)
    model, weights = open_model(args, device=device, device_ids=device_ids[:1], **data.pixel_statistics(args))
    source = {"open_train": partial(data.open_base_images, args), "num_workers": loader_processes(args)}
    prepare_statistics(args, model, weights, device=device, **source)
    # A package in half precision stays so: its weights have no more digits.
    args.half |= is_package(Path(weights)) and read_config(Path(weights))["weights"].get("dtype") == "float16"
    model = model.eval()
    place = Path(os.path.realpath(out))
    folder = place.with_name(f".{place.name}.part")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir(parents=True)
    try:
        notes = write_package(args, folder, model, Path(weights), device)
        put(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(notes))
    print(f"next: python eval.py -model_dir {shlex.quote(str(out))}")


if __name__ == "__main__":
    run_script(main)
