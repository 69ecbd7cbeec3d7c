"""The embedded world as a LightningDataModule: renders and stores its scenes on first use, then memory-maps them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from visexpert.data.base import DataModule
from visexpert.data.division import StepSize
from visexpert.data.loader import BatchLoader, StepLoader
from visexpert.data.packing import TextPacker
from visexpert.errors import ConfigError
from visexpert.io.weights import cache_root
from visexpert.tabletop.cache import SplitCache, ensure_split
from visexpert.tabletop.captions import DENSE_PROMPT, RELATION_PROMPT
from visexpert.tabletop.dataset import SplitImages, TabletopDataset, TextTable
from visexpert.tabletop.render import render
from visexpert.tabletop.scenes import sample_scenes
from visexpert.tabletop.text_tower import TabletopTextTower, text_tower
from visexpert.tabletop.texts import POOL_SIZES, Pools, ensure_pools, tabletop_tokenizer
from visexpert.tabletop.world import TabletopWorld
from visexpert.typed import typed

TRAIN_MIXTURE: dict[str, int] = {"dense": 1, "relation": 1, "vsr": 3, "vqa": 2, "pope": 1}
EVAL_MIXTURE: dict[str, int] = {"dense": 1, "relation": 1, "vsr": 4, "vqa": 8, "pope": 3}

EXAMPLE_SEED = 20_260_101
"""Seed of the example scenes; training and scores use seeds derived from a split's name."""

