"""Models from timm: settings, preprocessing, building and loading."""

from __future__ import annotations

import copy
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import timm
from timm.models import PretrainedCfg, filter_pretrained_cfg, get_pretrained_cfg, is_model
from torch import Tensor, nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.io.source import ModelSource
from visexpert.io.weights import LoadedState, state_keys
from visexpert.networks.looks import look_at_keys, told
from visexpert.networks.preprocessing import Framing, Interpolation, Preprocessing

VIT_MODULES = ("vision_transformer", "deit", "eva", "beit")
"""timm's modules of plain vision transformers: patches, then blocks of one width."""


def is_timm(name: str) -> bool:
    """Return whether timm has a model of this name, with or without a tag."""
    return "/" not in name and is_model(name.partition(".")[0])


def is_vit(name: str) -> bool:
    """Return whether a model of timm, with or without a tag, is a plain vision transformer."""
    plain = name.partition(".")[0]
    return any(plain in timm.list_models(module=module) for module in VIT_MODULES)


def published_settings(model: str, *, owner: str) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` of a model.

    Raises:
        ConfigError: There is no such model or tag.
    """
    name = model.partition(".")[0]
    try:
        found = get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError as error:  # what timm raises for an unknown name or tag
        near = timm.list_pretrained(f"{name}.*") if is_model(name) else get_close_matches(name, timm.list_models(), n=3)
        step = f"did you mean one of {near}?" if near else "timm.list_models() lists its models."
        raise ConfigError(f"{owner}: timm has no settings of '{model}'; {step}") from error
    assert found is not None  # timm raises instead of returning None
    return dict(vars(found))


def own_preprocessing(settings: dict[str, Any], interpolation: Interpolation | None, *, owner: str) -> Preprocessing:
    """Return the preprocessing of timm's own transform for a model.

    Raises:
        ConfigError: Its interpolation is not available here, or its images are not square.
    """
    from timm.data import DEFAULT_CROP_PCT

    _, height, width = settings["input_size"]
    if height != width:
        raise ConfigError(
            f"{owner}: {settings['architecture']} reads images of {height} x {width} px, but only squares "
            "are read; use another model."
        )
    own = settings["interpolation"]
    if own not in ("bilinear", "bicubic") and interpolation is None:
        raise ConfigError(
            f"{owner}: this model resizes with {own} interpolation, which is not available here; set interpolation to "
            "bicubic or bilinear."
        )
    share = settings["crop_pct"] or DEFAULT_CROP_PCT
    mode = settings["crop_mode"] or "center"
    framing: Framing = "crop" if mode == "center" else "squash" if (mode, share) == ("squash", 1.0) else "own"
    return Preprocessing(
        image_size=height,
        mean=settings["mean"],
        std=settings["std"],
        interpolation=own if own in ("bilinear", "bicubic") else "bicubic",
        framing=framing,
        crop_share=share,
    )


_FIELDS = frozenset(field.name for field in fields(PretrainedCfg))


@dataclass(frozen=True)
class DescribedTimm:
    """Description of a timm model, made without its weights and without a download.

    Args:
        owner: Name of the caller, for messages.
        source: Files of the model; None for a random network.
        architecture: Name of the model, without a tag where its folder says the rest.
        settings: timm's ``pretrained_cfg``.
        arguments: Arguments of the model, those of its folder first.
        num_classes: Outputs of its head; 0 for none.
        drops_head: Whether the network is without the head that its weights may have.
    """

    owner: str
    source: ModelSource | None
    architecture: str
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any]
    num_classes: int
    drops_head: bool = False

    @classmethod
    def describe(
        cls, source: str | None, *, model: str | None, arguments: Mapping[str, Any] | None, owner: str
    ) -> DescribedTimm:
        """Read the folder's ``config.json`` if it is on this machine; otherwise take the named model.

        Raises:
            ConfigError: Neither a source with a configuration nor a model is given, or the two contradict each other.
            WeightsError: ``config.json`` is missing or not timm's, and no model is given.
        """
        files = None if source is None else ModelSource.parse(source)
        own = None if files is None or files.file is not None else files.read_json("config.json", owner=owner)
        if own is None:
            if model is None:
                if files is None:
                    raise ConfigError(f"{owner} needs source (a folder or Hugging Face id), or model (a name of timm).")
                if files.file is not None:
                    raise ConfigError(f"{owner}: {files.file} holds only weights; name their model of timm with model.")
                raise files.absent("config.json", owner=owner)
            return cls.named(model, files=files, arguments=arguments, owner=owner)
        if "architecture" not in own:
            kind = own.get("model_type")
            other = f" but transformers' (model_type {kind!r}); use TransformersEncoder" if kind else ""
            raise WeightsError(f"{owner}: the config.json of '{source}' is not timm's{other}.")
        if model is not None and model.partition(".")[0] != own["architecture"]:
            raise ConfigError(
                f"{owner}: model={model!r} was given, but '{source}' holds a {own['architecture']}; correct it, or "
                "remove it."
            )
        settings, architecture, given = parsed_config(own, owner=owner)
        published = dict(vars(PretrainedCfg(**filtered(settings))))
        classes = int(given.pop("num_classes", published["num_classes"]) or 0)
        return cls(
            owner=owner,
            source=files,
            architecture=str(architecture),
            settings={**published, "architecture": str(architecture)},
            arguments={**given, **(arguments or {})},
            num_classes=classes,
        )

    @classmethod
    def named(
        cls, model: str, *, files: ModelSource | None, arguments: Mapping[str, Any] | None, owner: str
    ) -> DescribedTimm:
        """Take timm's settings of a named model, with its own head unless the file of weights lacks it.

        Raises:
            ConfigError: timm has no such model or tag.
        """
        settings = published_settings(model, owner=owner)
        keys = () if files is None or files.file is None else state_keys(files.file) or ()
        headed = files is not None and (files.file is None or _has_head(keys, settings))
        classes = int(settings["num_classes"]) if headed else 0
        return cls(owner, files, model, settings, dict(arguments or {}), classes)

    def without_head(self) -> DescribedTimm:
        """Return the description of the same model without a head; the head of its weights is dropped."""
        return replace(self, num_classes=0, drops_head=True)

    def license(self) -> str | None:
        """License of the weights, as timm or the model card states it."""
        stated: str | None = self.settings.get("license")
        return stated or (None if self.source is None else self.source.license())

    def preprocessing(self, interpolation: Interpolation | None) -> Preprocessing:
        """Return the preprocessing of timm's own transform; see :func:`own_preprocessing`."""
        return own_preprocessing(dict(self.settings), interpolation, owner=self.owner)

    def sized(self, image_size: int) -> dict[str, Any]:
        """Return the arguments for images of this size, which networks without positions need not be told."""
        differs = image_size != self.settings["input_size"][-1]
        told = differs and (self.settings["fixed_input_size"] or is_vit(self.architecture))
        return {**self.arguments, **({"img_size": image_size} if told or "img_size" in self.arguments else {})}

    def build(self, image_size: int) -> nn.Module:
        """Build the network for images of this size, with random weights.

        Raises:
            ConfigError: timm has no such model, or it rejects an argument.
        """
        arguments = self.sized(image_size)
        try:
            network: nn.Module = timm.create_model(
                self.architecture, pretrained=False, num_classes=self.num_classes, **arguments
            )
        except RuntimeError as error:  # what timm raises for an unknown name
            near = get_close_matches(self.architecture, timm.list_models(), n=3)
            raise ConfigError(
                f"{self.owner}: timm has no model {self.architecture!r}; the nearest are {near}."
            ) from error
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"{self.owner}: {self.architecture} does not take {arguments} ({error}).") from error
        return network.eval()  # in train mode BatchNorm refuses a single image

    def published(self) -> dict[str, Any]:
        """Return the ``pretrained_cfg`` without what says where the weights came from."""
        known = {name: value for name, value in self.settings.items() if name in _FIELDS and name != "state_dict"}
        return dict(filter_pretrained_cfg(known, remove_source=True))  # type: ignore[no-untyped-call]

    def adapted(self, found: LoadedState, *, image_size: int) -> dict[str, Tensor]:
        """Return weights as timm's own loader fits them to the network of :meth:`build`, strictly.

        Raises:
            WeightsError: They do not fit.
        """
        classes = self.num_classes
        if self.drops_head and _has_head(found.tensors, self.settings):
            classes = int(self.settings["num_classes"])
        settings = {**filtered(self.settings), "state_dict": dict(found.tensors), "custom_load": False}
        settings["num_classes"] = classes
        try:
            filled: Any = timm.create_model(
                self.architecture,
                pretrained=True,
                pretrained_cfg=settings,
                num_classes=classes,
                **self.sized(image_size),
            )
        except (RuntimeError, KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
            # what torch and timm's adapters of weights raise for those of another model
            if foreign(found.tensors):
                raise WeightsError(
                    f"{self.owner}: {told(found.tensors, found.path)}, and do not fit {self.architecture}; use weights "
                    "of this model."
                ) from error
            reason, own = " ".join(str(error).split())[:300], self.settings["input_size"][-1]
            at, step = ("", "") if image_size == own else (f" at {image_size} px", f", or its own image_size {own}")
            raise WeightsError(
                f"{self.owner}: the weights in {found.path} do not fit {self.architecture}{at} ({reason}); use weights "
                f"of this model{step}."
            ) from error
        if classes != self.num_classes:
            filled.reset_classifier(0)
        return dict(filled.state_dict())


def filtered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``pretrained_cfg`` that timm's class of it takes."""
    return {name: value for name, value in settings.items() if name in _FIELDS}


def parsed_config(config: Mapping[str, Any], *, owner: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return ``pretrained_cfg``, name and arguments of a model from its ``config.json``, in older forms too.

    This is timm's own reading, whose public functions take an id of the Hugging Face Hub only, or build the model.

    Raises:
        ConfigError: This version of timm reads the file in another way.
    """
    try:
        from timm.models._hub import _parse_model_cfg

        settings, name, arguments = _parse_model_cfg(copy.deepcopy(dict(config)), {})
    except (ImportError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{owner}: the config.json cannot be read with timm {timm.__version__} ({error}); use another timm from "
            "1.0.22 on, or name the model with model and give the file of its weights as source."
        ) from error
    return settings, str(name), arguments


def foreign(keys: Collection[str]) -> bool:
    """Return whether weights are recognized as those of another library."""
    look = look_at_keys(keys)
    return look is not None and "timm" not in look.what


def _has_head(keys: Container[str], settings: Mapping[str, Any]) -> bool:
    """Return whether weights with these keys have the head of a model's settings."""
    heads = settings["classifier"]
    names = (heads,) if isinstance(heads, str) else tuple(heads or ())
    return any(f"{name}.{kind}" in keys for name in names for kind in ("weight", "bias"))
