"""What a student's encoder makes of a batch: the one form in which every method has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from visexpert.losses import router_balance
from visexpert.losses.terms import RouterBalanceForm
from visexpert.types import Batch, LossTerm, VisionTokens
from visexpert.vision import RoutingRecord, Views


@dataclass(frozen=True)
class Seen:
    """Tokens of a batch before the language model reads them.

    Args:
        batch: The batch.
        views: Its images as the encoder takes them: whole, or whole and in tiles.
        tokens: Of every view (V, T, D), one row each; of width d_lang where the method itself goes that far.
        routing: What the routers of a student with MoLE decided; None where nobody asked, or there are none.
    """

    batch: Batch
    views: Views
    tokens: VisionTokens
    routing: RoutingRecord | None = None

    @property
    def whole(self) -> VisionTokens:
        """Tokens of the whole images, one row for each sample of the batch."""
        return self.views.whole(self.tokens)


@dataclass(frozen=True)
class Compared:
    """What a method takes from a batch beside the text's loss.

    Args:
        terms: Terms of the loss by name.
        watched: Scalars without a graph to log.
    """

    terms: Mapping[str, LossTerm] = field(default_factory=dict)
    watched: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterBalance:
    """How the routers of a student with MoLE are kept in balance.

    Args:
        weight: Weight of their loss, above 0.
        form: ``pooled`` or ``per_layer``.
    """

    weight: float
    form: RouterBalanceForm

    def term(self, seen: Seen) -> LossTerm:
        """Their loss over the views of samples that have an image."""
        assert seen.routing is not None
        there_V = seen.views.batch.has_image_B
        value = router_balance(seen.routing.probs_LBNE, seen.routing.choice_LBN, self.form, has_image_B=there_V)
        return LossTerm(value, "image", self.weight)
