"""Image towers of open_clip: settings, preprocessing, building and loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.io.source import WEIGHT_FILES, ModelSource
from visexpert.io.weights import fill_module, read_source
from visexpert.networks import RANDOM
from visexpert.networks.looks import told
from visexpert.networks.positions import fit_positions
from visexpert.networks.preprocessing import Framing, Preprocessing

OPEN_CLIP_PREFIX = "open_clip:"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"
STUB_TEXT = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
"""A tiny text tower: open_clip cannot build an image tower without one, and it is thrown away."""


@dataclass(frozen=True)
class DescribedOpenClip:
    """Description of an open_clip model's image tower, made without its weights and without a download.

    Args:
        owner: Name of the caller, for messages.
        model: Name of the model in open_clip's list; None if its files describe it.
        source: Files of the model; None for a random network.
        settings: open_clip's ``model_cfg``.
        tagged: Preprocessing and facts of the weights, as open_clip's list or the files state them.
        own: Whether these are known to be the weights' own; if not, they are compared once the files are here.
        framing: The user's choice; None for the model's own.
    """

    owner: str
    model: str | None
    source: ModelSource | None
    settings: Mapping[str, Any]
    tagged: Mapping[str, Any]
    own: bool
    framing: Framing | None

    @classmethod
    def describe(cls, weights: str, *, model: str | None, framing: Framing | None, owner: str) -> DescribedOpenClip:
        """Read the files' ``open_clip_config.json`` if it is on this machine; otherwise take the named model.

        Args:
            weights: A tag of ``model``, a file, a folder or a Hugging Face id; ``random`` for random weights.
            model: Name in ``open_clip.list_models()``; None if the files must describe it.
            framing: What to do with images that are not square; None for the model's own way.
            owner: Name of the caller, for messages.

        Raises:
            ConfigError: There is no such model, or it is not clear which preprocessing its weights need.
            WeightsError: ``open_clip_config.json`` is missing, and no model is given.
        """
        found = own_of(weights, model, owner=owner)
        if found is None and model is None:
            files = ModelSource.parse(weights)
            if files.file is not None:
                raise ConfigError(
                    f"{owner}: {files.file} holds only weights; name their model of open_clip with model."
                )
            raise files.absent(OPEN_CLIP_CONFIG, owner=owner)
        settings, tagged = found or named(str(model), weights, framing=framing, owner=owner)
        source = None if weights == RANDOM else ModelSource.parse(tagged.get("hf_hub", weights))
        own = found is not None or "hf_hub" in tagged or source is None or not source.repo
        quick = tagged.get("quick_gelu", settings.get("quick_gelu", False))
        return cls(owner, model, source, {**settings, "quick_gelu": quick}, tagged, own, framing)

    @property
    def side(self) -> int:
        """Side of the images that the tower is made for, in pixels."""
        return side_of(self.settings["vision_cfg"], owner=self.owner)

    def license(self) -> str | None:
        """License of the weights, as the model card states it."""
        return None if self.source is None else self.source.license()

    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing of open_clip's own transform for the model."""
        return Preprocessing(
            image_size=self.side,
            framing=framing_of(self.tagged, owner=self.owner),
            mean=self.tagged["mean"],
            std=self.tagged["std"],
            interpolation=self.tagged["interpolation"],
        )

    def build(self, image_size: int) -> nn.Module:
        """Build the image tower for images of this size, see :func:`build`."""
        return build(self.settings, image_size, owner=self.owner)

    def read(self, visual: nn.Module, *, image_size: int) -> tuple[Path, dict[str, Tensor]]:
        """Return the weights of the image tower, fitted to the image size, and their file.

        Args:
            visual: The network of :meth:`build`.
            image_size: Side of its input in pixels.

        Raises:
            WeightsError: They are missing, or do not fit; the message says how to fetch them.
            ConfigError: Files of a repository that are here only now describe another model.
        """
        assert self.source is not None
        found = read_source(self.source, owner=self.owner, names=(*OPEN_CLIP_FILES, *WEIGHT_FILES))
        if not self.own:
            self._check_own()
        tower = {k.removeprefix("visual."): v for k, v in found.tensors.items() if k.startswith("visual.")}
        if not tower:
            raise WeightsError(
                f"{self.owner}: {told(found.tensors, found.path)}, and contain no image tower of open_clip (names like "
                "'visual. ...'); use another file."
            )
        return found.path, self._fitted(tower, visual, found.path, image_size)

    def _fitted(self, tower: dict[str, Tensor], visual: nn.Module, path: Path, image_size: int) -> dict[str, Tensor]:
        """Return weights fitted to the image size as open_clip does it; timm's trunks fit their own once loaded."""
        if image_size == self.side or "timm_model_name" not in self.settings["vision_cfg"]:
            return fit_positions(tower, visual.state_dict(), antialias=True)
        filled: Any = self.build(self.side)
        fill_module(filled, tower, owner=self.owner, path=path)
        filled.set_input_size(image_size)
        state: dict[str, Tensor] = filled.state_dict()
        return state

    def _check_own(self) -> None:
        """Check a repository's own configuration, perhaps here only now, against what the network was built from."""
        assert self.source is not None
        with suppress(WeightsError):  # not every repository has one
            self.source.fetch(OPEN_CLIP_CONFIG, owner=self.owner)
        found = own_of(self.source.text, None, owner=self.owner)
        if found is None:  # no more is known than about a lone file
            shared_preparation(str(self.model), needed=needed_for(self.framing), owner=self.owner)
            return
        keys = ("interpolation", *needed_for(self.framing))
        same = all(_plain(found[1][key]) == _plain(self.tagged[key]) for key in keys)
        vision, quick = found[0]["vision_cfg"], found[0].get("quick_gelu", False)
        if not same or vision != self.settings["vision_cfg"] or quick != self.settings["quick_gelu"]:
            raise ConfigError(
                f"{self.owner}: '{self.source.text}' has settings of its own ({OPEN_CLIP_CONFIG}) that were not on "
                "this machine when the model was built; they are now, so start again."
            )


