"""Which scores and costs are shown, under what names, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visexpert.errors import ConfigError
from visexpert.report.compare.record import PHASES, RunRecord, is_run, read_run
from visexpert.report.compare.variants import Variant
from visexpert.report.tables import is_count
from visexpert.timing import is_unsteady

HEADLINES = {
    "vqa/accuracy": "VQA",
    "vqa/family/distance": "VQA distance",
    "vqa/family/size": "VQA size",
    "vsr/accuracy": "VSR",
    "pope/adversarial/accuracy": "POPE adversarial",
    "pope/accuracy": "POPE",
    "caption/relation": "caption relation",
    "caption/cider": "CIDEr",
    "slots/accuracy": "dense slots",
    "nll/kind/dense": "dense NLL",
    "nll/nll": "NLL",
    "probe/object_depth": "object depth probe",
    "knn/student": "kNN",
    "knn/frozen": "kNN, frozen encoder",
}
"""Scores of the first table, by key without its split, in its order; of the two of POPE the first that is there."""

LOWER_IS_BETTER = ("nll", "loss", "nmse", "error", "unparsable", "perplexity")
"""Words in a key's last part or in its task that say so."""

NEUTRAL = ("yes_ratio",)

MS = "cost/ms_vision"
"""Milliseconds per image of the vision side, from a run's images per second."""

_SUMMED = ("train_images", "train_gflop", "train_gflop_live", "train_hours")
_OWN_STEPS = {"merge": "merge.steps", "detachment": "detachment.retune_steps"}
_DEEPEST = 8


@dataclass(frozen=True)
class Score:
    """A metric to show.

    Args:
        key: Flat key in ``metrics.json``.
        title: Its name in tables.
        better: 1 where greater is better, -1 where less is, 0 where neither.
        percent: Shown times 100.
    """

    key: str
    title: str
    better: int = 1
    percent: bool = False

    @property
    def scale(self) -> float:
        """What values are multiplied with to be shown."""
        return 100.0 if self.percent else 1.0

    @property
    def digits(self) -> int:
        """Digits after the point."""
        return 1 if self.percent else 3


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


def score_of(key: str, values: Iterable[float], *, title: str = "") -> Score:
    """A score whose direction follows from its key and whose form from its values (accuracies are shown in %)."""
    split, _, rest = key.partition("/")
    if is_count(key):
        return Score(key, title or rest, better=0)
    words = rest.split("/")
    better = 1
    if any(word in NEUTRAL for word in words):
        better = 0
    elif any(mark in word for word in (words[0], words[-1]) for mark in LOWER_IS_BETTER) or words[0] == "nll":
        better = -1
    share = better >= 0 and words[-1] not in ("cider", "spice") and all(-1 <= value <= 1 for value in values)
    return Score(key, title or HEADLINES.get(rest, "") or rest, better, share)


def choose_scores(known: Sequence[str], wanted: Sequence[str], *, split: str) -> list[str]:
    """Keys of the first table: those that are wanted, else the headlines that are there, else the first eight.

    Raises:
        ConfigError: A wanted key that no run has.
    """
    if wanted:
        return [_resolved(key, known, split) for key in wanted]
    found = [f"{split}/{key}" for key in HEADLINES if f"{split}/{key}" in known]
    if f"{split}/pope/adversarial/accuracy" in found and f"{split}/pope/accuracy" in found:
        found.remove(f"{split}/pope/accuracy")
    if f"{split}/nll/kind/dense" in found and f"{split}/nll/nll" in found:
        found.remove(f"{split}/nll/nll")
    return (
        found or [key for key in known if key.startswith(f"{split}/") and key.count("/") <= 2 and not is_count(key)][:8]
    )


def choose_primary(scores: Sequence[str], wanted: str | None, known: Sequence[str], *, split: str) -> str:
    """The score of the Pareto figure and the curves: the wanted one, else the first of the table.

    Raises:
        ConfigError: No run has it.
    """
    return scores[0] if wanted is None else _resolved(wanted, known, split)


def skill_groups(known: Sequence[str], *, split: str) -> dict[str, list[str]]:
    """Keys of scores by skill, by task: ``vqa`` to ``test/vqa/family/size`` and the like.

    Probes, nearest neighbors, and the alignment of encoder and text tower are skills, too.
    """
    groups: dict[str, list[str]] = {}
    for key in known:
        parts = key.split("/")
        if parts[0] != split:
            continue
        if len(parts) == 4 and parts[2] in ("family", "slot"):
            groups.setdefault(parts[1], []).append(key)
        elif parts[1] == "alignment" or (len(parts) == 3 and parts[1] in ("probe", "knn")):
            groups.setdefault(parts[1], []).append(key)
    return groups


def _resolved(key: str, known: Sequence[str], split: str) -> str:
    """A key as it is, or with the split put before it."""
    for candidate in (key, f"{split}/{key}"):
        if candidate in known:
            return candidate
    near = [name for name in known if key.rpartition("/")[2] in name and name.startswith(f"{split}/")][:4]
    some = near or [name for name in known if name.startswith(f"{split}/")][:6]
    raise ConfigError(f"No run has a score '{key}'; there are {', '.join(some)} and more in any metrics.json.")


def with_costs(run: RunRecord) -> RunRecord:
    """Return the run with costs derived from what it recorded.

    ``cost/ms_vision`` and ``cost/train_hours`` are other units; ``cost/train_images`` is steps times batch where a run
    has not counted; ``cost/all_...`` adds what the run took that it started from (``init_from``, or the run that was
    merged or detached), equals its own cost where it started from none, and is left out where that is not known.
    """
    return replace(run, metrics=_derived(run, _DEEPEST))


def unsteady(variant: Variant) -> bool:
    """Return whether the milliseconds of any of its runs were measured unsteadily."""
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
    """Return the costs of the runs that this one started from: 0 without a start; empty where unknown."""
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
    batch, images = (run.settings.get(f"data.{name}") for name in ("batch_size", "global_batch_size"))
    accumulated = run.settings.get("trainer.accumulate_grad_batches") or 1
    if images is None and isinstance(batch, int) and isinstance(accumulated, int):
        images = batch * accumulated
    return float(steps) * images if steps and isinstance(images, int) else None


def _phase(run: RunRecord) -> str | None:
    return next((phase for name, phase in PHASES.items() if (run.folder / name).is_file()), None)
