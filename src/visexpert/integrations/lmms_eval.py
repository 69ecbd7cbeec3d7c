"""A run as a model of lmms-eval: ``lmms-eval --model visexpert --model_args run=RUN --tasks gqa,mme``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from PIL.Image import Image

from visexpert.captioning import Captioner
from visexpert.data.images import to_rgb, to_tensor
from visexpert.errors import ConfigError, DataError
from visexpert.language import Decoding
from visexpert.runs import load_run

IMAGE_MARK = "<image>"

IGNORED = frozenset({"do_sample", "image_aspect_ratio", "image_sizes", "use_cache"})
"""Ignored generation settings: generation is greedy without a temperature; images are framed as in training."""


class VisexpertModel(lmms):  # type: ignore[misc]
    """A run, as ``visexpert caption`` opens it: RUN itself, RUN/detached or RUN/merged.

    Prompts come from the task and are framed as in the run's training (``template``). Each question has one image;
    tasks without images or with several are refused.

    Args:
        run: Folder of the run.
        device: A torch device; None uses the GPU if there is one. Under ``accelerate launch`` each process uses its
            own GPU.
        batch_size: Questions at once; ``auto`` is 1.
        max_new_tokens: Longest answer if the task sets none.
        trust: Your own modules whose classes the run's configuration may name, joined by ``+``.
        kwargs: Further arguments of lmms-eval; ``max_batch_size`` is ignored, others are refused.

    Raises:
        ConfigError: ``run`` is not a run, or an argument is unknown.
    """

    is_simple = True

    def __init__(
        self,
        run: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        trust: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(kwargs.keys() - {"max_batch_size"}):
            raise ConfigError(
                f"--model visexpert has no argument {unknown[0]!r}; it has run, max_new_tokens and trust."
            )
        size = int(batch_size) if str(batch_size).isdigit() else 1
        self.run, self.max_new_tokens, self.batch_size = str(run), int(max_new_tokens), size
        opened = load_run(self.run, trust=str(trust).split("+") if trust else ())
        self._captioner = Captioner(opened, device=own_device(device), batch_size=size)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self._captioner.run.model.parameters()).device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions in order.

        Args:
            requests: Instances whose ``args`` are (text, generation settings, function from document to images,
                document number, task, split).

        Raises:
            ConfigError: A generation setting is unknown.
            DataError: A question has no image, or several.
        """
        answers: list[str] = []
        for settings, same in groupby(requests, key=lambda request: dict(request.args[1])):
            decoding, stops = decoding_of(settings, max_new_tokens=self.max_new_tokens)
            for chunk in chunks(list(same), self.batch_size):
                asked = [request.args[0].replace(IMAGE_MARK, "").strip() for request in chunk]
                pictures = [self._captioner.frame(self._image(request)) for request in chunk]
                said = self._captioner.answer(pictures, asked, decoding=decoding)
                for request, answer in zip(chunk, said, strict=True):
                    answers.append(until(answer.text, stops))
                    self.cache_hook.add_partial("generate_until", (request.args[0], settings), answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: every task of docs/evaluation.md is answered in words.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "--model visexpert gives no likelihoods; choose tasks of output_type generate_until, such as gqa, "
            "textvqa_val, vizwiz_vqa_val, scienceqa_img, mme or mmbench_en_dev."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: runs answer single questions.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("--model visexpert answers single questions; choose tasks of one round.")

    def _image(self, request: Any) -> torch.Tensor:
        """Return the question's image, uint8 (3, H, W)."""
        _, _, visuals_of, number, task, split = request.args
        visuals = list(visuals_of(self.task_dict[task][split][number]))
        if len(visuals) != 1 or not isinstance(visuals[0], Image):
            raise DataError(
                f"Question {number} of {task} has {len(visuals)} visuals, but a run of visexpert reads one image; "
                "choose a task of single images (scienceqa_img instead of scienceqa, for example)."
            )
        return to_tensor(to_rgb(visuals[0], name=f"of question {number} of {task}"))


def own_device(device: str | None) -> str | None:
    """Return this process's GPU if several processes run, else the given device."""
    rank = os.environ.get("LOCAL_RANK")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{rank}" if several and rank is not None and torch.cuda.is_available() else device


def decoding_of(settings: Mapping[str, Any], *, max_new_tokens: int) -> tuple[Decoding, tuple[str, ...]]:
    """Translate a task's ``generation_kwargs``.

    Args:
        settings: ``max_new_tokens``, ``temperature`` (0 is greedy), ``top_p``, ``top_k``, ``num_beams``, ``until``.
        max_new_tokens: Longest answer if they set none.

    Returns:
        The decoding, and the texts that end an answer.

    Raises:
        ConfigError: A setting is unknown.
    """
    known = {"max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "until"}
    if unknown := sorted(settings.keys() - known - IGNORED):
        raise ConfigError(
            f"The task sets {unknown[0]!r}, which visexpert does not support; use one of {', '.join(sorted(known))}."
        )
    chosen: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens") or max_new_tokens)}
    if (settings.get("num_beams") or 1) > 1:
        chosen |= {"strategy": "beam", "num_beams": int(settings["num_beams"])}
    elif (settings.get("temperature") or 0) > 0:
        chosen |= {"strategy": "sample", "temperature": float(settings["temperature"])}
        chosen |= {name: settings[name] for name in ("top_p", "top_k") if settings.get(name)}
    stops = settings.get("until") or ()
    return Decoding(**chosen), (stops,) if isinstance(stops, str) else tuple(stops)


def until(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first stop."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)].strip() if ends else text


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))
