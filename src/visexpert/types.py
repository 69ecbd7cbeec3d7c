"""The contracts between packages: what data, experts, vision, language and methods pass to each other.

Shape legend, used in every name: B batch · T CLIP patch tokens · S expert tokens · D CLIP width · E expert width ·
K experts · R LoRA rank · H heads (or image height beside W) · L text length · N packed text length · V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visexpert.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token that takes no part in the language loss (the convention of torch and transformers)."""

IMAGE_TOKEN = -200
"""Id that stands in a text where its image goes (LLaVA's convention); it is in no vocabulary."""

Unit = Literal["token", "image"]
"""What a loss averages over: supervised tokens, or samples that have an image."""

UNITS: tuple[Unit, ...] = ("token", "image")

_Self = TypeVar("_Self", bound="TensorRecord")


@dataclass(frozen=True)
class TensorRecord:
    """A frozen record of tensors that Lightning can move to a device (it calls ``.to``)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # else each dataclass would write out its tensors
            cls.__repr__ = TensorRecord._short  # type: ignore[method-assign, assignment]

    def _short(self) -> str:
        """Return shapes in place of tensors, and counts in place of texts."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in given)})"

    of_host: ClassVar[frozenset[str]] = frozenset()
    """Fields that stay on the host, which reads them without waiting for the device."""

    def to(self: _Self, device: torch.device | str, **kwargs: Any) -> _Self:
        """Return a copy with each tensor, nested record and mapping of tensors on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {
            name: value
            if name in self.of_host
            else _mapped(value, lambda tensor: tensor.to(device, **kwargs), lambda record: record.to(device, **kwargs))
            for name, value in moved.items()
        }
        return replace(self, **moved)

    def mapped(self: _Self, change: Callable[[Tensor], Tensor]) -> _Self:
        """Return a copy with each tensor changed, those of nested records and mappings, too."""
        changed = {
            f.name: _mapped(getattr(self, f.name), change, lambda record: record.mapped(change)) for f in fields(self)
        }
        return replace(self, **changed)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list) and len(repr(value)) > 40:
        return f"<{len(value)}>"
    return repr(value)


def _mapped(value: Any, change: Callable[[Tensor], Tensor], within: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, TensorRecord):
        return within(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change, within) for key, item in value.items()}
    return value


def imaged(values: Tensor, has_image_B: Tensor | None) -> Tensor:
    """Return the rows of samples that have an image.

    Args:
        values: One row for each sample.
        has_image_B: bool, on the host (on a device, this waits for it); None if all have one.
    """
    there = None if has_image_B is None else has_image_B.tolist()
    if there is None or all(there):
        return values
    rows = torch.tensor([row for row, has in enumerate(there) if has], dtype=torch.long)
    return values.index_select(0, rows.to(values.device, non_blocking=True))


class CaptionTruth(Protocol):
    """The true content of an image, for data that can judge a caption without references."""

    @property
    def caption(self) -> str:
        """A caption that names what the image shows, for retrieval."""

    @property
    def label(self) -> str:
        """The image's class."""

    def judge(self, caption: str) -> Mapping[str, bool]:
        """Return by name which of a caption's statements hold; it is correct if all do; names may differ."""


@dataclass(frozen=True)
class TextItem:
    """One text that goes with an image.

    Args:
        kind: Name of the task in reports: ``caption``, ``vqa``, ``vsr``, ``pope``, ``chat`` or one that the data adds.
        prompt: What the model reads (a question, a statement, or the words that ask for a caption).
        answer: What it must write.
        family: Finer kind for reports (``colour``, ``distance``, ``left-right``, ``adversarial``, ...).
        references: All accepted texts, for caption metrics and human answers; empty means ``(answer,)``.
        history: Earlier (prompt, answer) turns of a conversation; their answers are learned like the last one's.
        generate: Score what the model generates; else its choice at each token given the true ones before it, which is
            the same if only one wording is right.
        scored_as: How the answer is scored: ``caption`` (written in any case), ``vqa``, ``vsr``, ``pope`` or ``slots``
            (word by word); empty if ``kind`` is one of these.
    """

    kind: str
    prompt: str
    answer: str
    family: str = ""
    references: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    generate: bool = False
    scored_as: str = ""

    @property
    def task(self) -> str:
        """How the answer is scored."""
        return self.scored_as or self.kind


