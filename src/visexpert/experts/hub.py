"""The hub of frozen experts: the one place where frozen means frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts.base import VisionExpert
from visexpert.experts.cache import FeatureCache
from visexpert.grids import resample_tokens
from visexpert.types import ExpertTokens, ImageSource


class ExpertHub(nn.Module):
    """Frozen experts by name: no gradient, always in eval mode, attached or detached, live or cached.

    Args:
        experts: The experts; their order is the order of the gate's columns.
        detached: Names that start detached.
    """

    attached_K: Tensor

    def __init__(self, experts: Mapping[str, VisionExpert], *, detached: Iterable[str] = ()) -> None:
        super().__init__()
        self.experts = nn.ModuleDict(dict(experts))
        self.register_buffer("attached_K", torch.ones(len(experts), dtype=torch.bool), persistent=False)
        self._cache: FeatureCache | None = None
        self._cache_grids: dict[str, tuple[int, int]] = {}
        self.requires_grad_(False)
        self.eval()
        for name in detached:
            self.detach(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All experts, attached or not, in the order of the gate's columns."""
        return tuple(self.experts)

    @property
    def attached(self) -> tuple[str, ...]:
        """Attached experts."""
        return tuple(name for name, there in zip(self.names, self.attached_K.tolist(), strict=True) if there)

    def __getitem__(self, name: str) -> VisionExpert:
        expert = self.experts[self._known(name)]
        assert isinstance(expert, VisionExpert)
        return expert

    def attach(self, name: str) -> None:
        """Take an expert into use."""
        self.attached_K[self.names.index(self._known(name))] = True

    def detach(self, name: str) -> None:
        """Take an expert out of use: it is not run and its gate logit is -inf."""
        self.attached_K[self.names.index(self._known(name))] = False

    def drop(self, name: str) -> None:
        """Remove an expert for good: its weights are freed and its column disappears."""
        index = self.names.index(self._known(name))
        del self.experts[name]
        self.attached_K = torch.cat([self.attached_K[:index], self.attached_K[index + 1 :]])
        self._cache_grids.pop(name, None)

    def load_weights(self) -> None:
        """Load the weights of attached experts; a detached one costs no download."""
        for name in self.attached:
            self[name].load_weights()

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
                    name, split, source, fingerprint=expert.fingerprint(), encode=encode, grid_hw=grid,
                    device=expert.mean.device, batch_size=batch_size,
                )  # fmt: skip
            self._cache_grids[name] = grid
        self._cache = cache

    @torch.no_grad()
    def forward(
        self, images_BCHW: Tensor, *, index_B: Tensor | None = None, split: str = ""
    ) -> dict[str, ExpertTokens]:
        """Tokens of every attached expert.

        Args:
            images_BCHW: Images, float in [0, 1], any size.
            index_B: Row of each image in its split; with ``split`` the key of cached tokens.
            split: Name of the split.
        """
        return {name: self._tokens(name, images_BCHW, index_B, split) for name in self.attached}

    def _tokens(self, name: str, images_BCHW: Tensor, index_B: Tensor | None, split: str) -> ExpertTokens:
        if self._cache is not None and index_B is not None:
            cached = self._cache.read(name, split, index_B)
            if cached is not None:
                return ExpertTokens(cached, self._cache_grids[name])
        tokens: ExpertTokens = self.experts[name](images_BCHW)
        return tokens

    def _known(self, name: str) -> str:
        if name not in self.experts:
            raise ConfigError(f"There is no expert '{name}' in the hub; it holds {list(self.experts)}.")
        return name
