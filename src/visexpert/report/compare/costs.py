"""What a run cost in training and costs at inference, in figures that old and new runs share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visexpert.report.compare.record import PHASES, RunRecord, is_run, read_run
from visexpert.report.compare.scores import Score
from visexpert.report.compare.variants import Variant
from visexpert.timing import is_unsteady

MS = "cost/ms_vision"

COSTS = (
    Score("cost/parameters_trained", "trained, M", -1),
    Score("cost/parameters_inference", "at inference, M", -1),
    Score("cost/parameters_total", "with teachers, M", -1),
    Score("cost/train_images", "images seen", 0),
    Score("cost/train_gflop", "training GFLOP", -1),
    Score("cost/train_gflop_live", "the same, encoders live", -1),
    Score("cost/train_hours", "training hours", -1),
    Score("cost/all_train_gflop_live", "GFLOP, live, with its start", -1),
    Score("cost/all_train_hours", "hours with its start", -1),
    Score(MS, "vision ms/image", -1),
    Score("cost/gflop_vision", "vision GFLOP/image", -1),
    Score("cost/gflop_language", "language GFLOP/image", -1),
)
"""Columns of the table of costs."""

_SUMMED = ("train_images", "train_gflop", "train_gflop_live", "train_hours")
_OWN_STEPS = {"merge": "merge.steps", "detachment": "detachment.retune_steps"}
_DEEPEST = 8


def with_costs(run: RunRecord) -> RunRecord:
    """The run with figures derived from what it recorded.

    ``cost/ms_vision`` and ``cost/train_hours`` are other units; ``cost/train_images`` is steps times batch where a run
    has not counted; ``cost/all_...`` adds what the run took that it started from (``init_from``, or the run that was
    merged or detached), is the same where there is none, and is left out where that is not known.
    """
    return replace(run, metrics=_derived(run, _DEEPEST))


def unsteady(variant: Variant) -> bool:
    """Whether the milliseconds of any of its runs are to be marked."""
    return any(MS in run.metrics and is_unsteady(run.metrics) for run in variant.runs)


def _derived(run: RunRecord, deepest: int) -> dict[str, float]:
    metrics = dict(run.metrics)
    if metrics.get("cost/images_per_s"):
        metrics[MS] = 1000 / metrics["cost/images_per_s"]
    own = _own(run)
    metrics |= {f"cost/{name}": value for name, value in own.items() if value is not None}
    before = _before(run, deepest)
    for name in _SUMMED:
        mine, earlier = own[name], before.get(name)
        if mine is not None and earlier is not None:
            metrics[f"cost/all_{name}"] = mine + earlier
    return metrics


def _before(run: RunRecord, deepest: int) -> dict[str, float | None]:
    """What the runs took that this one started from: nothing without a start; empty where it is not known."""
    start = start_of(run)
    if start is None:
        return dict.fromkeys(_SUMMED, 0.0)
    if deepest == 0 or not is_run(start) or start.resolve() == run.folder.resolve():
        return {}
    earlier = _derived(read_run(start), deepest - 1)
    return {name: earlier.get(f"cost/all_{name}") for name in _SUMMED}


def start_of(run: RunRecord) -> Path | None:
    """Folder of the run that this one went on from; None for none, or for bare weights."""
    if _phase(run) is not None:
        return run.folder.parent if is_run(run.folder.parent) else None
    if run.start is None:
        return None
    path = Path(run.start)
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _own(run: RunRecord) -> dict[str, float | None]:
    """Images, work and hours of the run's own training; None where it has not recorded them."""
    metrics = run.metrics
    if not _trained(run):
        return dict.fromkeys(_SUMMED, 0.0)
    seconds = metrics.get("cost/train_seconds")
    return {
        "train_images": metrics.get("cost/train_images", _images(run)),
        "train_gflop": metrics.get("cost/train_gflop"),
        "train_gflop_live": metrics.get("cost/train_gflop_live"),
        "train_hours": None if seconds is None else seconds / 3600,
    }


def _trained(run: RunRecord) -> bool:
    """Whether the folder's own stages trained anything: a test of another run's checkpoint did not."""
    phase = _phase(run)
    if phase == "detachment":
        return bool(run.settings.get(_OWN_STEPS[phase]))
    return phase is not None or "fit" in run.environment


def _images(run: RunRecord) -> float | None:
    """Steps times images a step, on one device."""
    phase = _phase(run)
    steps = run.metrics.get("cost/steps") if phase is None else run.settings.get(_OWN_STEPS[phase])
    batch = run.settings.get("data.batch_size")
    accumulated = run.settings.get("trainer.accumulate_grad_batches") or 1
    if not steps or not isinstance(batch, int) or not isinstance(accumulated, int):
        return None
    return float(steps) * batch * accumulated


def _phase(run: RunRecord) -> str | None:
    return next((phase for name, phase in PHASES.items() if (run.folder / name).is_file()), None)