@dataclass(frozen=True)
class EncodedText:
    """A text item as tokens.

    Args:
        ids: int64 (L,), with :data:`IMAGE_TOKEN` where the image goes, unless it stands in front of all text.
        supervised: bool (L,), True for tokens that the model must write.
    """

    ids: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FrameTokens:
    """Ids that begin, end and pad texts.

    Args:
        bos: Opens a text: ``<bos>``, else BERT's ``[CLS]``, else ``eos``.
        eos: Ends an answer: ``<eos>``, else BERT's ``[SEP]``.
        pad: Fills short rows: ``<pad>``, else ``eos``.
    """

    bos: int
    eos: int
    pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, purpose: str) -> FrameTokens:
        """Look the ids up in a tokenizer.

        Args:
            tokenizer: A fast one, which knows each token's position in the text.
            purpose: What needs the ids, for the message.

        Raises:
            ConfigError: The tokenizer is a slow one, or no token of it can end an answer.
        """
        first = (tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None))
        last = (tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None))
        eos = next((token for token in last if token is not None), None)
        if not tokenizer.is_fast or eos is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} cannot {purpose}: that takes a fast tokenizer (with character offsets) "
                "that has an end-of-sequence token (or BERT's [SEP]); load another or set its eos_token."
            )
        bos = next((token for token in first if token is not None), eos)
        return cls(bos, eos, eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class TextEncoder(ABC):
    """Turns text items into tokens; what frames prompts and answers for one kind of language model.

    Attributes:
        eos_id: Ends an answer.
        pad_id: Fills short rows.
    """

    eos_id: int
    pad_id: int

    @abstractmethod
    def prompt(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> list[int]:
        """Return the ids that the model reads before it answers, made of the question alone.

        They are those that :meth:`encode` puts before the first id to learn of the last answer, whatever the answer.

        Args:
            question: The words of the user.
            history: Earlier (question, answer) turns.
            has_image: Whether the sample has an image.

        Raises:
            DataError: The question names a place for an image that is not there.
        """

    @abstractmethod
    def prompt_text(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> str:
        """Return the prompt as text: special tokens are written out, ``<image>`` stands where the image goes.

        A tokenizer that reads it as one text may differ from :meth:`prompt` in the word marks around special tokens.

        Args:
            question: The words of the user.
            history: Earlier (question, answer) turns.
            has_image: Whether the sample has an image.

        Raises:
            DataError: The question names a place for an image that is not there.
        """

    @property
    @abstractmethod
    def chat_template(self) -> str:
        """Jinja that renders :meth:`prompt_text` from messages, with ``add_generation_prompt``.

        A message's ``content`` is a string, in which ``<image>`` may stand, or a list of parts of the types ``image``
        and ``text``; without an image in any of them it is the prompt of a sample without one.
        """

    @abstractmethod
    def encode(self, item: TextItem, *, has_image: bool = True) -> EncodedText:
        """Tokenize one item.

        Args:
            item: The item, with all turns of its conversation.
            has_image: Whether its sample has an image.

        Raises:
            DataError: The item leaves nothing to learn, or no room for it.
        """


@dataclass(frozen=True)
class Skipped:
    """A record that was left out.

    Args:
        key: Its name in its source: an image file, a line, a member of a shard.
        reason: The reason, in one sentence.
        whole: Whether the whole record is left out, and not only a part, such as one of several captions.
    """

    key: str
    reason: str
    whole: bool = True


@dataclass(frozen=True)
class TextBatch(TensorRecord):
    """The text items of each image packed into one row, so that they share the image's keys and values.

    Args:
        ids_BN: int64 token ids; each item is ``<bos> prompt answer <eos>``, or a whole conversation, items follow one
            another. :data:`IMAGE_TOKEN` says where in an item its image goes; without, the image stands in front.
        labels_BN: int64, equal to ``ids_BN`` on answer tokens and their ``<eos>``, else :data:`IGNORE_INDEX`.
            Not shifted: the language model predicts position i from the positions before it in the same item. In a
            conversation every turn's answer is labeled, so labels may stand in several runs of one item.
        segments_BN: int64, 0 = padding, j = the image's j-th item (from 1). A token sees its own item only.
        positions_BN: int64 position inside the item, from 0.
    """

    ids_BN: Tensor
    labels_BN: Tensor
    segments_BN: Tensor
    positions_BN: Tensor

    @cached_property
    def facts(self) -> TextFacts:
        """What the host must know before it can run a step; counted once, and kept by :meth:`to`.

        If the tensors are on a device, counting waits for it.
        """
        return TextFacts.of(self)

    def to(self, device: torch.device | str, **kwargs: Any) -> TextBatch:
        """Return a copy on ``device``, counted before it leaves."""
        facts, moved = self.facts, super().to(device, **kwargs)
        moved.__dict__["facts"] = facts.to(device, **kwargs)
        return moved


@dataclass(frozen=True)
class TextFacts(TensorRecord):
    """What the host must know of packed text, so that the sizes of a step are known before it runs.

    Args:
        places_M: int64, row * N + column of each supervised token, in order.
        lengths_BI: Tokens of each item, 0 where a row has fewer items; numpy's, hence on the host.
        markers_BI: How many of them are :data:`IMAGE_TOKEN`; likewise.
        longest: Tokens of the longest item.
        lowest: Smallest id, labels included, apart from :data:`IMAGE_TOKEN` and :data:`IGNORE_INDEX`; 0 of no text.
        highest: Largest id, labels included; 0 of no text.
        has_markers: Whether any item says where its image goes.
        opens_supervised: Whether the first token of a row is supervised, which nothing can predict.
    """

    places_M: Tensor
    lengths_BI: npt.NDArray[np.int64]
    markers_BI: npt.NDArray[np.int64]
    longest: int
    lowest: int
    highest: int
    has_markers: bool
    opens_supervised: bool

    @classmethod
    def of(cls, text: TextBatch) -> TextFacts:
        """Count the tokens of packed text.

        Raises:
            DataError: Its fields are not int64 tensors of one shape (B, N).
        """
        for name, values in ((each.name, getattr(text, each.name)) for each in fields(text)):
            if values.dtype != torch.int64 or values.ndim != 2 or values.shape != text.ids_BN.shape:
                raise DataError(
                    f"TextBatch: {name} is {_brief(values)}, but must be int64 (B, N), as all its fields; build it "
                    "with visexpert.data.pack."
                )
        ids_BN, labels_BN, segments_BN = (
            values.cpu().numpy() for values in (text.ids_BN, text.labels_BN, text.segments_BN)
        )
        wanted_BN = labels_BN != IGNORE_INDEX
        known = np.concatenate([ids_BN[ids_BN != IMAGE_TOKEN], labels_BN[wanted_BN]])
        num_rows, num_items = len(ids_BN), int(segments_BN.max(initial=0))
        cell_BN = np.arange(num_rows)[:, None] * (num_items + 1) + segments_BN

        def counted(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            counts = np.bincount(cells.ravel(), minlength=num_rows * (num_items + 1))
            return counts.reshape(num_rows, num_items + 1)[:, 1:]

        lengths_BI, markers_BI = counted(cell_BN), counted(cell_BN[ids_BN == IMAGE_TOKEN])
        return cls(
            places_M=torch.from_numpy(np.flatnonzero(wanted_BN)).to(text.labels_BN.device),
            lengths_BI=lengths_BI,
            markers_BI=markers_BI,
            longest=int(lengths_BI.max(initial=0)),
            lowest=int(known.min(initial=0)),
            highest=int(known.max(initial=0)),
            has_markers=bool(markers_BI.any()),
            opens_supervised=bool(wanted_BN[:, :1].any()),
        )

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens, M."""
        return len(self.places_M)


@dataclass(frozen=True)
class StepCounts:
    """Counts of a batch, and of all batches of its optimizer step together, in this process.

    Args:
        batch: Of the batch: supervised tokens, and samples that have an image.
        step: Of all batches of the step, this one included.
        place: Place of the batch among them, from 0.
    """

    batch: Mapping[Unit, int]
    step: Mapping[Unit, int]
    place: int


@dataclass(frozen=True)
class Batch(TensorRecord):
    """What a DataModule yields.

    Args:
        images_BCHW: RGB, uint8 0-255 or float in [0, 1], at the data's own size; each encoder resizes on its own.
        index_B: int64 row of each image in its split, the key of the feature store; stays on the host.
        split: Name of the split that ``index_B`` counts in.
        text: Packed text, or None for a batch of images alone.
        items: The same text as strings, per image in segment order; filled for evaluation only.
        prompts: Ids that the model reads before it answers each of ``items``, by :meth:`TextEncoder.prompt`.
        targets: Dense ground truth by name (zoo training): e.g. ``depth_BHW``, ``normals_B3HW``.
        truths: What is known of each image, where the data can judge captions by it; filled for evaluation only.
        has_image_B: bool, False for samples of text alone, whose pixels mean nothing; None where all have an image.
            Stays on the host.
        original_hw_B2: int64 height and width of each image before it was resized; None where all were of one size.
            Stays on the host.
        source: Name of the source, where a run reads several; its scores stand under this name.
        skipped: Records that this batch would have had, but that cannot be read.
        step: What this batch and its whole optimizer step count; None outside training.
        keys: What names each image in its source, such as its file; empty in training, and where rows have no names.
        labels: Class of each image, for probes, empty for an image without; empty in training, and without classes.
    """

    of_host = frozenset({"index_B", "has_image_B", "original_hw_B2"})

    images_BCHW: Tensor
    index_B: Tensor
    split: str
    text: TextBatch | None = None
    items: tuple[tuple[TextItem, ...], ...] = ()
    prompts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    truths: tuple[CaptionTruth, ...] = ()
    has_image_B: Tensor | None = None
    original_hw_B2: Tensor | None = None
    source: str = ""
    skipped: tuple[Skipped, ...] = ()
    step: StepCounts | None = None
    keys: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.images_BCHW.shape[0]

    def counts(self) -> dict[Unit, int]:
        """Number of supervised tokens, and of samples that have an image."""
        images = len(self) if self.has_image_B is None else sum(self.has_image_B.tolist())
        return {"token": 0 if self.text is None else self.text.facts.num_supervised, "image": images}

    def images_01(self) -> Tensor:
        """The images as encoders take them: (B, 3, H, W), in [0, 1], float32 or better; scaled once a batch.

        Encoders resize and normalize at this precision and cast to that of their weights last.

        Raises:
            DataError: They are no dense tensor (B, 3, H, W) of uint8 or floats, or hold no pixel.
        """
        return self._unit_images

    @cached_property
    def _unit_images(self) -> Tensor:
        return _scaled(self.images_BCHW)


IMAGES_ARE_CHECKED: ContextVar[bool] = ContextVar("images_are_checked", default=False)
"""Whether :func:`images_are_checked` is active."""


@contextmanager
def images_are_checked() -> Iterator[None]:
    """Declare that images in this context come from a data module, so that encoders need not wait to check values."""
    token = IMAGES_ARE_CHECKED.set(True)
    try:
        yield
    finally:
        IMAGES_ARE_CHECKED.reset(token)


def no_batch(value: object, *, owner: str) -> ConfigError:
    """Return the error for something else than a batch, such as images alone."""
    return ConfigError(f"{owner}: batch is a {type(value).__name__}, but must be a Batch; vx.Batch(images, ids, '').")


def check_images(images_BCHW: Tensor, *, owner: str, device: torch.device | None = None) -> None:
    """Check that images are (B, 3, H, W) floats in [0, 1], at least one, on the device that computes.

    Values are checked only outside of :func:`images_are_checked`, and never on ``meta`` or while a graph is traced.

    Args:
        images_BCHW: The images.
        owner: Who reads them, for the message.
        device: Where it computes; None does not say.

    Raises:
        DataError: They are something else.
    """
    check_form(images_BCHW, owner=owner)
    if not images_BCHW.is_floating_point():
        raise DataError(f"{owner}: images must be floats in [0, 1], got {images_BCHW.dtype}; divide bytes by 255.")
    if device is not None and images_BCHW.device != device and not images_BCHW.is_meta:  # shapes alone run anywhere
        raise DataError(
            f"{owner}: images are on {images_BCHW.device}, but it computes on {device}; move them there with "
            f".to('{device}')."
        )
    if IMAGES_ARE_CHECKED.get() or images_BCHW.is_meta or _traced():
        return
    least, most = (float(value) for value in torch.aminmax(images_BCHW.detach()))
    if not (least >= -_ROUNDING and most <= 1 + _ROUNDING):
        raise DataError(
            f"{owner}: images must be in [0, 1], got {least:.3g} to {most:.3g}; each encoder normalizes by itself, so "
            "give pixels / 255 as they are."
        )


def check_form(images_BCHW: Tensor, *, owner: str) -> None:
    """Check that images are a dense tensor (B, 3, H, W) that holds some pixels, of whatever dtype.

    Raises:
        DataError: They are something else.
    """
    if not isinstance(images_BCHW, Tensor) or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        found = tuple(images_BCHW.shape) if isinstance(images_BCHW, Tensor) else type(images_BCHW).__name__
        raise DataError(f"{owner}: images must be a tensor (B, 3, H, W), got {found}; add the batch's axis, RGB first.")
    if not _traced() and not images_BCHW.numel():
        raise DataError(f"{owner}: images {tuple(images_BCHW.shape)} hold no pixel; give at least one image.")
    if images_BCHW.layout != torch.strided:
        raise DataError(f"{owner}: images must be dense, got {images_BCHW.layout}; call .to_dense().")


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


_ROUNDING = 1e-3
"""By how much resizing may leave [0, 1]."""


def _scaled(images: Tensor) -> Tensor:
    check_form(images, owner="Batch")
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 255.0
    if not images.is_floating_point():  # whose range nothing tells
        raise DataError(f"Batch: images must be uint8 in 0-255 or floats in [0, 1], got {images.dtype}; convert them.")
    return images.to(torch.promote_types(images.dtype, torch.float32))


@dataclass(frozen=True)
class ExpertTokens(TensorRecord):
    """Output of a frozen expert.

    Args:
        tokens_BSE: Tokens in row-major order of the grid, S = height x width.
        grid_hw: The grid.
        summary_BF: The expert's own summary of the image ([CLS] or pooled output), of any width; None without one.
    """

    tokens_BSE: Tensor
    grid_hw: tuple[int, int]
    summary_BF: Tensor | None = None


@dataclass(frozen=True)
class VisionTokens(TensorRecord):
    """Tokens that a language model reads.

    Args:
        tokens_BTD: Patch tokens, row-major; D is CLIP's width or, after a projector, the language width.
        grid_hw: The grid, height x width = T; of images in tiles (``lengths`` set, T larger) that of the whole view.
        cls_BD: The [CLS] token of the encoder, where there is one.
        gates_BTK: Gate of every expert per token, softmax over attached experts; None without a gate.
        balance: Scalar load-balancing loss of the gate, or None.
        lengths: Number of tokens of each image, the first ones of its row, the rest is padding; 0 for a sample without
            an image. None where all T are tokens.
        newline_BT: bool, tokens that end a row of tiles: the language model puts a vector of its own there.
    """

    tokens_BTD: Tensor
    grid_hw: tuple[int, int]
    cls_BD: Tensor | None = None
    gates_BTK: Tensor | None = None
    balance: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    newline_BT: Tensor | None = None

    def rows(self, chosen: Sequence[int]) -> VisionTokens:
        """Return the tokens of some images, without fields that are not per image (``balance``)."""
        index = torch.as_tensor(list(chosen), dtype=torch.long, device=self.tokens_BTD.device)
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {name: value[index] for name, value in picked.items() if isinstance(value, Tensor) and value.ndim}
        lengths = None if self.lengths is None else tuple(self.lengths[row] for row in chosen)
        return VisionTokens(**picked, grid_hw=self.grid_hw, lengths=lengths)


class ImageSource(Protocol):
    """All images of one split in row order, from which the feature store is filled."""

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels: changes whenever an image may have changed."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (len(rows), 3, H, W), uint8."""
