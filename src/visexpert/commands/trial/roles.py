"""Try a model in each role: build it, load its weights, run it twice and compare it with its own library.

Errors are results here; nothing is raised, but for VISEXPERT_TRACEBACK.
"""

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

from visexpert.commands.trial.attempt import Attempt, Comparison, Request, Role
from visexpert.commands.trial.encoders import compare_encoder, compare_expert
from visexpert.commands.trial.language import LanguageModel, Probe, compare_language, of_transformers
from visexpert.commands.trial.naming import (
    encoder_arguments,
    expert_candidates,
    language_source,
    model_type,
)
from visexpert.data.needs import find_tokenizer
from visexpert.errors import UserError, first_line, told_by_machine
from visexpert.experts import VisionExpert
from visexpert.experts.probe import probe_images
from visexpert.language import BertDecoder, PrefixLM
from visexpert.language.bert_decoder import FAMILIES
from visexpert.networks.huggingface import quiet
from visexpert.vision import VisionEncoder

Found = tuple[dict[str, str], Sequence[Comparison], str]
"""Facts, comparisons, and why there are no comparisons."""


def attempts(request: Request, roles: Sequence[Role]) -> Iterator[Attempt]:
    """Try a model in each role, with each class that may fit."""
    for role in roles:
        yield from {"expert": _as_expert, "encoder": _as_encoder, "language": _as_language}[role](request)


def _as_expert(request: Request) -> Iterator[Attempt]:
    try:
        with silenced():
            candidates = expert_candidates(request)
    except Exception as error:
        yield _failed("expert", "", error)
        return
    for kind, arguments in candidates:
        yield _tried("expert", kind, arguments, _try_expert)


def _as_encoder(request: Request) -> Iterator[Attempt]:
    try:
        with silenced():
            kind, arguments = encoder_arguments(request)
    except Exception as error:
        yield _failed("encoder", "", error)
        return
    yield _tried("encoder", kind, arguments, _try_encoder)


def _as_language(request: Request) -> Iterator[Attempt]:
    try:
        source = language_source(request)
        kind: type[LanguageModel] = BertDecoder if model_type(source) in FAMILIES else PrefixLM
    except Exception as error:
        yield _failed("language", "", error)
        return
    arguments = {"source": source, **({} if request.dtype == "float32" else {"dtype": request.dtype})}
    yield _tried("language", kind, arguments, _try_language)


def _tried(role: Role, kind: type[nn.Module], arguments: dict[str, Any], attempt: Callable[[Any], Found]) -> Attempt:
    """Build one class, load its weights and run it; an exception becomes the result."""
    settings = {"class_path": f"{kind.__module__.rpartition('.')[0]}.{kind.__name__}", "init_args": arguments}
    try:
        with silenced():
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
    """Return a refusal for one of our own errors, and an error, with its type, for any other."""
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


def _try_encoder(encoder: VisionEncoder) -> Found:
    images_BCHW = probe_images(encoder.image_size)
    with torch.no_grad():
        tokens_BTD, again_BTD = encoder(images_BCHW).tokens_BTD, encoder(images_BCHW).tokens_BTD
        found = compare_encoder(encoder, encoder.preprocess(images_BCHW), tokens_BTD)
    facts = _encoder_facts(encoder, encoder.grid_hw, encoder.width, torch.equal(tokens_BTD, again_BTD))
    facts |= {"layer": str(encoder.layer), "saliency": encoder.saliency}
    if encoder.activation is not None:
        facts["activation"] = encoder.activation
    facts["license"] = encoder.license
    return (facts, (), found) if isinstance(found, str) else (facts, (found,), "")


def _try_language(model: LanguageModel) -> Found:
    probe = Probe(model)
    text = model.settings.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    facts = {
        "family": str(model.settings.model_type),
        "width": str(model.width),
        "vocabulary": str(text.vocab_size),
        **({} if positions is None else {"positions": str(positions)}),
        "parameters": in_millions(model),
        "tokenizer": _tokenizer_of(model),
    }
    return facts, compare_language(model, probe, of_transformers(model)), ""


def _tokenizer_of(model: LanguageModel) -> str:
    """Return the name of a language model's tokenizer file, or what to do without one."""
    found = find_tokenizer(str(model.source))
    return found.name if isinstance(found, Path) else "none included; training needs one with the same vocabulary"


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
    """Return the number of a module's parameters as text, such as ``304 M``."""
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.3g} M" if count >= 1e5 else str(count)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


@contextmanager
def silenced() -> Iterator[None]:
    """Silence what libraries print and warn about; the result reports what matters."""
    with quiet(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
