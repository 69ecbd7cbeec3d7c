"""Whether runs may be compared at all, and whether they were trained on equal terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visexpert.errors import ConfigError
from visexpert.report.compare.record import RunRecord, differences, shown
from visexpert.report.compare.variants import Variant
from visexpert.report.tables import is_count

TRAINING_DATA = (
    "data.num_train",
    "data.train_fraction",
    "data.train_split",
    "data.texts.train",
    "data.texts.max_tokens",
)
"""Settings of the data that say what is trained on; all others say what world it is."""

BATCH = ("data.batch_size", "data.global_batch_size", "trainer.accumulate_grad_batches")
EVALUATION = (
    "model.evaluation.caption_images",
    "data.texts.eval",
    "trainer.limit_test_batches",
    "trainer.limit_val_batches",
    "trainer.fast_dev_run",
    "trainer.overfit_batches",
)
EVALUATION_OF = {"knn": "model.evaluation.knn_images", "alignment": "model.evaluation.alignment_images"}
"""Settings that change the scores of a task alone, so that they matter only where some run has these."""

SCHEDULE = (
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.min_steps",
    "trainer.min_epochs",
    "model.optimizer.warmup_steps",
    "model.optimizer.weight_decay",
    "trainer.gradient_clip_val",
    "merge.steps",
    "merge.warmup_steps",
    "detachment.retune_steps",
)

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Difference:
    """Something in which variants are unlike.

    Args:
        kind: What it concerns: ``data``, ``tokenizer``, ``decoder``, ...
        key: The setting or fact.
        holders: Names of the variants by value, the most frequent value first.
    """

    kind: str
    key: str
    holders: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        told = [f"{value} in {_some(names)}" for value, names in self.holders.items()]
        return f"{self.kind}: {self.key} is {' and '.join(told)}"


def mismatches(variants: Sequence[Variant], *, split: str) -> list[Difference]:
    """What makes scores incomparable: data, tokenizer, metric version, evaluation settings.

    What a run has not recorded is no difference.
    """
    keys = sorted({key for variant in variants for run in variant.runs for key in run.settings})
    world = [key for key in keys if (key == "data" or key.startswith("data.")) and not _is_training(key)]
    wanted: list[tuple[str, str, Callable[[RunRecord], Any]]] = []
    wanted += [("data", key, _setting(key)) for key in world if not key.startswith("data.tokenizer")]
    wanted += [("data", f"images of {split}", lambda run: run.fact("data", "images", split))]
    wanted += [("tokenizer", key, _setting(key)) for key in keys if key.startswith("data.tokenizer")]
    wanted += [("tokenizer", "digest", lambda run: run.fact("tokenizer"))]
    wanted += [("metrics", "version", lambda run: run.fact("metrics_version"))]
    wanted += [("metrics", "pycocoevalcap", lambda run: run.fact("versions", "pycocoevalcap"))]
    tasks = {key.split("/")[1] for each in variants for run in each.runs for key in run.metrics if _is_of(key, split)}
    judged = [*EVALUATION, *(key for task, key in EVALUATION_OF.items() if task in tasks)]
    wanted += [("evaluation", key, _setting(key)) for key in judged]
    counts = sorted(
        {key for variant in variants for run in variant.runs for key in run.metrics if _is_count(key, split)}
    )
    wanted += [("evaluation", key, _metric(key)) for key in counts]
    return _differing(variants, wanted)


def refuse_mixed(found: Sequence[Difference]) -> None:
    """Refuse to compare runs that are not comparable.

    Raises:
        ConfigError: There is a difference; the message names up to three.
    """
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(
            f"These runs cannot be compared: they differ in {'; '.join(map(str, found[:3]))}{more}; leave some out, or "
            "set allow_mixed to see them side by side anyway."
        )


def unequal_terms(variants: Sequence[Variant]) -> list[Difference]:
    """What makes a comparison unfair: images seen, decoder, schedule, batch, training data, start, precision, machine.

    Merging and detaching change a finished run: their images are counted with those of that run.
    """
    keys = list(dict.fromkeys(key for variant in variants for run in variant.runs for key in run.settings))
    decoder = [
        key
        for key in keys
        if key == "model.language" or key.startswith(("model.language.", "model.optimizer.language_"))
    ]
    budget = [key for key in keys if ".TrainingBudget." in key]
    training = [key for key in keys if _is_training(key) and key not in BATCH]
    wanted: list[tuple[str, str, Callable[[RunRecord], Any]]] = [("images seen", "images", images_seen)]
    wanted += [("decoder", key, _setting(key)) for key in decoder]
    wanted += [("schedule", key, _setting(key)) for key in SCHEDULE]
    wanted += [("schedule", key, _setting(key, absent="none")) for key in budget]
    wanted += [("batch", key, _setting(key)) for key in BATCH]
    wanted += [("training data", key, _setting(key)) for key in training]
    wanted += [("start", "model.init_from", _setting("model.init_from"))]
    wanted += [("precision", "trainer.precision", _setting("trainer.precision"))]
    wanted += [("machine, for times", key, _machine(key)) for key in ("cpu", "gpu", "cores", "threads")]
    return _differing(variants, wanted)


def uneven_variants(variants: Sequence[Variant]) -> list[Difference]:
    """Return the settings in which runs of one variant differ, by seed: they were grouped by folder or by name."""
    found = []
    for variant in variants:
        for key, values in differences([run.settings for run in variant.runs]).items():
            holders: dict[str, tuple[str, ...]] = {}
            for run, value in zip(variant.runs, values, strict=True):
                told = shown(value)
                holders[told] = (*holders.get(told, ()), run.folder.name if run.seed is None else f"seed {run.seed}")
            found.append(Difference(variant.name, key, holders))
    return found


def images_seen(run: RunRecord) -> int | None:
    """Training images over all steps, those of the run it started from included; None where unknown."""
    images = run.metrics.get("cost/all_train_images", run.metrics.get("cost/train_images"))
    return None if images is None else round(images)


def _differing(
    variants: Sequence[Variant], wanted: Sequence[tuple[str, str, Callable[[RunRecord], Any]]]
) -> list[Difference]:
    found = []
    for kind, key, value_of in wanted:
        holders: dict[str, list[str]] = {}
        for variant in variants:
            for run in variant.runs:
                names = holders.setdefault(_told(run, key, value_of), [])
                if variant.name not in names:
                    names.append(variant.name)
        if len(set(holders) - {NOT_RECORDED}) > 1:
            ranked = sorted(holders.items(), key=lambda item: -len(item[1]))
            found.append(Difference(kind, key, {value: tuple(names) for value, names in ranked}))
    return found


def _told(run: RunRecord, key: str, value_of: Callable[[RunRecord], Any]) -> str:
    """A value in a word; an empty setting is ``null``, a missing one is not recorded."""
    value = value_of(run)
    return NOT_RECORDED if value is None and key not in run.settings else shown(value)


def _setting(key: str, *, absent: str | None = None) -> Callable[[RunRecord], Any]:
    return lambda run: run.settings.get(key, absent)


def _metric(key: str) -> Callable[[RunRecord], Any]:
    return lambda run: run.metrics.get(key)


def _is_of(key: str, split: str) -> bool:
    return key.startswith(f"{split}/")


def _is_count(key: str, split: str) -> bool:
    return _is_of(key, split) and is_count(key)


def _machine(key: str) -> Callable[[RunRecord], Any]:
    return lambda run: run.fact("machine", key)


def _is_training(key: str) -> bool:
    return key in BATCH or any(key == name or key.startswith(f"{name}.") for name in TRAINING_DATA)


def _some(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names[:3]]
    return ", ".join(quoted) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
