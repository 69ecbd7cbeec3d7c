"""Experts from open_clip: the image tower of any of its models, be it a plain ViT or a timm trunk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.maps import RANDOM, MapExpert
from visexpert.experts.preprocessing import Framing, Interpolation, Preprocessing
from visexpert.experts.timm import last_map
from visexpert.io.source import WEIGHT_FILES, ModelSource
from visexpert.io.weights import fill_module, read_source
from visexpert.vision.positions import fit_positions
from visexpert.vision.published import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES, described_by, shared_preparation

OWNER = "OpenClipExpert"
STUB_TEXT = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
"""A tiny text tower: open_clip cannot build an image tower without one, and it is thrown away."""


class OpenClipExpert(MapExpert):
    """Patch tokens of an open_clip image tower, as they enter its pooling.

    They have been through the final norm, unless that comes after the pooling (CLIPA, CoCa).

    If the weights come with an ``open_clip_config.json`` (in a folder or on the Hugging Face Hub, or beside a file with
    a name that open_clip publishes), it sets network, activation, normalization and interpolation, whatever ``model``
    is. Otherwise the tag sets them; a file without a tag gets what all published weights of ``model`` share, and is
    refused if their means differ.

    Args:
        model: Name in ``open_clip.list_models()``, such as ``convnext_xxlarge``.
        weights: A tag of that model (``open_clip.list_pretrained_tags_by_model``), a ``.safetensors``, ``.bin`` or
            ``.pt`` file, a folder or a Hugging Face id; ``random`` for random weights.
        image_size: Side of the input in pixels; null for the model's own. Position embeddings are interpolated.
        layer: Index of a block or stage, -1 for the last, before the final norm (or MobileCLIP's last convolution);
            later ones are not run. Null for the last features.
        framing: What to do with images that are not square: ``squash`` (as CLIP does here, so that patches show the
            same parts as CLIP's), ``crop`` or ``pad``; null or ``own`` for the model's own way (``resize_mode``).
        interpolation: ``bilinear`` or ``bicubic``; null for the model's own.
        license: License of the weights; null for the one in the model card.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str,
        image_size: int | None = None,
        layer: int | None = None,
        framing: Framing | None = None,
        interpolation: Interpolation | None = None,
        license: str | None = None,
    ) -> None:
        own_settings = own_of(weights, model)
        settings, tagged = own_settings or named(model, weights, framing=framing)
        vision = settings["vision_cfg"]
        preprocessing = Preprocessing(
            image_size=side_of(vision),
            framing=framing_of(tagged),
            mean=tagged["mean"],
            std=tagged["std"],
            interpolation=tagged["interpolation"],
        ).adapted(owner=OWNER, image_size=image_size, framing=framing, interpolation=interpolation)
        quick = tagged.get("quick_gelu", settings.get("quick_gelu", False))
        visual = build({**settings, "quick_gelu": quick}, preprocessing.image_size)
        self_source = None if weights == RANDOM else ModelSource.parse(tagged.get("hf_hub", weights))
        network = OpenClipMap(visual, layer=layer)
        facts = {"layer": layer, "model": model, "quick_gelu": quick}
        super().__init__(
            network=network,
            preprocessing=preprocessing,
            license=license or (self_source.license() if self_source else None),
            facts=facts if layer is not None or network.normed else {**facts, "normed": False},
        )
        self.source = self_source
        self.described = own_settings is not None or "hf_hub" in tagged or self_source is None or not self_source.repo
        self.settings = settings, tagged
        self.framing = framing

    @property
    def weights_from(self) -> str | None:
        """See :attr:`VisionExpert.weights_from`."""
        return None if self.source is None else self.source.text

    def load_weights(self) -> None:
        """Read the image tower of the weights; a random network keeps its own.

        Raises:
            WeightsError: They are missing, or do not fit; the message says how to fetch them.
        """
        if self.source is None:
            return
        found = read_source(self.source, owner=OWNER, names=(*OPEN_CLIP_FILES, *WEIGHT_FILES))
        if not self.described:
            self._check_own()
        tower = {k.removeprefix("visual."): v for k, v in found.tensors.items() if k.startswith("visual.")}
        if not tower:
            raise WeightsError(
                f"{OWNER}: {found.path} has no image tower of open_clip (names like 'visual. ...'); use another file."
            )
        visual = self.network.get_submodule("visual")
        fill_module(visual, self._fitted(tower, visual, found.path), owner=OWNER, path=found.path)

    def _fitted(self, tower: dict[str, Tensor], visual: nn.Module, path: Path) -> dict[str, Tensor]:
        """Return weights fitted to the image size as open_clip does it; timm's trunks fit their own once loaded."""
        settings, size = self.settings[0], self.preprocessing.image_size
        own = side_of(settings["vision_cfg"])
        if size == own or "timm_model_name" not in settings["vision_cfg"]:
            return fit_positions(tower, visual.state_dict(), antialias=True)
        filled: Any = build({**settings, "quick_gelu": False}, own)
        fill_module(filled, tower, owner=OWNER, path=path)
        filled.set_input_size(size)
        state: dict[str, Tensor] = filled.state_dict()
        return state

    def _check_own(self) -> None:
        """Check a repository's own configuration, perhaps here only now, against what the network was built from."""
        assert self.source is not None
        with suppress(WeightsError):  # not every repository has one
            self.source.fetch(OPEN_CLIP_CONFIG, owner=OWNER)
        own = own_of(self.source.text, None)
        if own is None:  # no more is known than about a lone file
            shared_preparation(str(self.facts["model"]), needed=needed_for(self.framing), owner=OWNER)
            return
        keys = ("interpolation", *needed_for(self.framing))
        same = all(_plain(own[1][key]) == _plain(self.settings[1][key]) for key in keys)
        vision, quick = own[0]["vision_cfg"], own[0].get("quick_gelu", False)
        if not same or vision != self.settings[0]["vision_cfg"] or quick != self.settings[0].get("quick_gelu", False):
            raise ConfigError(
                f"{OWNER}: '{self.source.text}' has settings of its own ({OPEN_CLIP_CONFIG}) that were not on this "
                "machine when the model was built; they are now, so start again."
            )


class OpenClipMap(nn.Module):
    """Map pixels (B, 3, H, W) to features (B, E, h, w) with an image tower.

    Args:
        visual: Image tower of open_clip.
        layer: See :class:`OpenClipExpert`.
    """

    def __init__(self, visual: Any, *, layer: int | None) -> None:
        super().__init__()
        self.visual = visual
        self.layer = layer
        # CoCa's norm comes after its pooling, unless it pools twice; CLIPA's flag counts without attention pooling.
        pools = [getattr(visual, name, None) is not None for name in ("attn_pool", "attn_pool_contrastive")]
        behind = not pools[1] if pools[0] else getattr(visual, "final_ln_after_pool", False)
        self.normed = layer is None and not behind

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the feature map of the last or the chosen layer."""
        trunk = getattr(self.visual, "trunk", None)
        if trunk is not None and self.layer is None:
            return last_map(trunk, pixels_BCHW)
        found = self.visual.forward_intermediates(
            pixels_BCHW,
            indices=1 if self.layer is None else [self.layer],
            stop_early=True,
            intermediates_only=True,
            normalize_intermediates=self.normed,
            output_fmt="NCHW",
        )
        (map_BEHW,) = found["image_intermediates"]
        return map_BEHW  # type: ignore[no-any-return]


def own_of(weights: str, model: str | None) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the settings in a folder's or repository's own configuration, as :func:`named` does.

    Args:
        weights: See :class:`OpenClipExpert`.
        model: Model of which ``weights`` may be a tag; None if it cannot be a tag.

    Returns:
        None if the file is not on this machine.

    Raises:
        WeightsError: The file cannot be read, or does not describe an image tower.
    """
    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg

    if weights == RANDOM or (model is not None and get_pretrained_cfg(model, weights)):
        return None
    written = described_by(ModelSource.parse(weights)).read_json(OPEN_CLIP_CONFIG, owner=OWNER)
    if written is None:
        return None
    settings = written.get("model_cfg")
    if not isinstance(settings, dict) or not isinstance(settings.get("vision_cfg"), dict):
        raise WeightsError(
            f"{OWNER}: {OPEN_CLIP_CONFIG} of '{weights}' has no model_cfg with a vision_cfg; fetch it again."
        )
    return settings, {**vars(PreprocessCfg()), **(written.get("preprocess_cfg") or {})}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def named(model: str, weights: str, *, framing: Framing | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return open_clip's settings of a model and of the weights of a tag, or its defaults if they are not a tag.

    Raises:
        ConfigError: There is no such model; or ``weights`` is a file, and the published weights of the model need
            different preprocessing.
    """
    from open_clip import get_model_config, list_models
    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg

    settings = get_model_config(model)
    if settings is None:
        near = get_close_matches(model, list_models(), n=3)
        raise ConfigError(f"{OWNER}: open_clip has no model {model!r}; the nearest are {near}.")
    tagged = get_pretrained_cfg(model, weights)
    if not tagged:
        _no_tag(model, weights)
        # A repository has its own settings, which are checked once it is here: see _check_own.
        lone = weights != RANDOM and ModelSource.parse(weights).repo is None
        tagged = shared_preparation(model, needed=needed_for(framing) if lone else (), owner=OWNER)
    return dict(settings), {**vars(PreprocessCfg()), **tagged}


def _no_tag(model: str, weights: str) -> None:
    """Check that a plain word is a tag or a path: otherwise it would be looked up on the Hugging Face Hub.

    Raises:
        ConfigError: It is neither.
    """
    from open_clip import list_pretrained_tags_by_model

    if weights != RANDOM and "/" not in weights and ModelSource.parse(weights).repo == weights:
        tags = list_pretrained_tags_by_model(model)
        raise ConfigError(f"{OWNER}: open_clip has no weights {weights!r} of {model}; its tags are {tags}.")


def needed_for(framing: Framing | None) -> tuple[str, ...]:
    """Return the settings of open_clip's own preprocessing that the user's options do not replace."""
    return ("mean", "std", "resize_mode") if framing in (None, "own") else ("mean", "std")


def side_of(vision: Mapping[str, Any]) -> int:
    """Return the side of the images that a tower reads, in pixels.

    Raises:
        ConfigError: They are not square.
    """
    own = vision.get("image_size", 224)
    height, width = own if isinstance(own, list | tuple) else (own, own)
    if height != width:
        raise ConfigError(
            f"{OWNER}: this model reads images of {height} x {width} px, but experts read squares; use another model."
        )
    return int(height)


def framing_of(tagged: Mapping[str, Any]) -> Framing:
    """Return the framing of open_clip's own transform.

    Raises:
        ConfigError: open_clip has no such ``resize_mode``.
    """
    modes: dict[str, Framing] = {"shortest": "crop", "squash": "squash", "longest": "own"}
    mode = tagged["resize_mode"]
    if mode not in modes:
        raise ConfigError(f"{OWNER}: resize_mode={mode!r} ({OPEN_CLIP_CONFIG}) is unknown; use one of {sorted(modes)}.")
    return modes[mode]


def build(settings: Mapping[str, Any], image_size: int) -> nn.Module:
    """Build an image tower for images of this size, with random weights and without a download.

    Raises:
        ConfigError: open_clip cannot build it at this size.
    """
    from open_clip import CLIP

    vision = {**settings["vision_cfg"], "timm_model_pretrained": False}
    if "timm_model_name" not in vision:
        vision = {**settings["vision_cfg"], "image_size": image_size}
    try:
        visual: Any = CLIP(settings["embed_dim"], vision, STUB_TEXT, quick_gelu=settings["quick_gelu"]).visual
        if "timm_model_name" in vision and image_size != side_of(vision):
            visual.set_input_size(image_size)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{OWNER}: open_clip cannot build this model at {image_size} px ({error}).") from error
    tower: nn.Module = visual.eval()
    return tower