def own_of(weights: str, model: str | None, *, owner: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the settings in a folder's or repository's own configuration, as :func:`named` does.

    Args:
        weights: As :class:`DescribedOpenClip` takes it.
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
    written = described_by(ModelSource.parse(weights)).read_json(OPEN_CLIP_CONFIG, owner=owner)
    if written is None:
        return None
    settings = written.get("model_cfg")
    if not isinstance(settings, dict) or not isinstance(settings.get("vision_cfg"), dict):
        raise WeightsError(
            f"{owner}: {OPEN_CLIP_CONFIG} of '{weights}' has no model_cfg with a vision_cfg; fetch it again."
        )
    return settings, {**vars(PreprocessCfg()), **(written.get("preprocess_cfg") or {})}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def named(model: str, weights: str, *, framing: Framing | None, owner: str) -> tuple[dict[str, Any], dict[str, Any]]:
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
        raise ConfigError(f"{owner}: open_clip has no model {model!r}; the nearest are {near}.")
    tagged = get_pretrained_cfg(model, weights)
    if not tagged:
        _no_tag(model, weights, owner)
        # A repository has its own settings, which are checked once it is here: see DescribedOpenClip.read.
        lone = weights != RANDOM and ModelSource.parse(weights).repo is None
        tagged = shared_preparation(model, needed=needed_for(framing) if lone else (), owner=owner)
    return dict(settings), {**vars(PreprocessCfg()), **tagged}


def _no_tag(model: str, weights: str, owner: str) -> None:
    """Check that a plain word is a tag or a path: otherwise it would be looked up on the Hugging Face Hub.

    Raises:
        ConfigError: It is neither.
    """
    from open_clip import list_pretrained_tags_by_model

    if weights != RANDOM and "/" not in weights and ModelSource.parse(weights).repo == weights:
        tags = list_pretrained_tags_by_model(model)
        raise ConfigError(f"{owner}: open_clip has no weights {weights!r} of {model}; its tags are {tags}.")


def needed_for(framing: Framing | None) -> tuple[str, ...]:
    """Return the settings of open_clip's own preprocessing that the user's options do not replace."""
    return ("mean", "std", "resize_mode") if framing in (None, "own") else ("mean", "std")


def side_of(vision: Mapping[str, Any], *, owner: str) -> int:
    """Return the side of the images that a tower reads, in pixels.

    Raises:
        ConfigError: They are not square.
    """
    own = vision.get("image_size", 224)
    height, width = own if isinstance(own, list | tuple) else (own, own)
    if height != width:
        raise ConfigError(
            f"{owner}: this model reads images of {height} x {width} px, but only squares are read; use another model."
        )
    return int(height)


def framing_of(tagged: Mapping[str, Any], *, owner: str) -> Framing:
    """Return the framing of open_clip's own transform.

    Raises:
        ConfigError: open_clip has no such ``resize_mode``.
    """
    modes: dict[str, Framing] = {"shortest": "crop", "squash": "squash", "longest": "own"}
    mode = tagged["resize_mode"]
    if mode not in modes:
        raise ConfigError(f"{owner}: resize_mode={mode!r} ({OPEN_CLIP_CONFIG}) is unknown; use one of {sorted(modes)}.")
    return modes[mode]


def build(settings: Mapping[str, Any], image_size: int, *, owner: str) -> nn.Module:
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
        if "timm_model_name" in vision and image_size != side_of(vision, owner=owner):
            visual.set_input_size(image_size)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{owner}: open_clip cannot build this model at {image_size} px ({error}).") from error
    tower: nn.Module = visual.eval()
    return tower


def described_by(files: ModelSource) -> ModelSource:
    """Return the source of open_clip's configuration: the folder of a file that has open_clip's published name."""
    file = files.file
    return files if file is None or file.name not in OPEN_CLIP_FILES else replace(files, path=file.parent)


def shared_preparation(name: str, *, owner: str, needed: Collection[str] = ()) -> dict[str, Any]:
    """Return the image preprocessing that all published weights of an open_clip model share.

    Args:
        name: Name of the model.
        needed: Settings that they must have in common, among ``mean``, ``std``, ``interpolation``, ``resize_mode``.
        owner: Name of the caller, for messages.

    Raises:
        ConfigError: They differ in one of these settings.
    """
    from open_clip import list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    tagged = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    keys = ("mean", "std", "interpolation", "resize_mode")
    values = {key: list({str(each.get(key)): each.get(key) for each in tagged}.values()) for key in keys}
    for key in needed:
        if len(values[key]) > 1:
            other = ", or choose a framing yourself (framing: squash)" if key == "resize_mode" else ""
            raise ConfigError(
                f"{owner}: the published weights of {name} have several values of {key} ({values[key]}), and nothing "
                f"says which applies to this file; name a tag instead, or give a folder with its {OPEN_CLIP_CONFIG}"
                f"{other}."
            )
    return {key: found[0] for key, found in values.items() if len(found) == 1 and found[0] is not None}
