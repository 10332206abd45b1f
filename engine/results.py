"""The test of a checkpoint: what eval.py does, and training ends with. results.json, and the line that is printed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from engine.evaluation import Confusion, Episodes, Evaluator, Model, Recorder, Score
from engine.run import environment, fingerprint, result_flags
from utils import duration, first_few, printable, write_csv, write_json

# Of more classes than this, results have no matrix: it would be larger than all else in them.
MOST_CLASSES = 500


def describe_confusion(confusion: Confusion, names: Sequence[str]) -> dict[str, Any]:
    """What classes were taken for what: ``class_accuracy``, in percent, of those that had a query, and ``confusion``.

    In the matrix ``counts``, a row is a true class and a column a predicted one. More than 500 classes have none.
    """
    totals = [0] * len(names)
    for (true, _), count in confusion.items():
        totals[true] += count
    accuracy = {name: 100 * confusion[k, k] / totals[k] for k, name in enumerate(names) if totals[k]}
    if len(names) > MOST_CLASSES:
        return {"class_accuracy": accuracy}
    counts = [[confusion[true, found] for found in range(len(names))] for true in range(len(names))]
    return {"class_accuracy": accuracy, "confusion": {"classes": list(names), "counts": counts}}


def confusion_lines(names: Sequence[str], counts: Sequence[Sequence[int]]) -> list[str]:
    """A line for each class that had a query: its accuracy, how many it had, and what it was taken for instead."""
    rows = []
    for true, (name, row) in enumerate(zip(names, counts, strict=True)):
        if total := sum(row):
            others = [found for found, count in enumerate(row) if count and found != true]
            others.sort(key=lambda found: -row[found])
            taken = first_few([f"{printable(names[found])} ({row[found]})" for found in others]) if others else ""
            rows.append((printable(name), 100 * row[true] / total, total, taken))
    width = max(len("class"), *(len(name) for name, *_ in rows))
    lines = [f"{'class':{width}}  accuracy   of  taken for"]
    lines += [f"{name:{width}}  {accuracy:6.1f} %  {total:3}  {taken}" for name, accuracy, total, taken in rows]
    return [line.rstrip() for line in lines]


def _episode_rows(dataset: Dataset, episodes: Episodes, way: int, scores: Sequence[Score]) -> Iterator[tuple[Any, ...]]:
    for k, score in enumerate(scores):
        classes = [dataset.class_names[dataset.labels[index]] for index, _ in episodes[k][:way]]
        yield k, score.accuracy, score.loss, ";".join(classes)


def final_test(
    evaluator: Evaluator,
    model: Model,
    episodes: Episodes,
    args: Any,
    folder: Path,
    *,
    weights: str | Path,
    data: dict[str, Any],
    resume: bool = False,
    solver: str | None = None,
    title: str = "test",
    keep: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Evaluate a checkpoint, and write ``results.json``; return a line for people, and the content of the file.

    Arguments and errors are those of :meth:`engine.evaluation.Evaluator.__call__`, and:

    Args:
        args: the flags of the script.
        folder: where ``results.json`` is written, and the scores so far are recorded.
        weights: the checkpoint that the model was loaded from; "none" for random weights.
        data: fingerprint of the images.
        resume: continue from the recorded scores.
        keep: also write ``results-<identity>.json``, which evaluations of other flags, weights or data do not overwrite.
    """
    ranks, loaded = evaluator.ranks, fingerprint(weights)
    flags = {**result_flags(args), "model_dir": None}
    encoder = getattr(getattr(model, "encoder", None), "identity", dict)()
    known = {"flags": flags, "weights": loaded and loaded["sha256"], "encoder": encoder, "data": data}
    statistics = {"statistics": model.statistics_hash} if model.statistics_hash else {}
    identity = json.dumps({**known, **statistics}, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    shape = {"episodes": len(episodes), "queries": args.way * args.query}
    recorder = Recorder(folder / f"partial-{digest}.json", resume=resume, ranks=ranks, **shape)
    evaluation = evaluator(model, episodes, solver=solver, title=title, recorder=recorder)
    task = f"{args.way}-way {args.shot}-shot, {len(episodes)} episodes"
    content = {**evaluation._asdict(), "flags": vars(args), "versions": environment()}
    content |= {"seconds": recorder.seconds, "weights": loaded, "encoder": encoder, "data": data, **statistics}
    if recorder.confusion:
        content |= describe_confusion(recorder.confusion, evaluator.dataset.class_names)
    if ranks.is_first:
        if csv := getattr(args, "csv", None):
            rows = _episode_rows(evaluator.dataset, episodes, args.way, recorder.scores)
            write_csv(Path(csv), ("episode", "accuracy", "loss", "classes"), rows)
        for name in (f"results-{digest}.json",) * keep + ("results.json",):
            write_json(folder / name, content)
        recorder.remove()
    return f"{task}: acc {evaluation} ({duration(content['seconds'])})", content
