"""Several sources in one run: training takes batches from them in turn, evaluation reads one after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visexpert.data.base import DataModule
from visexpert.data.division import StepSize
from visexpert.data.images import Resize
from visexpert.data.loader import Loader, TrainingLoader, warn_of_other_order
from visexpert.data.needs import AnyNeed
from visexpert.data.source import PARTS, Settings, SourceData, Template
from visexpert.errors import ConfigError
from visexpert.typed import typed
from visexpert.types import Batch, ImageSource, TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHARED = (
    "tokenizer",
    "template",
    "max_tokens",
    "image_size",
    "resize",
    "batch_size",
    "global_batch_size",
    "eval_batch_size",
    "num_workers",
    "worker_timeout",
    "max_broken",
)


@typed
class MixedData(DataModule):
    """Several sources: a batch holds rows of one source; scores carry the source's name if there are several.

    In training the sources alternate from step to step, evenly spread and in proportion to their weights; an epoch has
    as many steps as all sources together. An exhausted source restarts.

    Args:
        sources: Sources by name.
        train: Sources to train on, with their weights; null for the source's number of steps.
        val: Sources to validate on; null for none.
        test: Sources to test on; null for none.
        tokenizer: Passed to all sources, like the settings below; null keeps each source's own value. See
            :class:`~visexpert.data.source.SourceData` for all of them.
        template: How to tokenize prompts and answers.
        max_tokens: Maximum length of a text.
        image_size: Side of the images, pixels.
        resize: How images become squares.
        batch_size: Images per training batch and process.
        global_batch_size: Images per optimizer step over all processes.
        eval_batch_size: Images per evaluation batch.
        num_workers: Worker processes of each source.
        worker_timeout: Seconds to wait for a batch of the workers.
        max_broken: Largest share of broken images or records.

    Raises:
        ConfigError: A name is unknown, a weight is out of range, or sources have different tokenizers.
    """

    def __init__(
        self,
        *,
        sources: dict[str, SourceData],
        train: dict[str, float | None] | None = None,
        val: list[str] | None = None,
        test: list[str] | None = None,
        tokenizer: str | None = None,
        template: Template | None = None,
        max_tokens: int | None = None,
        image_size: int | None = None,
        resize: Resize | None = None,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        worker_timeout: float | None = None,
        max_broken: float | None = None,
    ) -> None:
        super().__init__()
        given = (
            tokenizer,
            template,
            max_tokens,
            image_size,
            resize,
            batch_size,
            global_batch_size,
            eval_batch_size,
            num_workers,
            worker_timeout,
            max_broken,
        )
        shared: dict[str, Any] = {name: value for name, value in zip(SHARED, given, strict=True) if value is not None}
        self.sources = sources
        self.weights = dict(train or {})
        self.names: dict[str, list[str]] = {
            "train": list(self.weights),
            "val": list(val or ()),
            "test": list(test or ()),
        }
        self._check()
        for name, source in sources.items():
            source.settings = replace(source.settings, **shared)
            source.label = name
        if len({source.settings.tokenizer for source in self._used(PARTS["fit"] + PARTS["test"])}) > 1:
            raise ConfigError("The sources of MixedData name different tokenizers; set tokenizer on MixedData instead.")

    def described(self) -> list[str]:
        """See :class:`~visexpert.data.base.DataModule`."""
        used = [f"{part}: {' + '.join(names)}" for part, names in self.names.items() if names]
        return used or [" + ".join(self.sources), "no parts"]

    def step_size(self) -> StepSize:
        """Return what the training sources say about the size of an optimizer step.

        Raises:
            ConfigError: One has a ``global_batch_size`` that another has not.
        """
        sizes = {name: self.sources[name].step_size() for name in self.weights}
        several = len(set(sizes.values())) > 1
        if several and any(size.global_batch_size is not None for size in sizes.values()):
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                f"The training sources of MixedData have unlike steps ({told}); set global_batch_size and batch_size "
                "on MixedData instead."
            )
        return next(iter(sizes.values()), StepSize())

    # -- Lightning hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check that nothing is missing."""
        for name, parts in self._by_source(None).items():
            self.sources[name].trainer = self.trainer
            self.sources[name].check(parts)
            _ = self.sources[name].packer

    def check_stage(self, stage: str) -> None:
        """Check that nothing a stage reads is missing."""
        for name, parts in self._by_source(stage).items():
            self.sources[name].check(parts)

    def setup(self, stage: str | None = None) -> None:
        """Read the annotations that ``stage`` needs."""
        super().setup(stage)
        for name, parts in self._by_source(stage).items():
            source = self.sources[name]
            source.trainer = self.trainer
            source.find_run_folder()
            for part in parts:
                source.open(part)

    def train_dataloader(self) -> Loader:
        """Return the training batches of all sources, in turn."""
        if not self.weights:
            raise ConfigError("MixedData has nothing to train on; name sources under train.")
        mixed = MixedLoader(
            {name: self._train_loader_of(name) for name in self.weights},
            weights=self.weights,
            position=self.batches_done(),
            batches_per_turn=self.division().accumulate,
        )
        return self.in_steps(mixed)

    def has_part(self, part: str) -> bool:
        """Return whether a part names any sources."""
        return bool(self.names[part])

    def val_dataloader(self) -> ChainedLoader | list[Batch]:
        """Return the validation batches of all sources, one source after another."""
        return self._chained("val")

    def test_dataloader(self) -> ChainedLoader | list[Batch]:
        """Return the test batches of all sources, one source after another."""
        return self._chained("test")

    def predict_dataloader(self) -> ChainedLoader | list[Batch]:
        """Return the test batches."""
        return self._chained("test")

    # -- For methods and commands ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of all sources; None where batches have no text."""
        return next(iter(self._used(PARTS["fit"] + PARTS["test"]))).tokenizer

    @property
    def packer(self) -> TextEncoder | None:
        """The text encoder of the first training source; None if batches have no text."""
        return next(iter(self._used(PARTS["fit"] + PARTS["test"]))).packer

    @property
    def settings(self) -> Settings:
        """The settings of the first training source."""
        return next(iter(self._used(PARTS["fit"] + PARTS["test"]))).settings

    def plain_batches(self, part: str, *, most: int | None = None) -> ChainedLoader:
        """Return batches of all sources of a part as of validation, each up to ``most`` images.

        Raises:
            UserError: Something that a source needs is missing.
        """
        sources = [self.sources[name] for name in self.names[part]]
        return ChainedLoader([source.plain_batches(part, most=most) for source in sources], unnamed=len(sources) == 1)

    def image_sources(self) -> dict[str, ImageSource]:
        """Return images of the opened parts by row, for the feature store."""
        return {
            split: images
            for source in self._used(PARTS["fit"] + PARTS["test"])
            for split, images in source.image_sources().items()
        }

    def training_rows(self) -> int | None:
        """Return the number of training images of all sources; None if one cannot be counted."""
        counts = [self.sources[name].training_rows() for name in self.weights]
        return None if None in counts else sum(count for count in counts if count is not None)

    def all_needs(self, parts: Sequence[str]) -> list[AnyNeed]:
        """List everything that these parts need, without repeats."""
        needs = [need for part in parts for name in self.names[part] for need in self.sources[name].all_needs([part])]
        return list(dict.fromkeys(needs))

    # -- Parts ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        for part, names in self.names.items():
            for name in names:
                if name not in self.sources:
                    raise ConfigError(f"{part} names {name!r}, but the sources are {', '.join(self.sources)}.")
                if part not in self.sources[name].parts:
                    raise ConfigError(f"{name} ({type(self.sources[name]).__name__}) has no {part} part; leave it out.")
        if not any(self.names.values()):
            raise ConfigError("MixedData uses none of its sources; name some under train, val or test.")
        for name, weight in self.weights.items():
            if weight is not None and weight <= 0:
                raise ConfigError(
                    f"The weight of {name} is {weight}, but must be above 0; leave the source out instead."
                )

    def _used(self, parts: Sequence[str]) -> list[SourceData]:
        names = dict.fromkeys(name for part in parts for name in self.names[part])
        return [self.sources[name] for name in names]

    def _by_source(self, stage: str | None) -> dict[str, list[str]]:
        """Return the parts that a stage reads, by source."""
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        by_source: dict[str, list[str]] = {}
        for part in PARTS.get(stage, tuple(self.names)):
            for name in self.names[part]:
                by_source.setdefault(name, []).append(part)
        return by_source

    def _train_loader_of(self, name: str) -> Callable[[Callable[[], int]], TrainingLoader]:
        return lambda position: self.sources[name].loader("train", position=position)

    def _chained(self, part: str) -> ChainedLoader | list[Batch]:
        names = self.names[part]
        if not names:
            return []
        return ChainedLoader([self.sources[name].loader(part) for name in names], unnamed=len(names) == 1)


