"""What trains of a method's student, and what its losses may weigh."""

from __future__ import annotations

from torch import nn

from visexpert.errors import ConfigError
from visexpert.language import LanguageModel, NoLanguage
from visexpert.vision import ClipEncoder


def check_weights(language: LanguageModel, **weights: float) -> None:
    """Refuse weights of losses that cannot work: ``kd_weight``, ``lm_weight``, ``balance_weight``.

    Raises:
        ConfigError: One is negative, nothing has one, or text has one and nothing reads it.
    """
    wrong = {name: value for name, value in weights.items() if value < 0}
    if wrong or weights["kd_weight"] + weights["lm_weight"] == 0:
        raise ConfigError(f"MoVEKD: weights {weights} must not be negative, and text or kd must have one above 0.")
    if weights["lm_weight"] > 0 and isinstance(language, NoLanguage):
        raise ConfigError("MoVEKD: NoLanguage reads no text; set lm_weight to 0.")


def mole_parts(clip: ClipEncoder, *, balanced: bool) -> tuple[nn.Module, ...]:
    """What of MoLE has a gradient.

    A router that only balance teaches has none without a ``balanced`` loss. Behind the tokens nothing has one without
    it, and with it the experts of the last block have none, since no router reads what they make.
    """
    behind = [block.get_submodule("mlp") for block in clip.routed_blocks_behind()]
    parts: list[nn.Module] = []
    for layer in clip.mole_layers():
        router, *experts = layer.added_modules()  # type: ignore[operator]
        if layer in behind:
            parts += [router, *(() if layer is behind[-1] else experts)] if balanced else ()
        else:
            parts += [router, *experts] if balanced or layer.router_learns else experts
    return tuple(parts)
