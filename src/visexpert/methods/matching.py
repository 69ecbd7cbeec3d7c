"""Whether a checkpoint is of this very model, said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visexpert.errors import WeightsError


@dataclass(frozen=True)
class KeyDifferences:
    """In what a checkpoint's weights are unlike a model's.

    Args:
        missing: Keys that only the model has, sorted.
        unexpected: Keys that only the checkpoint has, sorted.
        reshaped: ``KEY (shape there) instead of (shape here)``.
    """

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    @classmethod
    def between(cls, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> KeyDifferences:
        """Compare a model's ``own`` state with a checkpoint's."""
        reshaped = [
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ]
        return cls(sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()), reshaped)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)


def refuse_other_model(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, path: object) -> None:
    """Refuse weights that are not those of this model.

    Raises:
        WeightsError: A key is missing, unexpected or of another shape; up to three of each are named.
    """
    if found := KeyDifferences.between(own, state):
        raise WeightsError(
            f"The checkpoint {path} is of another model: missing {_some(found.missing)}, unexpected "
            f"{_some(found.unexpected)}, of another shape {_some(found.reshaped)}; give one that this configuration "
            "trained, or take what fits from it by init_from instead of ckpt_path."
        )


def refuse_other_training(groups: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any], *, path: object) -> None:
    """Refuse to go on with a training in which other parts trained, such as that of another stage.

    Args:
        groups: The optimizer's groups, as :func:`~visexpert.optim.make_groups` gives them.
        checkpoint: With the state of the optimizer, where it has one.
        path: Where it lies, for the message.

    Raises:
        WeightsError: The groups differ in name or in number of parameters.
    """
    for state in checkpoint.get("optimizer_states", ())[:1]:
        trained = {str(group.get("name")): len(group["params"]) for group in state["param_groups"]}
        wanted = {str(group.get("name")): len(group["params"]) for group in groups}
        if trained != wanted:
            raise WeightsError(
                f"The checkpoint {path} is of another training: it trained {_counts(trained)}, here {_counts(wanted)} "
                "would; continue with that run's own configuration, or start from it by init_from instead of ckpt_path."
            )


def _some(items: Sequence[str]) -> str:
    return f"{list(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}" if items else "none"


def _counts(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in groups.items())