class ChainedLoader:
    """Yields the batches of several loaders, one loader after another.

    Args:
        loaders: The loaders.
        unnamed: Remove the source's name from batches, because there is only one.
    """

    def __init__(self, loaders: Sequence[Loader], *, unnamed: bool) -> None:
        self.loaders, self.unnamed = loaders, unnamed

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.chain.from_iterable(self.loaders):
            yield replace(batch, source="") if self.unnamed else batch


class MixedLoader:
    """Takes batches from several endless loaders in turn; whose turn it is depends only on the number of batches done.

    Args:
        makers: Functions that build each source's loader, given a function that counts its finished batches.
        weights: Relative weight of each source; None for its number of turns in an epoch of its own.
        position: Returns how many batches of the whole sequence are done; None restarts each time.
        batches_per_turn: Batches of an optimizer step, which are all of one source, so that the number of processes
            does not change whose turn it is.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[Callable[[], int]], TrainingLoader]],
        *,
        weights: Mapping[str, float | None],
        position: Callable[[], int] | None,
        batches_per_turn: int = 1,
    ) -> None:
        self._done = dict.fromkeys(makers, 0)
        self.loaders = {name: make(self._counter(name)) for name, make in makers.items()}
        self.weights = {
            name: float(weight or len(self.loaders[name]) / batches_per_turn) for name, weight in weights.items()
        }
        self.position, self.batches_per_turn = position, batches_per_turn

    def __len__(self) -> int:
        return sum(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[Batch]:
        self._done.update(dict.fromkeys(self._done, 0))
        turns = (name for name in self.turns() for _ in range(self.batches_per_turn))
        for name in itertools.islice(turns, 0 if self.position is None else self.position()):
            self._done[name] += 1
        streams = {name: self._endless(name) for name in self.loaders}
        for name in itertools.islice(turns, len(self)):
            batch = next(streams[name])
            self._done[name] += 1
            yield batch

    def turns(self) -> Iterator[str]:
        """Yield the name of the next source, endlessly: always the one furthest behind its share."""
        total = sum(self.weights.values())
        credit = dict.fromkeys(self.weights, 0.0)
        while True:
            for name, weight in self.weights.items():
                credit[name] += weight / total
            name = max(credit, key=lambda source: credit[source])
            credit[name] -= 1.0
            yield name

    @property
    def has_whole_steps(self) -> bool:
        """Whether an epoch of each source is whole optimizer steps."""
        return all(loader.has_whole_steps for loader in self.loaders.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that determine the order of batches."""
        return {
            "sources": {name: loader.state_dict() for name, loader in self.loaders.items()},
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn if the order differs from the interrupted run's; ``position`` says where to continue."""
        if warn_of_other_order({"weights": state["weights"]}, {"weights": self.weights}):
            return
        for name, loader in self.loaders.items():
            loader.load_state_dict(state["sources"][name])

    def _counter(self, name: str) -> Callable[[], int]:
        return lambda: self._done[name]

    def _endless(self, name: str) -> Iterator[Batch]:
        while True:
            given = False
            for batch in self.loaders[name]:
                given = True
                yield batch
            if not given:
                raise ConfigError(f"The source {name} has fewer images than one batch per process; leave it out.")
