"""A model tried in each role: built, filled, run twice and held against its own library. Nothing is raised."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.commands.trial.attempt import Asked, Attempt, Comparison, Role
from visexpert.commands.trial.encoders_library import compare_clip, compare_expert
from visexpert.commands.trial.language import Probe, Side, compare_language, of_transformers
from visexpert.commands.trial.naming import (
    clip_arguments,
    expert_candidates,
    language_source,
    model_type,
)
from visexpert.data.needs import find_tokenizer
from visexpert.errors import UserError, first_line, told_by_machine
from visexpert.experts import VisionExpert
from visexpert.experts.huggingface import quiet
from visexpert.experts.probe import probe_images
from visexpert.language import BertDecoder, PrefixLM
from visexpert.language.bert_decoder import FAMILIES
from visexpert.vision import ClipEncoder

Found = tuple[dict[str, str], Sequence[Comparison], str]
"""Facts, comparisons, and why there are none."""


def attempts(asked: Asked, roles: Sequence[Role]) -> Iterator[Attempt]:
    """Try a model in each role; a role may have several classes, or parts of one."""
    for role in roles:
        yield from {"expert": _as_expert, "clip": _as_clip, "language": _as_language}[role](asked)


def _as_expert(asked: Asked) -> Iterator[Attempt]:
    try:
        with hushed():
            candidates = expert_candidates(asked)
    except Exception as error:
        yield _failed("expert", "", error)
        return
    for kind, arguments in candidates:
        yield _tried("expert", kind, arguments, _try_expert)


def _as_clip(asked: Asked) -> Iterator[Attempt]:
    try:
        with hushed():
            arguments = clip_arguments(asked)
    except Exception as error:
        yield _failed("clip", "", error)
        return
    yield _tried("clip", ClipEncoder, arguments, _try_clip)


def _as_language(asked: Asked) -> Iterator[Attempt]:
    try:
        source = language_source(asked)
        kind: type[Side] = BertDecoder if model_type(source) in FAMILIES else PrefixLM
    except Exception as error:
        yield _failed("language", "", error)
        return
    arguments = {"source": source, **({} if asked.dtype == "float32" else {"dtype": asked.dtype})}
    yield _tried("language", kind, arguments, _try_language)


def _tried(role: Role, kind: type[nn.Module], arguments: dict[str, Any], attempt: Callable[[Any], Found]) -> Attempt:
    """Build, fill and run one class; whatever is raised becomes the result."""
    settings = {"class_path": f"{kind.__module__.rpartition('.')[0]}.{kind.__name__}", "init_args": arguments}
    try:
        with hushed():
            part: Any = kind(**arguments)
            part.load_weights()
            facts, comparisons, silence = attempt(part.eval())
    except Exception as error:
        return _failed(role, kind.__name__, error, settings)
    if silence:
        facts["not compared"] = silence
    wrong = [comparison for comparison in comparisons if not comparison.equal]
    random = facts.get("deterministic") == "no"
    reason = "; ".join(map(str, wrong)) or ("two runs on the same images differ" if random else "")
    return Attempt(role, kind.__name__, "differs" if reason else "works", reason, facts, tuple(comparisons), settings)


def _failed(role: Role, name: str, error: Exception, settings: dict[str, Any] | None = None) -> Attempt:
    """A refusal is one of our sentences; anything else is told with its type."""
    if os.environ.get("VISEXPERT_TRACEBACK"):
        raise error
    told = error if isinstance(error, UserError) else told_by_machine(error)
    if told is not None:
        return Attempt(role, name, "refused", str(told), settings=settings or {})
    message = f"{type(error).__name__}: {first_line(error)}"
    return Attempt(role, name, "error", message, settings=settings or {})


def _try_expert(expert: VisionExpert) -> Found:
    images_BCHW = probe_images(expert.image_size)
    with torch.no_grad():
        tokens_BSE, again_BSE = expert(images_BCHW).tokens_BSE, expert(images_BCHW).tokens_BSE
        pixels_BCHW = expert.preprocess(images_BCHW)
        found = compare_expert(expert, pixels_BCHW, tokens_BSE)
    facts = {
        **({"tokens": expert.tokens} if expert.tokens != "features" else {}),
        **_encoder_facts(expert, expert.grid_hw, expert.token_dim, torch.equal(tokens_BSE, again_BSE)),
        "license": expert.license,
    }
    return (facts, (), found) if isinstance(found, str) else (facts, (found,), "")


def _try_clip(encoder: ClipEncoder) -> Found:
    images_BCHW = probe_images(encoder.image_size)
    with torch.no_grad():
        tokens_BTD, again_BTD = encoder(images_BCHW).tokens_BTD, encoder(images_BCHW).tokens_BTD
        pixels_BCHW = (images_BCHW - encoder.mean) / encoder.std
        found = compare_clip(encoder, encoder._given["architecture"], pixels_BCHW, tokens_BTD)  # type: ignore[arg-type]
    facts = _encoder_facts(encoder, encoder.grid_hw, encoder.width, torch.equal(tokens_BTD, again_BTD))
    facts |= {"layer": str(encoder.layer), "activation": str(encoder.config.hidden_act), "license": encoder.license}
    return (facts, (), found) if isinstance(found, str) else (facts, (found,), "")


def _try_language(side: Side) -> Found:
    probe = Probe(side)
    text = side.settings.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    facts = {
        "family": str(side.settings.model_type),
        "width": str(side.width),
        "vocabulary": str(text.vocab_size),
        **({} if positions is None else {"positions": str(positions)}),
        "parameters": in_millions(side),
        "tokenizer": _tokenizer_of(side),
    }
    return facts, compare_language(side, probe, of_transformers(side)), ""


def _tokenizer_of(side: Side) -> str:
    """The file of the tokenizer that comes with a language model; what to do where none does."""
    found = find_tokenizer(str(side.source))
    return found.name if isinstance(found, Path) else "none comes with it; training needs one of the same vocabulary"


def _encoder_facts(part: Any, grid_hw: tuple[int, int], width: int, same: bool) -> dict[str, str]:
    described: Any = getattr(part, "described", None)
    family = {"family": str(described.config.model_type)} if hasattr(described, "config") else {}
    return {
        **family,
        "image size": f"{part.image_size} px",
        "grid": f"{grid_hw[0]} x {grid_hw[1]} = {grid_hw[0] * grid_hw[1]} tokens",
        "width": str(width),
        "mean": _numbers(part.mean),
        "std": _numbers(part.std),
        "parameters": in_millions(part),
        "deterministic": "yes" if same else "no",
    }


def in_millions(module: nn.Module) -> str:
    """Number of parameters."""
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.3g} M" if count >= 1e5 else str(count)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


@contextmanager
def hushed() -> Iterator[None]:
    """Without what libraries print and warn of: the result says what there is to say."""
    with quiet(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
