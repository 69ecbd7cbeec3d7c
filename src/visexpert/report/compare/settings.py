"""A run's configuration as flat settings that can be compared, without what may differ between seeds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Settings = Mapping[str, Any]
"""Settings by short dotted key, such as ``model.language.width`` or ``trainer.max_steps``; ``init_args`` left out."""

IGNORED = frozenset(
    """run config seed_everything verbose weights_only ckpt_path checkpoint_every test_after_fit
    trainer.logger trainer.default_root_dir trainer.enable_progress_bar trainer.enable_checkpointing
    trainer.enable_model_summary trainer.log_every_n_steps trainer.val_check_interval trainer.check_val_every_n_epoch
    trainer.num_sanity_val_steps trainer.accelerator trainer.devices trainer.num_nodes trainer.strategy
    model.store.folder data.root data.rendering.progress data.num_workers data.rendering.workers data.order_seed
    data.eval_batch_size""".split()
)
"""What makes no other variant: seeds, places, habits of logging, and the machine."""

_SEED = re.compile(r"(?<![a-z0-9])(seed|s)[-_]?\d+(?![a-z0-9])", re.IGNORECASE)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of a resolved configuration (``config.yaml`` of a run).

    An object becomes its class's last name under its own key and its arguments below it; a mapping or list of objects
    also gives its names, so that other experts or callbacks are another setting. Paths lose the number of a seed.
    """
    return {key: value for key, value in _walk("", config) if key not in IGNORED}


def differences(settings: Sequence[Settings]) -> dict[str, list[Any]]:
    """Settings that differ among runs, each with its value in every run.

    A setting that a run does not have is None there and no difference by itself: versions come with new settings, and
    an object of another class differs by its class.
    """
    keys = list(dict.fromkeys(key for each in settings for key in each))
    found = {}
    for key in keys:
        present = {shown(each[key]) for each in settings if key in each}
        if len(present) > 1:
            found[key] = [each.get(key) for each in settings]
    return found


def shown(value: Any) -> str:
    """A value in a word: lists in brackets, nothing as ``null``."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).strip('"')


def without_seed(path: str) -> str:
    """A path with the number of its seed replaced, from here on: ``runs/tove/seed*/checkpoints/last.ckpt``."""
    return _SEED.sub(lambda match: f"{match[1]}*", path.removeprefix(f"{os.getcwd()}{os.sep}"))


def _walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and "class_path" in value:
        yield prefix, str(value["class_path"]).rpartition(".")[2]
        for key, item in (value.get("init_args") or {}).items():
            yield from _walk(_join(prefix, key), item)
    elif isinstance(value, Mapping):
        if _are_objects(value.values()):
            yield prefix, ", ".join(map(str, value))
        for key, item in value.items():
            yield from _walk(_join(prefix, key), item)
    elif isinstance(value, list | tuple) and value and _are_objects(value):
        yield prefix, ", ".join(str(item["class_path"]).rpartition(".")[2] for item in value)
        for item in value:
            yield from _walk(_join(prefix, str(item["class_path"]).rpartition(".")[2]), item)
    else:
        yield prefix, without_seed(value) if isinstance(value, str) else value


def _are_objects(items: Any) -> bool:
    return bool(items) and all(isinstance(item, Mapping) and "class_path" in item for item in items)


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
