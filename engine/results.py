"""The test of a checkpoint: what eval.py does, and training ends with. results.json, and the line that is printed."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from engine.evaluation import Episodes, Evaluation, Evaluator, Model, Recorder
from engine.run import environment, fingerprint, result_flags
from utils import duration, write_json


class FinalTest(NamedTuple):
    """What :func:`final_test` found."""

    evaluation: Evaluation
    line: str  # what was tested and what came of it, for people
    content: dict[str, Any] | None  # of results.json; None on ranks other than the first


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
) -> FinalTest:
    """Evaluate a checkpoint, and write ``results.json``.

    Args:
        args: the flags of the script.
        folder: where ``results.json`` is written. The scores so far are recorded there as well.
        weights: the checkpoint that the model was loaded from; "none" for random weights.
        data: fingerprint of the images.
        resume: continue from the scores that an interrupted evaluation has recorded.
        solver: overrides the model's own.
        title: of the progress bar.
        keep: also write ``results-<identity>.json``, which evaluations of other flags, weights or data do not overwrite.

    Raises:
        DivergenceError, Stopped: as :meth:`engine.evaluation.Evaluator.__call__`.
    """
    ranks = evaluator.ranks
    loaded = fingerprint(weights)
    identity = {
        "flags": {**result_flags(args), "model_dir": None},
        "weights": loaded and loaded["sha256"],
        "data": data,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    recorder = Recorder(
        folder / f"partial-{digest}.json",
        resume=resume,
        episodes=len(episodes),
        queries=args.way * args.query,
        ranks=ranks,
    )
    evaluation = evaluator(model, episodes, solver=solver, title=title, recorder=recorder)
    task = f"{args.way}-way {args.shot}-shot, {len(episodes)} episodes"
    line, content = f"{task}: acc {evaluation} ({duration(recorder.seconds)})", None
    if ranks.is_first:
        content = {
            **evaluation._asdict(),
            "flags": vars(args),
            "versions": environment(),
            "seconds": recorder.seconds,
            "weights": loaded,
            "data": data,
        }
        for name in (f"results-{digest}.json",) * keep + ("results.json",):
            write_json(folder / name, content)
        recorder.remove()
    return FinalTest(evaluation, line, content)
