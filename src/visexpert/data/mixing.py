"""Batches of several loaders: in turn for training, one loader after another for evaluation."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from visexpert.data.source import Loader
from visexpert.errors import ConfigError
from visexpert.types import Batch


class ChainedLoader:
    """Gives the batches of several loaders, one loader after another.

    Args:
        loaders: The loaders.
        unnamed: Take the source's name off the batches, since there is only one.
    """

    def __init__(self, loaders: Sequence[Loader], *, unnamed: bool) -> None:
        self.loaders, self.unnamed = loaders, unnamed

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.chain.from_iterable(self.loaders):
            yield replace(batch, source="") if self.unnamed else batch


class MixedLoader:
    """Takes batches from several endless loaders in turn; which is next depends on how many are done alone.

    Args:
        makers: Make the loader of each source, given what tells how many of its batches are done.
        weights: Share of each source, in any unit; None counts its batches.
        position: Tells how many batches of the whole sequence are done; None begins anew each time.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[Callable[[], int]], Loader]],
        *,
        weights: Mapping[str, float | None],
        position: Callable[[], int] | None,
    ) -> None:
        self._done = dict.fromkeys(makers, 0)
        self.loaders = {name: make(self._counter(name)) for name, make in makers.items()}
        self.weights = {name: float(weight or len(self.loaders[name])) for name, weight in weights.items()}
        self.position = position

    def __len__(self) -> int:
        return sum(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[Batch]:
        self._done.update(dict.fromkeys(self._done, 0))
        turns = self.turns()
        for name in itertools.islice(turns, 0 if self.position is None else self.position()):
            self._done[name] += 1
        streams = {name: self._endless(name) for name in self.loaders}
        for name in itertools.islice(turns, len(self)):
            batch = next(streams[name])
            self._done[name] += 1
            yield batch

    def turns(self) -> Iterator[str]:
        """Yield whose turn it is, without end: always that of the source which lags most behind its share."""
        total = sum(self.weights.values())
        credit = dict.fromkeys(self.weights, 0.0)
        while True:
            for name, weight in self.weights.items():
                credit[name] += weight / total
            name = max(credit, key=lambda source: credit[source])
            credit[name] -= 1.0
            yield name

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of batches depends on."""
        return {"sources": {name: loader.state_dict() for name, loader in self._stateful()}, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn where the order is not the one that was interrupted; ``position`` says where to go on."""
        if state["weights"] != self.weights:
            warnings.warn(
                f"The interrupted run mixed its sources by {state['weights']}, this one by {self.weights}: it goes on, "
                "but not with the batches that it would have seen.",
                stacklevel=2,
            )
            return
        for name, loader in self._stateful():
            loader.load_state_dict(state["sources"][name])

    def _stateful(self) -> list[tuple[str, Any]]:
        return [(name, loader) for name, loader in self.loaders.items() if hasattr(loader, "state_dict")]

    def _counter(self, name: str) -> Callable[[], int]:
        return lambda: self._done[name]

    def _endless(self, name: str) -> Iterator[Batch]:
        while True:
            given = False
            for batch in self.loaders[name]:
                given = True
                yield batch
            if not given:
                raise ConfigError(f"The source {name} has fewer images than one batch for each process; leave it out.")
