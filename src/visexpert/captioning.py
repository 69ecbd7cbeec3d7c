"""Captions and answers for images from anywhere, by a finished run: what ``visexpert caption`` and the page share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visexpert.data import TextPacker, read_image
from visexpert.data.images import Picture, to_tensor
from visexpert.data.source import Settings
from visexpert.errors import ConfigError, DataError, shown
from visexpert.experts import VisionExpert
from visexpert.language import Decoding
from visexpert.runs import SavedRun
from visexpert.typed import typed
from visexpert.types import Batch, TextEncoder
from visexpert.vision import VisionEncoder


@dataclass(frozen=True)
class Answer:
    """What a model said about one image.

    Args:
        text: The caption or answer.
        experts: Names of the experts that took part.
        gates_HWK: Weight of each of them per token, float32 in [0, 1], on the token grid; None without a gate.
        image_HW3: The square image that the encoders got, float32 in [0, 1].
    """

    text: str
    experts: tuple[str, ...]
    gates_HWK: NDArray[Any] | None
    image_HW3: NDArray[Any]

    @property
    def shares(self) -> dict[str, float] | None:
        """Mean gate of each expert."""
        if self.gates_HWK is None:
            return None
        return dict(zip(self.experts, self.gates_HWK.mean(axis=(0, 1)).tolist(), strict=True))

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {share:.2f}" for name, share in (self.shares or {}).items())
        height, width = self.image_HW3.shape[:2]
        return f"Answer({self.text!r}, image {height}x{width}, {told or ', '.join(self.experts) or 'no experts'})"


@dataclass(frozen=True)
class Captioned:
    """One file of a list: its answer, or the sentence that says why it cannot be read."""

    path: Path
    answer: Answer | None
    error: str | None = None


@typed
class Captioner:
    """Answers prompts about images by a finished run, whole, with detached experts, or merged; threads may share it.

    Images of any size become one batch of squares as in the run's training (``resize`` and ``image_size`` of its
    data). Data that say nothing of it get squares of ``side`` px, the largest input among the encoder and the experts:
    bicubic, antialiased, the whole image, its aspect ratio not kept. Each encoder then resizes to its own input.

    Args:
        run: The opened run.
        device: Where to compute, such as ``cpu`` or ``cuda:1``; None is the GPU where there is one.
        batch_size: Images per forward.

    Raises:
        ConfigError: ``device`` or ``batch_size`` cannot be.
    """

    def __init__(self, run: SavedRun, *, device: str | None = None, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.")
        self.run, self.batch_size = run, batch_size
        self._device = device_of(device)
        self._model = run.model.to(self._device).eval()
        self._encoder = text_encoder_of(run)
        self._hub = self._model.hub
        self.experts = self._model.read_experts
        modules = self._model.modules()
        settings = getattr(run.data, "settings", None)
        self._reader = settings.reader() if isinstance(settings, Settings) else None
        largest = max(part.image_size for part in modules if isinstance(part, VisionEncoder | VisionExpert))
        self.side = largest if self._reader is None else self._reader.size
        self._lock = Lock()

    def __repr__(self) -> str:
        experts = f"experts {', '.join(self.experts)}" if self.experts else "no experts"
        return f"Captioner({self.run.folder}, {type(self._model).__name__}, {experts}, {self.side} px, {self._device})"

    @property
    def default_prompt(self) -> str:
        """The words that asked for a caption in training.

        Raises:
            ConfigError: The run's data has no such words that we know.
        """
        if isinstance(prompt := getattr(self.run.data, "prompt", None), str):
            return prompt
        raise ConfigError(
            f"'{self.run.folder}' was trained on {type(self.run.data).__name__}, for which no caption prompt is known; "
            "give the words that asked for captions there as the prompt."
        )

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that the vocabulary lacks: the model reads ``<unk>`` in their place."""
        tokenizer = self.run.tokenizer
        encoded = self._encoded(prompt)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        unknown = [prompt[begin:end] for token, (begin, end) in pairs if token == tokenizer.unk_token_id]
        return list(dict.fromkeys(unknown))

    def frame(self, image_CHW: Tensor) -> Picture:
        """A uint8 image (3, H, W) as the square (3, side, side) that training made of it, float32 in [0, 1].

        Raises:
            DataError: The image has another form.
        """
        _check_image(image_CHW)
        original_hw = (image_CHW.shape[1], image_CHW.shape[2])
        if self._reader is not None:
            squared = self._reader.square(Image.fromarray(image_CHW.permute(1, 2, 0).numpy()))
            return Picture(to_tensor(squared).float() / 255.0, original_hw)
        image_1CHW = image_CHW[None].float() / 255.0
        size = (self.side, self.side)
        if image_1CHW.shape[-2:] != size:
            image_1CHW = F.interpolate(image_1CHW, size=size, mode="bicubic", antialias=True, align_corners=False)
        return Picture(image_1CHW[0].clamp(0.0, 1.0), original_hw)

    @torch.inference_mode()
    def answer(
        self,
        pictures: Sequence[Picture],
        prompts: str | Sequence[str],
        *,
        decoding: Decoding | None = None,
        experts: Collection[str] | None = None,
    ) -> list[Answer]:
        """Answer one prompt per image in one forward.

        Args:
            pictures: B images by :meth:`frame`.
            prompts: One for all, or B.
            decoding: How to write; None is greedy.
            experts: The only experts to listen to; None for all of :attr:`experts`.

        Raises:
            ConfigError: An expert that the run does not use.
            DataError: A prompt that is too long for the model, or no text (bytes that are no UTF-8); another number
                of prompts than of pictures; pictures that :meth:`frame` did not make.
        """
        _check_pictures(pictures)
        asked = [prompts] * len(pictures) if isinstance(prompts, str) else list(prompts)
        if len(asked) != len(pictures):
            raise DataError(f"{len(pictures)} pictures need one prompt for all or one each, got {len(asked)}.")
        if not asked:
            return []
        for prompt in asked:
            _check_text(prompt)
        ids = [self._encoder.prompt(prompt) for prompt in asked]
        images_BCHW = torch.stack([picture.image_CHW for picture in pictures]).to(self._device)
        original_hw_B2 = torch.tensor([picture.original_hw for picture in pictures]).reshape(-1, 2)
        batch = Batch(images_BCHW, torch.arange(len(pictures)), split="", original_hw_B2=original_hw_B2)
        with self._lock, self._listening_to(experts) as names:
            vision = self._model.encode(batch)
            written = self._model.language.generate(vision, ids, eos_id=self._encoder.eos_id, decoding=decoding)
        gates: Sequence[Any] = [None] * len(pictures)
        if vision.gates_BTK is not None:
            columns = [self._hub.names.index(name) for name in names]
            gates = list(vision.gates_BTK[..., columns].unflatten(1, vision.grid_hw).float().cpu().numpy())
        pixels = images_BCHW.permute(0, 2, 3, 1).cpu().numpy()
        texts = [str(self.run.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in written]
        return [Answer(text, names, gate, image) for text, gate, image in zip(texts, gates, pixels, strict=True)]

    def caption(self, paths: Sequence[Path], prompt: str, *, decoding: Decoding | None = None) -> Iterator[Captioned]:
        """Answer one prompt about image files, in their order, batch by batch; a broken file stops no other.

        An image's sampled text depends on the seed and on its place among the readable ones, not on ``batch_size``
        (:class:`~visexpert.language.PrefixLM` excepted).
        """
        decoding = decoding or Decoding()
        done = 0
        for start in range(0, len(paths), self.batch_size):
            read = [self._read(path) for path in paths[start : start + self.batch_size]]
            pictures = [image for image in read if isinstance(image, Picture)]
            seeded = replace(decoding, seed=decoding.seed + done)
            answers = iter(self.answer(pictures, prompt, decoding=seeded) if pictures else [])
            done += len(pictures)
            for path, image in zip(paths[start:], read, strict=False):
                error = image if isinstance(image, str) else None
                yield Captioned(path, next(answers) if error is None else None, error)

    def _read(self, path: Path) -> Picture | str:
        try:
            return self.frame(read_image(path))
        except DataError as error:
            return str(error)

    def _encoded(self, prompt: str) -> Any:
        # Words such as "<eos>" in a user's prompt stay words.
        return self.run.tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
        )

    @contextmanager
    def _listening_to(self, experts: Collection[str] | None) -> Iterator[tuple[str, ...]]:
        """Attach these experts alone, and put back what was attached before, whatever happens."""
        absent = sorted(set(experts or ()) - set(self.experts))
        if absent:
            raise ConfigError(f"The run uses no expert {absent[0]!r}; it has {', '.join(self.experts) or 'none'}.")
        names = self.experts if experts is None else tuple(name for name in self.experts if name in experts)
        silent = [name for name in self.experts if name not in names]
        try:
            for name in silent:
                self._hub.detach(name)
            yield names
        finally:
            for name in silent:
                self._hub.attach(name)


