"""The hub: a set of experts, and the one place that keeps them frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts.base import VisionExpert
from visexpert.experts.cache import FeatureCache
from visexpert.experts.probe import check_repeats
from visexpert.grids import resample_tokens, resized_once
from visexpert.names import RESERVED, EncoderName, reserved_among
from visexpert.typed import typed
from visexpert.types import Batch, ExpertTokens, ImageSource, no_batch


@typed
class ExpertHub(nn.Module):
    """Frozen experts by name: without gradients, always in eval mode, attached or detached, live or stored.

    Args:
        experts: Experts by name, in the order of the gate's columns.
        detached: Names of experts that start detached.

    Raises:
        ConfigError: A name is reserved (:data:`visexpert.names.RESERVED`), or cannot name a module.
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
        """Return a hub of the experts to use, in the order of ``experts``.

        Args:
            experts: All experts by name.
            use: Names of the experts to use; None for all.
            owner: Name of the caller, for messages.
            detached: Names of experts that start detached.

        Raises:
            ConfigError: ``use`` has a name that is not in ``experts``.
        """
        if unknown := [name for name in use or () if name not in experts]:
            raise ConfigError(f"{owner}: use names {unknown}, which are not among the experts {sorted(experts)}.")
        used = {name: expert for name, expert in experts.items() if use is None or name in use}
        return cls(used, detached=detached)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all experts, attached or not, in the order of the gate's columns."""
        return tuple(self.experts)

    @property
    def attached(self) -> tuple[str, ...]:
        """Names of the attached experts, in the same order."""
        return tuple(name for name in self.names if name in self._attached)

    def attached_experts(self) -> dict[str, VisionExpert]:
        """Return the attached experts by name."""
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
        """Attach an expert."""
        self._attached.add(self._known(name))

    def detach(self, name: str) -> None:
        """Detach an expert: it is not run, and its gate logit is -inf."""
        self._attached.discard(self._known(name))

    def drop(self, name: str) -> None:
        """Remove an expert permanently, with its weights and its column of the gate."""
        del self.experts[self._known(name)]
        self._attached.discard(name)
        self._cache_grids.pop(name, None)

    def load_weights(self) -> None:
        """Load the weights of attached experts; those of detached ones are not even downloaded.

        Raises:
            WeightsError: They are missing, or do not fit.
            ConfigError: An expert gives different tokens for the same image each time.
        """
        for name in self.attached:
            self._load(name)

    def _load(self, name: str) -> None:
        self[name].load_weights()
        check_repeats(self[name], name)

    def train(self, mode: bool = True) -> ExpertHub:
        """Stay in eval mode, so that batch statistics and dropout are as frozen as the weights."""
        return super().train(False)

    def use_cache(
        self,
        cache: FeatureCache,
        sources: Mapping[str, ImageSource],
        *,
        resample: Mapping[str, tuple[int, int]],
        batch_size: int | None = None,
    ) -> None:
        """Read tokens from the store from now on; compute those that are missing first.

        Args:
            cache: Feature files of the run.
            sources: Images by split; tokens of other splits are computed live.
            resample: Grid on which to store tokens, by expert; an expert's own grid if it is not given.
            batch_size: Images per call while tokens are computed; None for the cache's own.
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
                    width=expert.token_dim,
                    device=expert.mean.device,
                    batch_size=batch_size,
                )
            self._cache_grids[name] = grid
        self._cache = cache

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, ExpertTokens]:
        """Return the tokens of every attached expert: from the store if it has the batch's split, else computed live.

        The images are read only if an expert runs live.

        Raises:
            ConfigError: Anything but a batch, such as images alone.
        """
        if not isinstance(batch, Batch):
            raise no_batch(batch, owner="ExpertHub")
        with resized_once():
            return {name: self._tokens(name, batch) for name in self.attached}

    def _tokens(self, name: str, batch: Batch) -> ExpertTokens:
        cached = None if self._cache is None else self._cache.read(EncoderName("expert", name), batch)
        if cached is not None:
            return ExpertTokens(cached, self._cache_grids[name])
        expert = self[name]
        images_BCHW = batch.images_01()
        waits = not expert.weights_in_place and expert.weights_from is not None
        if waits and not images_BCHW.is_meta:  # attached after the weights were loaded, or none were loaded
            self._load(name)
        return expert(images_BCHW)

    def __repr__(self) -> str:
        lines = [f"  {name}: {self[name]}{'' if name in self._attached else ', detached'}" for name in self.names]
        return "\n".join(["ExpertHub(", *lines, ")"]) if lines else "ExpertHub(no experts)"

    def _known(self, name: str) -> str:
        if name not in self.experts:
            raise ConfigError(f"There is no expert '{name}' in the hub; it holds {list(self.experts)}.")
        return name


def _check_names(names: Iterable[str]) -> None:
    """Check that names can be those of submodules: checkpoints and logs use them."""
    impossible = [name for name in names if not name or "." in name or hasattr(nn.ModuleDict(), name)]
    wrong = [*reserved_among(names), *impossible]
    if wrong:
        raise ConfigError(
            f"An expert cannot be named {' or '.join(map(repr, wrong))}: {', '.join(RESERVED)} are reserved, and torch "
            "must accept the name as that of a submodule, without dots; rename it."
        )
