"""Experts from timm: EVA-02, DINOv2 and v3, ConvNeXt and whatever else gives feature maps there."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.maps import RANDOM, MapExpert, map_of
from visexpert.experts.preprocessing import Framing, Interpolation, Preprocessing
from visexpert.io.source import ModelSource
from visexpert.io.weights import LoadedState, fill_module, read_source

OWNER = "TimmExpert"


class TimmExpert(MapExpert):
    """Any timm model with feature maps; tokens of [CLS] and registers are left out.

    Input size, normalization, interpolation, crop and license are those of timm's ``pretrained_cfg``. Position
    embeddings and, with another patch size, the patch convolution are interpolated by timm itself.

    Args:
        model: Name with its tag, such as ``eva02_large_patch14_448.mim_m38m_ft_in22k_in1k``
            (``timm.list_pretrained()``).
        weights: A ``.safetensors``, ``.bin`` or ``.pt`` file, a folder or a hub id; null for the tag's own on the hub;
            ``random`` for none.
        image_size: Side of the input in pixels; null for the model's own.
        layer: Null for the last features as timm gives them, final norm included; else a block or stage by index, -1
            for the last, without a final norm. Later ones are not run.
        framing: What becomes of an image that is no square: ``squash`` (as CLIP here), ``crop``, ``pad``, or ``own``
            for the model's own.
        interpolation: ``bilinear`` or ``bicubic``; null for the model's own.
        license: License of the weights; null for what timm says.
        arguments: Further arguments of the timm model, such as ``{patch_size: 16}``.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str | None = None,
        image_size: int | None = None,
        layer: int | None = None,
        framing: Framing = "squash",
        interpolation: Interpolation | None = None,
        license: str | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        settings = published_settings(model)
        own = own_preprocessing(settings, interpolation)
        preprocessing = own.adapted(owner=OWNER, image_size=image_size, framing=framing, interpolation=interpolation)
        self_arguments = dict(arguments or {})
        if settings["fixed_input_size"] and preprocessing.image_size != own.image_size:
            self_arguments.setdefault("img_size", preprocessing.image_size)
        super().__init__(
            network=TimmMap(build(model, self_arguments), layer=layer),
            preprocessing=preprocessing,
            license=license or settings["license"],
            facts={"layer": layer, "model": model, "arguments": sorted(self_arguments.items())},
        )
        self.model_name = model
        self.arguments = self_arguments
        self.weights = weights or settings["hf_hub_id"]

    @property
    def weights_from(self) -> str | None:
        """See :attr:`VisionExpert.weights_from`."""
        return None if self.weights == RANDOM else self.weights

    def load_weights(self) -> None:
        """Read the weights, adapted to size and patch by timm's own code; a random network keeps its own.

        Raises:
            WeightsError: They are nowhere, or do not fit; the message says what fetches them.
        """
        if self.weights == RANDOM:
            return
        if not self.weights:
            raise WeightsError(f"{OWNER}: timm publishes no weights of '{self.model_name}'; give a file as weights.")
        found = read_source(ModelSource.parse(self.weights), owner=OWNER)
        adapted = self._adapted(found)
        fill_module(self.network.get_submodule("model"), adapted.state_dict(), owner=OWNER, path=found.path)

    def _adapted(self, found: LoadedState) -> nn.Module:
        """A second network with the weights in it, without its head; timm's own loader fits them, strictly."""
        import timm

        settings = published_settings(self.model_name)
        heads = settings["classifier"]
        names = (heads,) if isinstance(heads, str) else tuple(heads or ())
        classes = settings["num_classes"] if any(f"{name}.weight" in found.tensors for name in names) else 0
        overlay = {"state_dict": dict(found.tensors), "num_classes": classes, "custom_load": False}
        try:
            model: Any = timm.create_model(
                self.model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **self.arguments
            )
        except (RuntimeError, KeyError) as error:
            reason, size, own = (
                " ".join(str(error).split())[:300],
                self.preprocessing.image_size,
                settings["input_size"][-1],
            )
            at, step = ("", "") if size == own else (f" at {size} px", f", or the image_size {own} that it is made for")
            raise WeightsError(
                f"{OWNER}: the weights in {found.path} do not fit {self.model_name}{at} ({reason}); use its own{step}."
            ) from error
        model.reset_classifier(0)
        adapted: nn.Module = model
        return adapted


class TimmMap(nn.Module):
    """A timm model as (B, 3, H, W) -> (B, E, h, w).

    Args:
        model: Built without a head.
        layer: See :class:`TimmExpert`.

    Raises:
        ConfigError: The model has no intermediate features though one is asked for.
    """

    def __init__(self, model: Any, *, layer: int | None) -> None:
        super().__init__()
        if layer is not None and not hasattr(model, "forward_intermediates"):
            raise ConfigError(
                f"{OWNER}: timm gives no intermediate features of {type(model).__name__}; leave layer out."
            )
        self.model = model
        self.layer = layer

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Feature map of the last or the chosen layer."""
        if self.layer is not None:
            (map_BEHW,) = self.model.forward_intermediates(
                pixels_BCHW,
                indices=[self.layer],
                norm=False,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
            return map_BEHW  # type: ignore[no-any-return]
        return last_map(self.model, pixels_BCHW)


def last_map(model: Any, pixels_BCHW: Tensor) -> Tensor:
    """Last features of a timm model, which it would pool next, as (B, E, h, w).

    Raises:
        ValueError: They are several maps, or a class token alone.
    """
    features = model.forward_features(pixels_BCHW)
    if not isinstance(features, Tensor):
        other = "give layer: -1" if hasattr(model, "forward_intermediates") else "none of them is the last"
        raise ValueError(f"{type(model).__name__} hands on several maps at once; {other}")
    classes = getattr(model, "cls_token", None)
    if features.ndim == 3 and isinstance(classes, Tensor) and features.shape[1] == classes.shape[1]:
        raise ValueError(f"{type(model).__name__} ends in its class token alone; give layer: -1")
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return map_of(features, channels_last=channels_last, prefix=getattr(model, "num_prefix_tokens", None))


def published_settings(model: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of a model.

    Raises:
        ConfigError: There is no such model or tag.
    """
    import timm
    from timm.models import get_pretrained_cfg, is_model

    name = model.partition(".")[0]
    try:
        found = get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError as error:  # what timm raises for an unknown name or tag
        near = timm.list_pretrained(f"{name}.*") if is_model(name) else get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(f"{OWNER}: timm has no settings of '{model}'; did you mean one of {near}?") from error
    assert found is not None  # it raises instead
    return dict(vars(found))


def own_preprocessing(settings: dict[str, Any], interpolation: Interpolation | None) -> Preprocessing:
    """How timm's own transform prepares images for a model.

    Raises:
        ConfigError: It interpolates in another way than can be done here, or its images are no squares.
    """
    from timm.data import DEFAULT_CROP_PCT

    _, height, width = settings["input_size"]
    if height != width:
        raise ConfigError(f"{OWNER}: {settings['architecture']} reads {height}x{width} px; experts read squares.")
    own = settings["interpolation"]
    if own not in ("bilinear", "bicubic") and interpolation is None:
        raise ConfigError(f"{OWNER}: this model resizes by {own}; give interpolation: bicubic (or bilinear) instead.")
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


def build(model: str, arguments: dict[str, Any]) -> nn.Module:
    """A timm model without its head, with random weights.

    Raises:
        ConfigError: An argument is unknown to the model, or impossible.
    """
    import timm

    try:
        network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{OWNER}: {model} does not take {arguments} ({error}).") from error
    return network.eval()  # in train mode BatchNorm refuses the one image of the probe
