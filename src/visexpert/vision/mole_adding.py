"""Put MoLE beside the MLPs of a vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from visexpert.errors import ConfigError
from visexpert.typed import typed
from visexpert.vision.mlp_recognition import find_mlps
from visexpert.vision.mole import MoLEFeedForward
from visexpert.vision.mole_forward import MoLEInit, RoutedEncoder, RouterKind, Routing


@typed
def add_mole(
    encoder: nn.Module,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    num_experts: int = 3,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.05,
    routing: Routing = "top1",
    init: MoLEInit = "identity",
    router: RouterKind = "released",
) -> tuple[MoLEFeedForward, ...]:
    """Replace the MLPs of a vision transformer with MoLE. The options are those of :class:`MoLEFeedForward`.

    With ``init="identity"`` the model at first gives what it gave before, to the bit. Its parameters keep their names.

    Args:
        encoder: A ``VisionEncoder``, or a vision transformer of transformers or timm, changed in place, with or
            without its weights loaded.
        layers: Blocks to equip, from 0; None for all that the tokens depend on; ``all`` (the released code) also for
            those behind the hidden state in use of a ``VisionEncoder``, which neither text nor teachers reach.

    Returns:
        The new modules in block order; train their :meth:`MoLEFeedForward.added_modules`.

    Raises:
        ConfigError: The model has no MLPs that MoLE goes beside, or several towers of them; a block does not exist, is
            named twice or already has MoLE; invalid options.
    """
    if isinstance(encoder, RoutedEncoder):
        names = list(encoder.mlp_names())
        read = len(encoder.read_blocks())
        state = f"hidden state {encoder.layer} depends on 0..{read - 1}, the others learn from the balance loss alone."
    else:
        names = list(find_mlps(encoder))
        read, state = len(names), f"{type(encoder).__name__} has {len(names)} of them."
    chosen = sorted(range(read) if layers is None else range(len(names)) if layers == "all" else layers)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(names))):
        raise ConfigError(f"add_mole: layers={chosen} must name different blocks of 0..{len(names) - 1}; {state}")
    options = {"num_experts": num_experts, "rank": rank, "alpha": alpha, "dropout": dropout}
    made = {
        names[index]: MoLEFeedForward(
            encoder.get_submodule(names[index]),
            routing=routing,
            init=init,
            router=router,
            **options,  # type: ignore[arg-type]
        )
        for index in chosen
    }
    for name, mole in made.items():
        encoder.set_submodule(name, mole)
    return tuple(made.values())
