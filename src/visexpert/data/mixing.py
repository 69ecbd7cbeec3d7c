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
    """Yields the batches of several loaders, one loader after another.

    Args:
        loaders: The loaders.
        unnamed: Remove the source's name from batches, since there is only one source.
    """

    def __init__(self, loaders: Sequence[Loader], *, unnamed: bool) -> None:
        self.loaders, self.unnamed = loaders, unnamed

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.chain.from_iterable(self.loaders):
            yield replace(batch, source="") if self.unnamed else batch


class MixedLoader:
    """Takes batches from several endless loaders in turn; the next one depends only on the number of batches done.

    Args:
        makers: Functions that build each source's loader, given a function that counts its finished batches.
        weights: Weight of each source, in any unit; None for its number of batches.
        position: Returns how many batches of the whole sequence are done; None restarts each time.
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
        """Yield the next source, endlessly: always the one furthest behind its share."""
        total = sum(self.weights.values())
        credit = dict.fromkeys(self.weights, 0.0)
        while True:
            for name, weight in self.weights.items():
                credit[name] += weight / total
            name = max(credit, key=lambda source: credit[source])
            credit[name] -= 1.0
            yield name

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that determine the order of batches."""
        return {"sources": {name: loader.state_dict() for name, loader in self._stateful()}, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn if the order differs from the interrupted run's; ``position`` says where to continue."""
        if state["weights"] != self.weights:
            warnings.warn(
                f"The interrupted run mixed its sources by {state['weights']}, this one by {self.weights}: "
                "it continues, but with other batches than the interrupted run would have seen.",
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