EXAMPLE_PROMPTS = (
    RELATION_PROMPT,
    DENSE_PROMPT,
    "how many objects are there ?",
    "is there a red cube in the image ?",
    "what colour is the cube ?",
    "what size is the blue sphere ?",
    "how far is the red cylinder ?",
    "the red cube is left of the blue sphere ?",
)


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which texts of a scene go into a batch.

    Args:
        train: Texts per training image by kind (``dense``, ``relation``, ``vsr``, ``vqa``, ``pope``, ``objects``),
            drawn anew each epoch from the scene's pool; null for 1 dense, 1 relation, 3 vsr, 2 vqa, 1 pope; empty for
            batches without text.
        eval: The same for evaluation, which always uses the first texts of the pool; null for 1 dense, 1 relation,
            4 vsr, 8 vqa, 3 pope.
        max_tokens: Maximum length of a text in tokens, longer answers are truncated; null for no limit (the world's
            own texts have up to 26).
    """

    train: dict[str, int] | None = None
    eval: dict[str, int] | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """How scenes are rendered on first use.

    Args:
        workers: Rendering processes; 0 renders in the training process.
        progress: Show progress bars while rendering and writing.
    """

    workers: int = 2
    progress: bool = True


@typed
class TabletopData(DataModule):
    """Tabletop: ray-cast scenes with exact truth, and captions, questions and statements written from it.

    Args:
        root: Folder of the cache; null for ``$VISEXPERT_CACHE`` or, if that is not set, ``~/.cache/visexpert``.
        num_train: Number of training scenes.
        num_val: Number of validation scenes.
        num_test: Number of test scenes.
        seed: Seed of the scenes and their texts.
        order_seed: Seed of the order of batches and of the choice of texts per epoch; null for the run's own
            (``seed_everything``), so that repeated runs also differ in their order.
        batch_size: Images per training batch and process; null for 32, or for what ``global_batch_size`` leaves.
        global_batch_size: Images per optimizer step over all processes. What ``batch_size`` or the trainer's
            ``accumulate_grad_batches`` do not say follows from the number of processes, whatever that is; null for no
            fixed number.
        eval_batch_size: Images per batch of validation, test and prediction.
        texts: Which texts of a scene go into a batch.
        with_targets: Add the dense ground truth to each batch (see
            :class:`~visexpert.tabletop.dataset.TabletopDataset`); batches of the test split always have it.
        train_fraction: Share of the training scenes to use, in (0, 1]; smaller shares are subsets of larger ones.
        train_split: Name of the training scenes; another name gives other scenes (the zoo trains on ``zoo``).
        num_workers: Worker processes that build batches; 0 is best on CPU, where a batch takes about 1 ms.
        rendering: How scenes are rendered on first use.
        world: Settings of the world, including the size of its images; null for the defaults.
        tokenizer: Turns texts into ids; null for the embedded world's own word-level tokenizer.

    Raises:
        ConfigError: A number, a share, a split name or a kind of text is invalid.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        num_train: int = 10_000,
        num_val: int = 500,
        num_test: int = 1000,
        seed: int = 0,
        order_seed: int | None = None,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        eval_batch_size: int = 64,
        texts: TextSettings = TextSettings(),
        with_targets: bool = False,
        train_fraction: float = 1.0,
        train_split: str = "train",
        num_workers: int = 0,
        rendering: RenderSettings = RenderSettings(),
        world: TabletopWorld | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.mixture = _checked_mixture("train", TRAIN_MIXTURE if texts.train is None else texts.train)
        self.eval_mixture = _checked_mixture("eval", EVAL_MIXTURE if texts.eval is None else texts.eval)
        if not 0 < train_fraction <= 1:
            raise ConfigError(
                f"TabletopData.train_fraction is {train_fraction}, but must be in (0, 1]; 1 uses all scenes."
            )
        if train_split in ("val", "test") or not train_split.isidentifier():
            raise ConfigError(
                f"TabletopData.train_split is {train_split!r}, but must be one word other than val and test, "
                "such as train or zoo."
            )
        numbers: dict[str, int | None] = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        numbers |= {"batch_size": batch_size, "global_batch_size": global_batch_size}
        numbers |= {"eval_batch_size": eval_batch_size}
        least = dict.fromkeys(numbers, 1) | {"num_workers": 0, "rendering.workers": 0}
        numbers |= {"num_workers": num_workers, "rendering.workers": rendering.workers}
        for name, number in numbers.items():
            if number is not None and number < least[name]:
                raise ConfigError(f"TabletopData.{name} is {number}, but must be at least {least[name]}; raise it.")
        self.root = cache_root(root)
        self.sizes = {train_split: num_train, "val": num_val, "test": num_test}
        self.train_split = train_split
        self.seed = seed
        self.order_seed = int(os.environ.get("PL_GLOBAL_SEED", seed)) if order_seed is None else order_seed
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        self.eval_batch_size = eval_batch_size
        self.with_targets = with_targets
        self.train_fraction = train_fraction
        self.num_workers = num_workers
        self.rendering = rendering
        self.world = world or TabletopWorld()
        self.tokenizer = tabletop_tokenizer() if tokenizer is None else tokenizer
        self.packer = TextPacker(self.tokenizer, max_tokens=texts.max_tokens)
        self._caches: dict[str, SplitCache] = {}
        self._pools: dict[str, Pools] = {}
        self._datasets: dict[str, TabletopDataset] = {}

    def described(self) -> list[str]:
        """See :class:`~visexpert.data.base.DataModule`."""
        share = [] if self.train_fraction == 1 else [f"{self.train_fraction:g} of {self.train_split}"]
        parts = [f"{number:,} {split}" for split, number in self.sizes.items()]
        return [*parts, *share, f"{self.image_size} px", str(self.step_size()), f"seed {self.seed}"]

    def step_size(self) -> StepSize:
        """See :class:`~visexpert.data.base.DataModule`."""
        return StepSize(self.batch_size, self.global_batch_size)

    @property
    def image_size(self) -> int:
        """Height and width of the images, pixels."""
        return self.world.image_size

    @property
    def prompt(self) -> str:
        """Prompt for a caption."""
        return RELATION_PROMPT

    @property
    def example_prompts(self) -> tuple[str, ...]:
        """One prompt of each kind that models are trained with."""
        return EXAMPLE_PROMPTS

    def example_images(self, count: int) -> list[Tensor]:
        """Render scenes that no training or score uses: uint8 (H, W, 3) each."""
        scenes = sample_scenes(count, seed=EXAMPLE_SEED, world=self.world)
        return list(render(scenes, size=self.image_size).rgb_NHW3)

    def text_tower(self, source: str | None) -> TabletopTextTower | None:
        """Return the text tower of a shipped encoder, which reads these scenes' captions; None for others."""
        return text_tower(source)

    def training_rows(self) -> int:
        """Return the number of training images."""
        return self._num_rows(self.train_split)

    def prepare_data(self) -> None:
        """Render and store the splits that the cache lacks (once per machine)."""
        for split in self._splits_of_stage():
            self._load(split)

    def setup(self, stage: str | None = None) -> None:
        """Map the splits that ``stage`` needs (fit, validate, test, predict; None for all) and tokenize their texts."""
        super().setup(stage)
        for split in self._splits_of_stage(stage):
            if split not in self._datasets:
                self._datasets[split] = self._build(split)

    def train_dataloader(self) -> StepLoader:
        """Return the training batches: shuffled per epoch, resumed in mid-epoch after an interruption."""
        rank, world = self.process
        division = self.division()
        batches = BatchLoader(
            self._datasets[self.train_split],
            batch_size=division.batch_size,
            shuffle=True,
            drop_last=True,
            step_size=division.step_size,
            seed=self.order_seed,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world,
            position=self.batches_done(),
        )
        return self.in_steps(batches)

    def val_dataloader(self) -> BatchLoader:
        """Return the validation batches, in order, with strings and scene graphs."""
        return self._eval_loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Return the test batches, in order, with strings and scene graphs."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """Return the test batches."""
        return self._eval_loader("test")

    def image_dataloader(self, split: str, *, batch_size: int | None = None) -> BatchLoader:
        """Return a split's images without texts, in order, to fill a feature store or to fit probes.

        Args:
            split: ``val``, ``test`` or the name of the training split.
            batch_size: Images per batch; None for ``eval_batch_size``.
        """
        if split not in self.sizes:
            raise ConfigError(f"The split {split!r} does not exist; use one of {', '.join(self.sizes)}.")
        source = self._dataset(split, table=None, with_targets=self.with_targets)
        return BatchLoader(source, batch_size=batch_size or self.eval_batch_size, num_workers=self.num_workers)

    def image_sources(self) -> dict[str, SplitImages]:
        """Return the images of the splits that are in use, for the feature store."""
        return {split: SplitImages(self._caches[split]) for split in self._datasets}

    def pools(self, split: str) -> Pools:
        """Return all texts of a split's scenes, rendering and writing them on first use."""
        self._load(split)
        return self._pools[split]

    def split_cache(self, split: str) -> SplitCache:
        """Return the rendered split with its dense truth and scene graphs, rendering it on first use."""
        self._load(split)
        return self._caches[split]

    def _splits_of_stage(self, stage: str | None = None) -> tuple[str, ...]:
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        by_stage: Mapping[str | None, tuple[str, ...]] = {
            TrainerFn.FITTING.value: (self.train_split, "val"),
            TrainerFn.VALIDATING.value: ("val",),
            TrainerFn.TESTING.value: ("test",),
            TrainerFn.PREDICTING.value: ("test",),
        }
        return by_stage.get(stage, tuple(self.sizes))

    def _load(self, split: str) -> None:
        if split in self._pools:
            return
        cache = ensure_split(
            self.root,
            split=split,
            num_scenes=self.sizes[split],
            seed=self.seed,
            world=self.world,
            num_workers=self.rendering.workers,
            progress=self.rendering.progress,
        )
        self._caches[split] = cache
        self._pools[split] = ensure_pools(
            cache.graphs,
            beside=cache.path,
            split=split,
            seed=self.seed,
            fingerprint=cache.fingerprint,
            progress=self.rendering.progress,
        )

    def _build(self, split: str) -> TabletopDataset:
        self._load(split)
        mixture = self.mixture if split == self.train_split else self.eval_mixture
        pools = self._pools[split][: self._num_rows(split)]
        table = TextTable(pools, packer=self.packer, mixture=mixture) if mixture else None
        return self._dataset(split, table=table, with_targets=self.with_targets or split == "test")

    def _dataset(self, split: str, *, table: TextTable | None, with_targets: bool) -> TabletopDataset:
        self._load(split)
        training = split == self.train_split
        return TabletopDataset(
            cache=self._caches[split],
            split=split,
            num_rows=self._num_rows(split),
            table=table,
            choice_seed=self.order_seed if training else None,
            for_evaluation=not training and table is not None,
            with_targets=with_targets,
        )

    def _num_rows(self, split: str) -> int:
        share = self.train_fraction if split == self.train_split else 1.0
        return max(1, round(share * self.sizes[split]))

    def _eval_loader(self, split: str) -> BatchLoader:
        rank, world = self.process
        return BatchLoader(
            self._datasets[split],
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world,
        )


def _checked_mixture(name: str, mixture: Mapping[str, int]) -> dict[str, int]:
    for kind, number in mixture.items():
        if kind not in POOL_SIZES:
            raise ConfigError(f"TabletopData.texts.{name} names {kind!r}, but the kinds are {', '.join(POOL_SIZES)}.")
        if not 0 <= number <= POOL_SIZES[kind]:
            raise ConfigError(
                f"TabletopData.texts.{name} asks for {number} x {kind}, but a scene has 0 to {POOL_SIZES[kind]}."
            )
    return {kind: number for kind, number in mixture.items() if number}
