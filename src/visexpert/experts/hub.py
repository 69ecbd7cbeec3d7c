"""The hub of frozen experts: the one place where frozen means frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts.base import VisionExpert
from visexpert.experts.cache import FeatureCache
from visexpert.experts.probe import check_repeats
from visexpert.grids import resample_tokens
from visexpert.names import RESERVED, EncoderName, reserved_among
from visexpert.types import Batch, ExpertTokens, ImageSource


class ExpertHub(nn.Module):
    """Frozen experts by name: no gradient, always in eval mode, attached or detached, live or cached.

    Args:
        experts: The experts; their order is the order of the gate's columns.
        detached: Names that start detached.

    Raises:
        ConfigError: A name is reserved (:data:`visexpert.names.RESERVED`), or no module can have it.
    """

    def __init__(self, experts: Mapping[str, VisionExpert], *, detached: Iterable[str] = ()) -> None:
        super().__init__()
        _check_names(experts)
        self.experts = nn.ModuleDict(dict(experts))
        self._attached = set(experts)
        self._cache: FeatureCache | None = None
        self._cache_grids: dict[str, tuple[int, int]] = {}
        self.requires_grad_(False)
        self.eval()
        for name in detached:
            self.detach(name)

    @classmethod
    def chosen(
        cls, experts: Mapping[str, VisionExpert], use: Sequence[str] | None, *, owner: str, detached: Iterable[str] = ()
    ) -> ExpertHub:
        """A hub of the experts that are used, in the order of ``experts``.

        Args:
            experts: All there are.
            use: Names of those to use; None for all.
            owner: Who uses them, for messages.
            detached: Names that start detached.

        Raises:
            ConfigError: ``use`` names one that is not there.
        """
        if unknown := [name for name in use or () if name not in experts]:
            raise ConfigError(f"{owner}: use names {unknown}, which are not among the experts {sorted(experts)}.")
        used = {name: expert for name, expert in experts.items() if use is None or name in use}
        return cls(used, detached=detached)

    @property
    def names(self) -> tuple[str, ...]:
        """All experts, attached or not, in the order of the gate's columns."""
        return tuple(self.experts)

    @property
    def attached(self) -> tuple[str, ...]:
        """Attached experts."""
        return tuple(name for name in self.names if name in self._attached)

    def attached_experts(self) -> dict[str, VisionExpert]:
        """Attached experts by name."""
        return {name: self[name] for name in self.attached}

    def attach_only(self, names: Iterable[str]) -> None:
        """Attach these experts and detach all others."""
        wanted = set(names)
        for name in self.names:
            (self.attach if name in wanted else self.detach)(name)

    @property
    def attached_mask(self) -> tuple[bool, ...]:
        """Whether each expert of :attr:`names` is attached."""
        return tuple(name in self._attached for name in self.names)

    def __getitem__(self, name: str) -> VisionExpert:
        expert = self.experts[self._known(name)]
        assert isinstance(expert, VisionExpert)
        return expert

    def attach(self, name: str) -> None:
        """Take an expert into use."""
        self._attached.add(self._known(name))

    def detach(self, name: str) -> None:
        """Take an expert out of use: it is not run and its gate logit is -inf."""
        self._attached.discard(self._known(name))

    def drop(self, name: str) -> None:
        """Remove an expert for good: its weights are freed and its column disappears."""
        del self.experts[self._known(name)]
        self._attached.discard(name)
        self._cache_grids.pop(name, None)

    def load_weights(self) -> None:
        """Load the weights of attached experts; a detached one costs no download.

        Raises:
            WeightsError: They are nowhere, or do not fit.
            ConfigError: An expert gives other tokens each time for the same image.
        """
        for name in self.attached:
            self[name].load_weights()
            check_repeats(self[name], name)

    def train(self, mode: bool = True) -> ExpertHub:
        """Stay in eval mode: batch statistics and dropout of an expert are as frozen as its weights."""
        return super().train(False)

    def use_cache(
        self,
        cache: FeatureCache,
        sources: Mapping[str, ImageSource],
        *,
        resample: Mapping[str, tuple[int, int]],
        batch_size: int = 64,
    ) -> None:
        """Read tokens from the store from now on, filling it where needed.

        Args:
            cache: The run's cache.
            sources: Images by split; other splits stay live.
            resample: Grid to store each expert's tokens on; experts not named are stored on their own.
            batch_size: Images per call while filling.
        """
        for name in self.attached:
            expert = self[name]
            grid = resample.get(name, expert.grid_hw)

            def encode(images: Tensor, expert: VisionExpert = expert, grid: tuple[int, int] = grid) -> Tensor:
                return resample_tokens(expert(images).tokens_BSE, expert.grid_hw, grid)

            for split, source in sources.items():
                cache.prepare(
                    EncoderName("expert", name),
                    split,
                    source,
                    fingerprint=expert.fingerprint(),
                    encode=encode,
                    grid_hw=grid,
                    device=expert.mean.device,
                    batch_size=batch_size,
                )
            self._cache_grids[name] = grid
        self._cache = cache

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, ExpertTokens]:
        """Tokens of every attached expert: from the store where it has those of the batch's split, else live.

        Images are looked at by live experts alone.
        """
        return {name: self._tokens(name, batch) for name in self.attached}

    def _tokens(self, name: str, batch: Batch) -> ExpertTokens:
        cached = None if self._cache is None else self._cache.read(EncoderName("expert", name), batch)
        if cached is not None:
            return ExpertTokens(cached, self._cache_grids[name])
        tokens: ExpertTokens = self.experts[name](batch.images_01())
        return tokens

    def _known(self, name: str) -> str:
        if name not in self.experts:
            raise ConfigError(f"There is no expert '{name}' in the hub; it holds {list(self.experts)}.")
        return name


def _check_names(names: Iterable[str]) -> None:
    """An expert is a part of several modules, in a checkpoint and in logs, under its name."""
    impossible = [name for name in names if not name or "." in name or hasattr(nn.ModuleDict(), name)]
    wrong = [*reserved_among(names), *impossible]
    if wrong:
        raise ConfigError(
            f"An expert cannot be named {' or '.join(map(repr, wrong))}: {', '.join(RESERVED)} are names of our own, "
            "and a name must be that of a module of torch, without dots; rename it."
        )