def _check_image(image_CHW: object) -> None:
    """Refuse floats above all: divided by 255 once more they would be black."""
    if not isinstance(image_CHW, Tensor):
        found = type(image_CHW).__name__
    elif image_CHW.dtype != torch.uint8 or image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        found = f"{str(image_CHW.dtype).removeprefix('torch.')} {tuple(image_CHW.shape)}"
    else:
        return
    raise DataError(f"An image must be a uint8 tensor (3, H, W), as visexpert.read_image gives it, got {found}.")


def _check_pictures(pictures: object) -> None:
    if isinstance(pictures, Sequence) and all(isinstance(each, Picture) for each in pictures):
        return
    raise DataError("Pictures must be a list of what Captioner.frame gives: answer([captioner.frame(image)], prompt).")


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The prompt {shown(prompt)!r} is no text (character {error.start} is no UTF-8); write it as UTF-8."
        ) from None


def text_encoder_of(run: SavedRun) -> TextEncoder:
    """What frames a run's texts: prompts become what the model read before answers in training.

    Data that say nothing of it (``packer``), but have a tokenizer, have plain texts.

    Raises:
        ConfigError: The run's data has no text.
    """
    encoder, tokenizer = getattr(run.data, "packer", None), getattr(run.data, "tokenizer", None)
    if encoder is None and tokenizer is not None:
        return TextPacker(tokenizer)
    if not isinstance(encoder, TextEncoder):
        raise ConfigError(
            f"'{run.folder}' was trained without text ({type(run.data).__name__} has no tokenizer), so it answers "
            "nothing; give a run that was trained with a language model."
        )
    return encoder


def device_of(name: str | None) -> torch.device:
    """Return the device of a name; None for a GPU, if there is one.

    Raises:
        ConfigError: It cannot be used here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {name!r} cannot be used ({str(error).splitlines()[0]}); take cpu.") from error
