"""Base of all sources on disk: settings, tokenizer, required files, loaders for each stage."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from visexpert.data.base import DataModule
from visexpert.data.division import StepSize
from visexpert.data.faults import FILE, FaultLog
from visexpert.data.images import ImageReader, Resize
from visexpert.data.loader import Loader, TrainingLoader
from visexpert.data.needs import AnyNeed, DatasetNeed, Need, TokenizerNeed, load_tokenizer, require
from visexpert.data.packing import TextPacker
from visexpert.data.workers import DEFAULT_TIMEOUT, DEFAULT_WORKERS
from visexpert.errors import ConfigError, require_numbers
from visexpert.typed import typed
from visexpert.types import Batch, ImageSource, TextEncoder

Template: TypeAlias = Callable[[PreTrainedTokenizerBase], TextEncoder]
"""Builds a text encoder from a tokenizer: a class whose other arguments are filled in."""


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Random augmentation of training images, whose tokens then cannot be stored.

    Args:
        crop_scale: Smallest share of the area that random crops keep, in (0, 1]; null for no crops.
        flip: Mirror half of the images, which makes left and right meaningless.
    """

    crop_scale: float | None = None
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a source is read; :class:`~visexpert.data.source.SourceData` documents each setting.

    Raises:
        ConfigError: A value is out of range.
    """

    tokenizer: str | None
    template: Template | None
    max_tokens: int | None
    image_size: int
    resize: Resize
    augment: AugmentSettings
    batch_size: int | None
    global_batch_size: int | None
    eval_batch_size: int
    train_fraction: float
    num_val: int | None
    num_test: int | None
    seed: int
    order_seed: int
    num_workers: int
    worker_timeout: float
    max_broken: float

    def __post_init__(self) -> None:
        least = dict.fromkeys(("batch_size", "global_batch_size", "eval_batch_size", "num_val", "num_test"), 1)
        least |= {"num_workers": 0, "max_tokens": 3}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}, but must be at least {low}; raise it.")
        for name, low_open in (("train_fraction", True), ("max_broken", False)):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (low_open and value == 0):
                raise ConfigError(f"{name} must be in {'(' if low_open else '['}0, 1], got {value}.")
        require_numbers("The data", least=0, worker_timeout=self.worker_timeout)
        self.reader()

    def reader(self) -> ImageReader:
        """Return the reader that decodes and resizes images."""
        return ImageReader(size=self.image_size, resize=self.resize, **vars(self.augment))

    def most(self, part: str) -> int | None:
        """Return the maximum number of rows of a part; None for no limit."""
        return {"val": self.num_val, "test": self.num_test}.get(part)

    def share(self, part: str) -> float:
        """Return the share of a part that is used."""
        return self.train_fraction if part == "train" else 1.0


PARTS: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
"""Parts of a source that each stage of the trainer reads."""

CAPTION_PROMPT = "a picture of"
"""Prompt for a caption: Prismer's, since ToVE does not state its own."""


