"""The vision part of a multimodal model: its configuration, its network, and its prefix among the weights."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from visexpert.errors import ConfigError, WeightsError, first_line

PARTS = ("vision_config", "image_config", "encoder")
"""Names under which whole models keep the configuration of their vision part, most specific first."""

_EXPERTS = {
    "DepthExpert": ("MODEL_FOR_DEPTH_ESTIMATION_MAPPING",),
    "SegmentationExpert": ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING"),
}
"""Experts for models that transformers has only with a head."""

Whole = TypeVar("Whole", PreTrainedConfig, Mapping[str, Any])


def vision_part(whole: Whole) -> Whole:
    """Return the vision part of a configuration, or of its fields; all of it if it has no such part.

    The part nearest to the top is taken, at whatever depth it is (inside ``vlm_config``, for instance).
    """
    kind = PreTrainedConfig if isinstance(whole, PreTrainedConfig) else Mapping
    for name in PARTS:
        level: list[Any] = [whole]
        while level:
            inside = [each if isinstance(each, Mapping) else vars(each) for each in level]
            for fields in inside:
                if isinstance(fields.get(name), kind):
                    found: Whole = fields[name]
                    return found
            level = [value for fields in inside for value in fields.values() if isinstance(value, kind)]
    return whole


@contextmanager
def checked_fields(owner: str) -> Iterator[None]:
    """Tell in one sentence what a configuration of transformers says of a field that it cannot take.

    Raises:
        ConfigError: A field has a value of the wrong type, or several contradict one another.
    """
    try:
        yield
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"{owner}: transformers takes no such configuration ({first_line(error)}); correct that field of "
            "config.json, or fetch it again."
        ) from error


def build_network(config: PreTrainedConfig, *, auto: str, owner: str) -> nn.Module:
    """Build the network of a configuration, with random weights.

    Args:
        config: Configuration of a whole model, or of its vision part.
        auto: Name of the ``AutoModel...`` class that builds it.
        owner: Name of the caller, for messages.

    Raises:
        ConfigError: transformers has no such network.
    """
    factory = factory_of(config, auto=auto, owner=owner)
    options = {"trust_remote_code": False} if factory.__name__ == auto else {}
    build = factory.from_config if factory.__name__ == auto else factory
    model: nn.Module = build(config, **options)
    return model


def factory_of(config: PreTrainedConfig, *, auto: str, owner: str) -> Any:
    """Return the class that builds and loads such a network: ``AutoModel...``, or the class of a vision part.

    Many vision parts (BLIP, OWL-ViT, ...) have a class that ``AutoModel`` does not know.

    Raises:
        ConfigError: transformers has no such network.
    """
    if auto != "AutoModel" or type(config) in MODEL_MAPPING:
        return getattr(transformers, auto)
    try:
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        raise _without_network(config, owner) from None
    for name, each in vars(module).items():
        own = isinstance(each, type) and issubclass(each, PreTrainedModel) and each.__module__ == module.__name__
        if own and each.config_class is type(config) and "For" not in name and not name.endswith(_NO_NETWORKS):
            return each
    raise _without_network(config, owner)


_NO_NETWORKS = ("PreTrainedModel", "WithProjection")


def _without_network(config: PreTrainedConfig, owner: str) -> ConfigError:
    other = next(
        (
            f"use visexpert.experts.{name}"
            for name, maps in _EXPERTS.items()
            if name != owner and any(type(config) in getattr(transformers, each) for each in maps)
        ),
        "use another model, or write an expert (docs/own-expert.md)",
    )
    return ConfigError(
        f"{owner}: transformers has no plain image encoder for model_type {config.model_type!r}; {other}."
    )


def key_mapping(
    keys: Collection[str], network: Any, *, whole: str, optional: tuple[str, ...], whose: str
) -> dict[str, str] | None:
    """Return how transformers' loader must rename weights if they are those of a larger model.

    The prefix of the part is removed. The loader itself applies only the part's renamings for older files; those of
    the whole model (AltCLIP's) are added if more names fit with them.

    Args:
        keys: Names of the weights in the file.
        network: Network to load.
        whole: ``model_type`` of the whole model.
        optional: Prefixes of names that may be absent.
        whose: Owner and file, for the message.

    Returns:
        Regular expressions and their replacements, in order of application; None if no name changes.

    Raises:
        WeightsError: The file has several such networks.
    """
    needed = {key for key in network.state_dict() if not key.startswith(optional)}
    before, most = _prefix(keys, needed, whose)
    renamings = {} if most == len(needed) or whole == network.config.model_type else _renamings(whole)
    if renamings:
        renamed = set(keys)
        for pattern, target in renamings.items():
            renamed = {re.sub(pattern, target, key) for key in renamed}
        other, count = _prefix(renamed, needed, whose)
        before, renamings = (other, renamings) if count > most else (before, {})
    return renamings | ({f"^{re.escape(before)}": ""} if before else {}) or None


def _renamings(model_type: str) -> dict[str, str]:
    """Return the one-to-one renamings of a model's weights, from names in files to names in the network."""
    listed = get_checkpoint_conversion_mapping(model_type) or []
    return {
        each.source_patterns[0]: each.target_patterns[0]
        for each in listed
        if type(each) is WeightRenaming and len(each.source_patterns) == len(each.target_patterns) == 1
    }


def _prefix(keys: Collection[str], needed: Collection[str], whose: str) -> tuple[str, int]:
    """Return the prefix of a network's names in a file, such as ``model.vision_tower.``, and how many names fit.

    The prefix with which most names fit is taken; it is empty if the names have none, or do not occur.
    """
    fitting: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in needed:
                fitting["".join(f"{part}." for part in parts[:start])] += 1
    most = max(fitting.values(), default=0)
    found = sorted(before for before, count in fitting.items() if count == most)
    if len(found) > 1 and most == len(needed) and "" not in found:
        raise WeightsError(f"{whose} has several such encoders, under {found}; use a file with one.")
    return (found[0] if len(found) == 1 else ""), most
