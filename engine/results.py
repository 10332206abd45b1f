"""The test of a checkpoint: what eval.py does, and training ends with. results.json, and the line that is printed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from engine.evaluation import Episodes, Evaluator, Model, Recorder
from engine.run import environment, fingerprint, result_flags
from utils import duration, write_json


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
    encoder = model.encoder.identity() if hasattr(model, "encoder") else None
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
    if ranks.is_first:
        for name in (f"results-{digest}.json",) * keep + ("results.json",):
            write_json(folder / name, content)
        recorder.remove()
    return f"{task}: acc {evaluation} ({duration(content['seconds'])})", content
