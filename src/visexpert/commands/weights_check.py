"""List the pretrained weights that a configuration needs: where they are, or how to fetch them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from visexpert.checking import built
from visexpert.errors import UserError, WeightsError
from visexpert.experts.edges import DEXINED_FILE
from visexpert.io.source import WEIGHT_FILES, ModelSource
from visexpert.networks.open_clip import OPEN_CLIP_FILES
from visexpert.planning.meta import weightless
from visexpert.trust import UntrustedError, guarded, refuse_strangers


def weight_findings(model: Mapping[str, Any], *, foreign: Path | None = None) -> Iterator[tuple[bool, str]]:
    """Check for each part of a configuration's model whether its weights are on this machine, and how large they are.

    Args:
        model: ``model`` of a configuration.
        foreign: File of the configuration if it comes from someone else; None for a trusted one.

    Yields:
        Whether the weights are there, and a line that describes them.

    Raises:
        UntrustedError: A foreign configuration names classes that are not trusted.
    """
    if foreign is not None:
        refuse_strangers(model, foreign)
    seen: set[str] = set()
    for name, settings in parts_of(model):
        try:
            with weightless():
                part = _built(settings, foreign)
        except UntrustedError:
            raise
        except UserError as error:  # e.g. a language model whose config.json is not here
            size = " Without its config.json its size is unknown." if isinstance(error, WeightsError) else ""
            yield False, f"{name}: {error}{size}"
            continue
        source = getattr(part, "weights_from", None)
        if source is not None and source not in seen:
            seen.add(source)
            yield _finding(name, part, source)


def parts_of(model: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the encoders and the language model that a method uses, by name, with their settings."""
    arguments = model.get("init_args") or {}
    for name, value in arguments.items():
        if isinstance(value, Mapping) and "class_path" in value:
            yield name, value
        elif name == "experts" and isinstance(value, Mapping):
            used = arguments.get("use") or value
            yield from ((expert, settings) for expert, settings in value.items() if expert in used)


def _built(settings: Mapping[str, Any], foreign: Path | None) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "part")

    def build() -> Any:
        with guarded(foreign):
            parsed = parser.parse_object({"part": settings})
        if foreign is not None:
            refuse_strangers(parsed, foreign)
        return parser.instantiate_classes(parsed)

    return built(build, who="data check").part


def _finding(name: str, part: nn.Module, text: str) -> tuple[bool, str]:
    source = ModelSource.parse(text)
    found = source.file or source.find(*WEIGHT_FILES, *OPEN_CLIP_FILES, DEXINED_FILE)
    if found is not None and found.is_file():
        return True, f"{name}: {found}"
    place = f"{source.repo} on the Hugging Face Hub" if source.repo else source.path
    fetch = f"fetch them where there is a network with {source.fetched_by}" if source.repo else "copy them there"
    return False, f"{name}: the weights of {place} ({_size(part)}) are not here; {fetch}."


def _size(part: nn.Module) -> str:
    parameters = list(part.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return f"about {size / 1e9:.2g} GB as {str(parameters[0].dtype).removeprefix('torch.')}"