@typed
class SourceData(DataModule):
    """Images and texts from disk; the base of one class per data set.

    Args:
        root: Folder of the data set.
        tokenizer: Folder or Hugging Face id (also ``hf:ORG/NAME@REVISION``) of a transformers tokenizer, read from disk
            and never downloaded; null gives batches without text.
        template: How to tokenize prompts and answers: null for ``<bos> prompt answer <eos>``;
            :class:`~visexpert.language.LlavaTemplate` for LLaVA's templates, :class:`~visexpert.data.ChatPacker` for
            the tokenizer's own template, or your own :class:`~visexpert.types.TextEncoder`.
        max_tokens: Without a template: maximum length of a text in tokens, longer ones are truncated; null for no
            limit.
        image_size: Side of the square images in batches, pixels; use the largest size that CLIP or an expert reads.
        resize: ``crop`` (resize the shorter side, crop the center), ``stretch`` (the whole image, distorted) or
            ``pad``.
        augment: Random augmentation of training images.
        batch_size: Images per training batch and process; null for 32, or for what ``global_batch_size`` leaves.
        global_batch_size: Images per optimizer step over all processes. What ``batch_size`` or the trainer's
            ``accumulate_grad_batches`` do not say follows from the number of processes, whatever that is; null for no
            fixed number.
        eval_batch_size: Images per batch of validation, test and prediction.
        train_fraction: Share of the training part to use, in (0, 1]; smaller shares are subsets of larger ones.
        num_val: Maximum number of images of the validation part; null for all.
        num_test: Maximum number of images of the test part; null for all.
        seed: Seed of the choice of rows for ``train_fraction``, ``num_val`` and ``num_test``.
        order_seed: Seed of the order of batches, of the choice of texts and of augmentation; null for the run's own.
        num_workers: Worker processes that read and decode; by default 4, or the number of cores if that is less.
        worker_timeout: Seconds to wait for a batch of the workers before the run ends; 0 waits without end.
        max_broken: Largest share of broken images or records, in [0, 1]; they are skipped and listed in
            ``skipped.jsonl`` in the run's folder. Above it the run stops.

    Raises:
        ConfigError: A value is out of range.
    """

    parts: tuple[str, ...] = ("train", "val", "test")

    def __init__(
        self,
        *,
        root: str,
        tokenizer: str | None = None,
        template: Template | None = None,
        max_tokens: int | None = None,
        image_size: int = 224,
        resize: Resize = "crop",
        augment: AugmentSettings = AugmentSettings(),
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        eval_batch_size: int = 64,
        train_fraction: float = 1.0,
        num_val: int | None = None,
        num_test: int | None = None,
        seed: int = 0,
        order_seed: int | None = None,
        num_workers: int = DEFAULT_WORKERS,
        worker_timeout: float = DEFAULT_TIMEOUT,
        max_broken: float = 0.01,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        order_seed = int(os.environ.get("PL_GLOBAL_SEED", seed)) if order_seed is None else order_seed
        self.settings = Settings(
            tokenizer=tokenizer,
            template=template,
            max_tokens=max_tokens,
            image_size=image_size,
            resize=resize,
            augment=augment,
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            train_fraction=train_fraction,
            num_val=num_val,
            num_test=num_test,
            seed=seed,
            order_seed=order_seed,
            num_workers=num_workers,
            worker_timeout=worker_timeout,
            max_broken=max_broken,
        )
        self.label = ""
        self.fault_logs: list[FaultLog] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._packer: TextEncoder | None = None
        self._folder: Path | None = None

    # -- Defined by each source -----------------------------------------------------------------------------------

    @abstractmethod
    def needs(self, part: str) -> Sequence[Need | DatasetNeed]:
        """List what a part needs on disk."""

    @abstractmethod
    def open(self, part: str) -> None:
        """Read the annotations of a part, unless that is done.

        Raises:
            DataError: They cannot be read, or too many are broken.
        """

    @abstractmethod
    def loader(
        self, part: str, *, position: Callable[[], int] | None = None, plain: bool = False, most: int | None = None
    ) -> TrainingLoader:
        """Return this process's batches of an opened part: training batches are shuffled, others come once, in order.

        Args:
            part: ``train``, ``val`` or ``test``.
            position: For training: returns how many batches of the endless sequence are done.
            plain: Read training images as those of validation: once, in order, unchanged, with strings.
            most: With ``plain``: number of images to read, over all processes; None for all.
        """

    def plain_batches(self, part: str, *, most: int | None = None) -> Loader:
        """Return batches of a part as of validation, opened if need be; see :meth:`loader`.

        Raises:
            UserError: Something that the part needs is missing.
        """
        self.check([part])
        self.open(part)
        return self.loader(part, plain=True, most=most)

    @abstractmethod
    def image_sources(self) -> dict[str, ImageSource]:
        """Return images of the opened parts by row, for the feature store."""

    # -- Text -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, read on first use; None if batches have no text."""
        if self._tokenizer is None and self.settings.tokenizer is not None:
            self._tokenizer = load_tokenizer(self.settings.tokenizer)
        return self._tokenizer

    @property
    def packer(self) -> TextEncoder | None:
        """The text encoder; None if batches have no text."""
        tokenizer, template = self.tokenizer, self.settings.template
        if self._packer is None and tokenizer is not None:
            max_tokens = self.settings.max_tokens
            self._packer = TextPacker(tokenizer, max_tokens=max_tokens) if template is None else template(tokenizer)
        return self._packer

    # -- Lightning hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check that nothing is missing and that the tokenizer can encode texts (once per machine)."""
        self.check(self.parts_of_stage(None))
        _ = self.packer  # fail before the feature store is filled, which takes long

    def setup(self, stage: str | None = None) -> None:
        """Read the annotations that ``stage`` needs (fit, validate, test, predict; None for all)."""
        super().setup(stage)
        self.find_run_folder()
        for part in self.parts_of_stage(stage):
            self.open(part)

    def train_dataloader(self) -> Loader:
        """Return the training batches: shuffled per epoch, resumed in mid-epoch after an interruption."""
        if "train" not in self.parts:
            raise ConfigError(f"{self.called} has no training part; train on another source (see MixedData).")
        return self.in_steps(self.loader("train", position=self.batches_done()))

    def val_dataloader(self) -> Loader | list[Batch]:
        """Return the validation batches, in order, with strings; none if there is no such part."""
        return self.loader("val") if "val" in self.parts else []

    def test_dataloader(self) -> Loader | list[Batch]:
        """Return the test batches, in order, with strings; none if there is no such part."""
        return self.loader("test") if "test" in self.parts else []

    def predict_dataloader(self) -> Loader | list[Batch]:
        """Return the test batches."""
        return self.test_dataloader()

    # -- Shared by the sources ------------------------------------------------------------------------------------

    def training_rows(self) -> int | None:
        """Return the number of training images; None if they cannot be counted without reading them."""
        return None

    def described(self) -> list[str]:
        """See :class:`~visexpert.data.base.DataModule`."""
        settings = self.settings
        words = "no text" if settings.tokenizer is None else f"tokenizer {settings.tokenizer}"
        share = [] if settings.train_fraction == 1 else [f"{settings.train_fraction:g} of train"]
        return [
            str(self.root),
            " + ".join(self.parts),
            *share,
            f"{settings.image_size} px",
            str(self.step_size()),
            words,
        ]

    def step_size(self) -> StepSize:
        """See :class:`~visexpert.data.base.DataModule`."""
        return StepSize(self.settings.batch_size, self.settings.global_batch_size)

    @property
    def called(self) -> str:
        """Name of the source in messages."""
        return type(self).__name__ + (f" ({self.label})" if self.label else "")

    def check(self, parts: Sequence[str]) -> None:
        """Check that nothing these parts need is missing."""
        require(self.all_needs(parts), source=self.called)

    def check_stage(self, stage: str) -> None:
        """Check that nothing a stage reads is missing."""
        self.check(self.parts_of_stage(stage))

    def all_needs(self, parts: Sequence[str]) -> list[AnyNeed]:
        """List everything that these parts need, without repeats."""
        needs: list[AnyNeed] = [need for part in parts for need in self.needs(part)]
        if self.settings.tokenizer is not None:
            needs.append(TokenizerNeed(self.settings.tokenizer))
        return list(dict.fromkeys(needs))

    def split_of(self, part: str) -> str:
        """Return the split name that rows of a part refer to, unique across sources."""
        return f"{self.label}/{part}" if self.label else part

    def has_part(self, part: str) -> bool:
        """Return whether there is such a part."""
        return part in self.parts

    def parts_of_stage(self, stage: str | None) -> list[str]:
        """Return the parts that a stage reads; None means the trainer's stage, or all parts without a trainer."""
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        return [part for part in PARTS.get(stage, self.parts) if part in self.parts]

    def find_run_folder(self) -> None:
        """Find the run's folder; all processes must call this together, because the first one broadcasts it."""
        if self.trainer is not None:
            self._folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def faults(self, part: str, *, total: int, shared: bool) -> FaultLog:
        """Return the log of broken records in a part.

        Args:
            part: The part.
            total: Number of its records or images.
            shared: Whether processes share them (images) or each process reads all (annotations).
        """
        rank, world = self.process
        name = FILE if rank == 0 else FILE.replace(".", f".rank{rank}.", 1)
        file = None if self._folder is None or (rank and not shared) else self._folder / name
        log = FaultLog(
            f"{self.called} {part}",
            total=-(-total // world) if shared else total,
            limit=self.settings.max_broken,
            file=file,
        )
        self.fault_logs.append(log)
        return log


def no_fixed_images(source: str) -> ConfigError:
    """Return the error that says why tokens of augmented images cannot be stored.

    Args:
        source: Name of the source of the images.
    """
    return ConfigError(
        f"{source} augments its images (augment), so tokens cannot be stored; set store.folder to null, or leave "
        "augment out."
    )
