"""The trained encoder: what methods ask of it, whatever the library and family of its network."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError, require_channels
from visexpert.io.first_use import ReadsWeights, described
from visexpert.io.weights import fill_module, weights_digest
from visexpert.networks.alone import Alone
from visexpert.networks.preprocessing import Interpolation, Preprocessing
from visexpert.typed import typed
from visexpert.types import IMAGES_ARE_CHECKED, Batch, VisionTokens, check_images
from visexpert.vision.anatomy import Anatomy, AttentionRow, Saliency, SaliencyKind, agreement, without_cls
from visexpert.vision.mole import MOLE_KEY, MoLEFeedForward, MoLESettings
from visexpert.vision.mole_adding import add_mole
from visexpert.vision.mole_forward import Router

NEWLINE = -1
"""Index that ends a row of tiles, see :class:`Views`."""


@typed
class VisionEncoder(ReadsWeights):
    """A vision transformer of any library, read at one layer; resizes and normalizes on the device.

    The network is built with random weights, without a download; :meth:`load_weights` fills it. Blocks after the layer
    in use are not run. A subclass says how a library describes, builds, loads and saves a network; an
    :class:`~visexpert.vision.anatomy.Anatomy` how a family's network is read.

    Args:
        model: The library's own network, whose keys and shapes stay.
        anatomy: How it is read.
        layer: Which hidden state to pass on: -1 the last, -2 the one before, ... No final norm is applied.
        preprocessing: Size of the input and how images are brought to it, always stretched.
        patch_size: Side of a patch in pixels.
        source: Where its weights come from; None for a random network.
        license: License of the weights; None for "not stated".
        given: Arguments of the class, without MoLE, that build the same encoder again.
        mole: Add a mixture of low-rank experts to its MLPs (MoVE-KD's student); None for the plain network.

    Raises:
        ConfigError: A layer that does not exist, sizes that do not fit, or an MLP that MoLE does not support.
    """

    prefix: int
    """Number of tokens before the patches: [CLS] and registers."""
    has_cls: bool
    """Whether the first token is a [CLS] token."""
    mean: Tensor
    std: Tensor
    projection_PE: Tensor | None
    """Frozen projection of the pooled output into the space of the text tower, which the source has beside the
    network; None before :meth:`load_weights`, or without one."""
    projection_dim: int | None = None
    """Width of that space, where the projection is in the same files and ``hf`` leaves it out; else None."""

    def __init__(
        self,
        *,
        model: nn.Module,
        anatomy: Anatomy,
        layer: int,
        preprocessing: Preprocessing,
        patch_size: int,
        source: str | None,
        license: str | None,
        given: Mapping[str, Any],
        mole: MoLESettings | None,
    ) -> None:
        super().__init__()
        self.model, self.anatomy = model, anatomy
        self.prefix, self.has_cls = anatomy.prefix(model), anatomy.has_cls(model)
        self.layer, self.image_size, self.patch_size = layer, preprocessing.image_size, patch_size
        self.preprocessing, self._given = preprocessing, given
        self.source, self.license = source, license or "not stated"
        owner = type(self).__name__
        if not -self.depth - 1 <= layer <= -1:
            raise ConfigError(
                f"{owner}: layer={layer} is outside -{self.depth + 1}..-1 of an encoder with {self.depth} layers."
            )
        if self.image_size < patch_size:
            raise ConfigError(
                f"{owner}: image_size must be at least one patch of {patch_size} px, got {self.image_size}."
            )
        self.routing_watched = False
        """Whether routing decisions are being collected, including those behind the tokens (collect_routing)."""
        self.pooled_to: Callable[[Tensor], None] | None = None
        """Gets the pooled output of each forward pass (record_pooled); None if it is not computed."""
        self._salient = False
        self._seen: Saliency | None = None
        if mole is not None:
            add_mole(self, **vars(mole))
        require_channels(owner, mean=preprocessing.mean, std=preprocessing.std)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("projection_PE", None, persistent=False)

    @property
    def interpolation(self) -> Interpolation:
        """Interpolation when resizing, antialiased."""
        return self.preprocessing.interpolation

    # -- What a library's class says --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def width(self) -> int:
        """Token width D."""

    @abstractmethod
    def load_weights(self) -> None:
        """Read the weights of the source; a random encoder (no source) keeps its own.

        Raises:
            WeightsError: They do not exist, or do not fit; the message says how to fetch them.
        """

    def rebuilt(self) -> VisionEncoder:
        """Return a new encoder built in the same way, without MoLE and with random weights."""
        return type(self)(**self._given)

    @abstractmethod
    def facts(self) -> Mapping[str, object]:
        """Return what the tokens depend on besides weights and image, in JSON's types, for the fingerprint."""

    def alone(self) -> Alone | str:
        """Return the network that its own library makes of the same files; or the reason why there is none.

        Raises:
            NotLoadedError: The library does not read them.
        """
        return "random weights" if self.source is None else "no other library implements this network"

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write files that the network's own library loads, with its other parts, such as a text tower.

        Args:
            folder: Existing, empty folder.
            state: Weights to store under the network's own keys, such as rounded ones; None for those in place.

        Raises:
            ConfigError: The encoder has MoLE, or its library has no such files.
            WeightsError: The source, whose other parts are copied, is gone.
        """
        raise ConfigError(f"{type(self).__name__} has no format of its own; export it as onnx or torch_export.")

    def save_as(
        self, form: str, folder: Path, state: Mapping[str, Tensor], *, projection_dim: int | None = None
    ) -> None:
        """Write files of another library or class, which :meth:`formats` allows; by default those of :meth:`save`.

        Args:
            form: ``hf`` or ``open_clip``.
            folder: Existing, empty folder.
            state: Weights to store under the network's own keys.
            projection_dim: Width of the projection that is left out, if there is one.

        Raises:
            ConfigError: The encoder cannot be written in this format.
        """
        if (reason := self.formats().get(form)) is not None:
            raise ConfigError(f"The format {form} {reason}.")
        self.save(folder, state)

    def formats(self) -> dict[str, str | None]:
        """Return the formats of ``visexpert export``: None, or why the encoder cannot be written in one.

        The first with None is the default. A reason continues "The format NAME ...".
        """
        kind = type(self).__name__
        clips = f"has no place for the network of a {kind}"
        return {
            "native": f"is what an encoder's own library writes, and a {kind} has no such files",
            "hf": f"is for encoders of transformers, and a {kind} is from another library",
            "onnx": None,
            "torch_export": None,
            **dict.fromkeys(("open_clip", "llava", "visexpert"), clips),
        }

    reads_tiles: bool = False
    """Whether :meth:`views_of` may cut an image into several views."""

    returns_embeddings: bool = False
    """Whether its library also returns the hidden state before the first block."""

    def no_embeddings(self) -> str | None:
        """Return why the library cannot confirm the tokens, worded as in :meth:`formats`; None if it can."""
        if self.returns_embeddings or self.layer >= -self.depth:
            return None
        return f"returns no tokens before the first block (layer {self.layer})"

    @property
    def activation(self) -> str | None:
        """Name of the MLPs' activation, where weights of one family need different ones; else None."""
        return None

    usage: str = ""
    """Python code that reads a PIL ``image`` with what :meth:`save` wrote into ``FOLDER``; ``{layer}`` and the like
        are filled in."""

    # -- The network ------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks())

    @property
    def heads(self) -> int:
        """Number of heads of the blocks' attention."""
        return self.anatomy.heads(self.model)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Grid of the patch tokens, height x width = T."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def weights_from(self) -> str | None:
        """Folder, file or Hugging Face id that :meth:`load_weights` reads; None for a random encoder."""
        return self.source

    def blocks(self) -> tuple[nn.Module, ...]:
        """Return all blocks in order; each has an MLP called ``mlp``."""
        return tuple(self.model.get_submodule(self.anatomy.blocks_at).children())

    def mlp_names(self) -> tuple[str, ...]:
        """Return the dotted name of each block's MLP within this encoder, in order."""
        return tuple(f"model.{self.anatomy.blocks_at}.{index}.mlp" for index in range(self.depth))

    def linear_names(self) -> tuple[str, ...]:
        """Return the dotted names within ``model`` of the blocks' linear layers, in order, for low-rank updates.

        Routers of MoLE are not the network's own. Layers whose weight the library reads itself, without calling them,
        are left out, too: in timm's BEiT and some of its EVA, ``attn.qkv``, whose biases lie elsewhere.
        """
        found = []
        for index, block in enumerate(self.blocks()):
            for name, part in block.named_modules():
                above = block.get_submodule(name.rpartition(".")[0])
                is_bypassed = name.endswith("qkv") and getattr(above, "q_bias", None) is not None
                if isinstance(part, nn.Linear) and not isinstance(part, Router) and not is_bypassed:
                    found.append(f"{self.anatomy.blocks_at}.{index}.{name}")
        return tuple(found)

    def read_blocks(self) -> tuple[nn.Module, ...]:
        """Return the blocks that the tokens depend on."""
        return self.blocks()[: self.depth + 1 + self.layer]

    def read_modules(self) -> tuple[nn.Module, ...]:
        """Return the parts that the tokens depend on; those behind the layer in use get no gradient from them."""
        return *self.anatomy.stem(self.model), *self.read_blocks()

    def routed_blocks_behind(self) -> tuple[nn.Module, ...]:
        """Return the blocks behind the tokens up to the last MoLE: only the routers' balance loss reaches them."""
        blocks = self.blocks()
        first = len(self.read_blocks())
        last = max((index for index, block in enumerate(blocks) if isinstance(block.mlp, MoLEFeedForward)), default=-1)
        return blocks[first : last + 1]

    def mole_layers(self) -> tuple[MoLEFeedForward, ...]:
        """Return the MLPs with MoLE in block order."""
        mlps = (block.mlp for block in self.blocks())
        return tuple(mlp for mlp in mlps if isinstance(mlp, MoLEFeedForward))

    def plain_modules(self, *, balanced: bool = False, pooled: bool = False) -> tuple[nn.Module, ...]:
        """Return the parts of the network itself that get a gradient, without those that MoLE adds.

        Args:
            balanced: Whether there is a balance loss, which also reaches the inputs of the routers behind the tokens.
            pooled: Whether there is a loss on the pooled output, which reaches everything.
        """
        read = self.blocks() if pooled else self.read_blocks()
        behind = self.routed_blocks_behind() if balanced and not pooled else ()
        inner = [part for block in (*read, *behind) for part in _without_mlp(block)]
        for block in (*read, *behind[:-1]):
            inner += _plain(block.get_submodule("mlp"))
        pooling = self.anatomy.pooling(self.model) if pooled else ()
        return *self.anatomy.stem(self.model), *inner, *pooling

    def fill(self, state: Mapping[str, Tensor], *, path: Path) -> None:
        """Put weights into the network, strictly; MoLE's parameters, which a library's files lack, keep their values.

        Raises:
            WeightsError: They do not fit.
        """
        added = {key: value for key, value in self.model.state_dict().items() if MOLE_KEY.search(key)}
        fill_module(self.model, added | dict(state), owner=type(self).__name__, path=path)

    def plain_copy(self) -> VisionEncoder:
        """Return the same encoder without MoLE, with the same weights."""
        copy = self.rebuilt()
        own = self.model.state_dict()
        copy.model.load_state_dict({key: value for key, value in own.items() if not MOLE_KEY.search(key)}, strict=True)
        copy.mark_weights_in_place()
        copy.projection_PE = self.projection_PE
        return copy

    def fingerprint(self) -> str:
        """Return a hash of weights, layer and preprocessing: what the tokens depend on besides the image."""
        facts = {**self.facts(), "layer": self.layer, "image_size": self.image_size, "resize": self.interpolation}
        facts |= {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return weights_digest(self.model, facts=json.dumps(facts, sort_keys=True, default=str))

    # -- Other sizes ------------------------------------------------------------------------------------------------

    @contextmanager
    def at_size(self, side: int) -> Iterator[None]:
        """Read images at another size in this context: position embeddings are interpolated, and the grid follows.

        Args:
            side: Side of the input in pixels, which :meth:`require_size` has allowed.
        """
        own, self.image_size = self.image_size, side
        try:
            yield
        finally:
            self.image_size = own

    def require_size(self, side: int) -> None:
        """Check that images can be read at another size (:meth:`at_size`).

        Args:
            side: Side of the input in pixels.

        Raises:
            ConfigError: It is not a multiple of the patch, or the network cannot interpolate its position embeddings.
        """
        owner, patch = type(self).__name__, self.patch_size
        if side % patch or side < patch:
            below = max(side // patch, 1) * patch
            raise ConfigError(
                f"{owner}: {side} px is not a multiple of its patches of {patch} px; use one, such as {below} or "
                f"{below + patch}."
            )
        if side != self.image_size and not self.anatomy.takes_any_size(self.model):
            raise ConfigError(
                f"{owner}: {type(self.model).__name__} of {self.source or 'these settings'} takes images of "
                f"{self.image_size} px only, got {side}; {self.anatomy.other_sizes}."
            )

    # -- The forward pass -------------------------------------------------------------------------------------------

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Stretch images (B, 3, H, W) in [0, 1] to the side of the input, antialiased, and normalize them.

        Returns:
            (B, 3, H, W) of the input's side, in the precision of the weights.
        """
        images_BCHW = images_BCHW.to(torch.promote_types(images_BCHW.dtype, torch.float32))
        size = (self.image_size, self.image_size)
        if images_BCHW.shape[-2:] != size:
            resized = F.interpolate(images_BCHW, size, mode=self.interpolation, antialias=True, align_corners=False)
            images_BCHW = resized.clamp(0.0, 1.0)
        dtype = next(self.model.parameters()).dtype
        return ((images_BCHW - self.mean) / self.std).to(dtype)

    def views_of(self, batch: Batch) -> Views:
        """Return what the encoder sees of a batch: here the images as they are. Samples without one get no tokens."""
        there_B = batch.has_image_B
        if there_B is None:
            return Views(batch, None, None)
        return Views(batch, None, tuple(math.prod(self.grid_hw) * there for there in there_B.tolist()))

    def __call__(self, images_BCHW: Tensor) -> VisionTokens:
        if not IMAGES_ARE_CHECKED.get():
            check_images(images_BCHW, owner=type(self).__name__, device=self.mean.device)
        tokens: VisionTokens = super().__call__(images_BCHW)
        return tokens

    def forward(self, images_BCHW: Tensor) -> VisionTokens:
        """Encode images (B, 3, H, W), float in [0, 1], any size, into patch tokens (B, T, D) and [CLS] (B, D).

        Calling the encoder also reads its weights, if they are not in place, and checks the images.

        Raises:
            DataError: When called, images of another form, dtype or range.
            WeightsError: On the first call, weights that are missing or do not fit.
        """
        blocks, grid_hw = self.blocks(), self.grid_hw
        count = len(blocks) + 1 + self.layer
        routed_behind = len(self.routed_blocks_behind()) if self.routing_watched else 0
        hidden_BND, inputs = self.anatomy.embed(self.model, self.preprocess(images_BCHW))
        row = AttentionRow() if self._salient and self.has_cls else None
        for index in range(count):
            with row if row is not None and index == count - 1 else nullcontext():
                hidden_BND = blocks[index](hidden_BND, **inputs[index])
        cls_BD = hidden_BND[:, 0] if self.has_cls else None
        tokens = VisionTokens(hidden_BND[:, self.prefix :], grid_hw, cls_BD=cls_BD)
        last = count + routed_behind
        if self.pooled_to is not None or (self._salient and row is None):
            last = len(blocks)
        for index in range(count, last):
            hidden_BND = blocks[index](hidden_BND, **inputs[index])
        if self.pooled_to is not None:
            self.pooled_to(self._pool(hidden_BND))
        if self._salient:
            self._seen = self._saliency(tokens, None if row is None else row.logits_BHN, hidden_BND)
        return tokens

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """Return the pooled output (B, P) of images (B, 3, H, W), float in [0, 1]; all blocks run.

        Raises:
            ConfigError: The network has no pooled output.
            DataError: Images of another form, dtype or range.
            WeightsError: On the first call, weights that are missing or do not fit.
        """
        check_images(images_BCHW, owner=type(self).__name__, device=self.mean.device)
        self.read_on_first_use(images_BCHW.device)
        hidden_BND, inputs = self.anatomy.embed(self.model, self.preprocess(images_BCHW))
        for block, given in zip(self.blocks(), inputs, strict=True):
            hidden_BND = block(hidden_BND, **given)
        return self._pool(hidden_BND)

    def _pool(self, last_BND: Tensor) -> Tensor:
        pooled_BP = self.anatomy.pool(self.model, last_BND)
        if pooled_BP is None:
            raise ConfigError(f"{type(self).__name__}: {self.source or 'this network'} has no pooled output.")
        return pooled_BP

    @torch.no_grad()
    def require_pooled(self) -> None:
        """Check that the network has a pooled output; no block runs.

        Raises:
            ConfigError: It has none.
        """
        given = next(self.model.parameters())
        self._pool(given.new_zeros(1, self.prefix + math.prod(self.grid_hw), self.width))

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return the embedding (B, E) that texts are compared with: the pooled output in the text tower's space."""
        return self.project(self.pooled(images_BCHW))

    def project(self, pooled_BP: Tensor) -> Tensor:
        """Map a pooled output (B, P) into the space of the text tower (B, E), unchanged if there is no projection."""
        return pooled_BP if self.projection_PE is None else pooled_BP @ self.projection_PE.to(pooled_BP.dtype)

    def pooled_modules(self) -> tuple[nn.Module, ...]:
        """Return what the pooled output depends on and the tokens do not: blocks behind them, norm, pooling head."""
        return *self.blocks()[len(self.read_blocks()) :], *self.anatomy.pooling(self.model)

    # -- Saliency ---------------------------------------------------------------------------------------------------

    @property
    def saliency(self) -> SaliencyKind:
        """Where :meth:`attend` takes the scores of the tokens from."""
        if self.has_cls:
            return "cls"
        return "pool" if self.anatomy.attends_in_pooling(self.model) else "mean"

    @property
    def saliency_heads(self) -> int:
        """Number of heads H in the scores of :meth:`attend`."""
        return 1 if self.saliency == "mean" else self.heads

    def attend(self, images_BCHW: Tensor) -> Saliency:
        """Encode images (B, 3, H, W), float in [0, 1], in one forward pass, and score their tokens.

        Raises:
            ConfigError: The [CLS] token is read before the first block, where nothing attends.
        """
        if self.saliency == "cls" and not self.read_blocks():
            raise ConfigError(
                f"[CLS] attention needs a block, but layer={self.layer} reads the embeddings; use a layer from "
                f"-{self.depth} to -1."
            )
        self._salient = True
        try:
            self(images_BCHW)
        finally:
            self._salient = False
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def _saliency(self, tokens: VisionTokens, row_BHN: Tensor | None, last_BND: Tensor) -> Saliency:
        if self.saliency == "cls":
            assert row_BHN is not None
            registers = self.prefix - 1  # between [CLS] and the patches
            kept = row_BHN if not registers else torch.cat([row_BHN[..., :1], row_BHN[..., self.prefix :]], dim=-1)
            return Saliency(tokens, kept)
        scores_BHT = self.anatomy.pool_scores(self.model, last_BND) if self.saliency == "pool" else None
        if scores_BHT is None:
            summary_BD, scores_BHT = tokens.tokens_BTD.mean(1), agreement(tokens.tokens_BTD)
        else:
            shares_BT = scores_BHT.softmax(-1).mean(1)
            summary_BD = torch.einsum("bt,btd->bd", shares_BT, tokens.tokens_BTD)
        there = VisionTokens(tokens.tokens_BTD, tokens.grid_hw, cls_BD=summary_BD)
        return Saliency(there, without_cls(scores_BHT))

    def __repr__(self) -> str:
        height, width = self.grid_hw
        mole = f", MoLE in {len(self.mole_layers())} blocks" if self.mole_layers() else ""
        facts = [f"layer {self.layer}", f"{height}x{width} tokens of width {self.width}", f"{self.image_size} px{mole}"]
        return described(self, self.source, facts)


def _without_mlp(block: nn.Module) -> list[nn.Module]:
    """Return the children of a block except its MLP, and its own parameters (scales) in a list."""
    own = list(block.parameters(recurse=False))
    children = [child for name, child in block.named_children() if name != "mlp"]
    return [*children, nn.ParameterList(own)] if own else children


def _plain(mlp: nn.Module) -> list[nn.Module]:
    """Return the parts of an MLP that MoLE does not add."""
    added = mlp.added_modules() if isinstance(mlp, MoLEFeedForward) else ()
    if not added:
        return [mlp]
    return [child for child in mlp.children() if not any(child is part for part in added)]


@dataclass(frozen=True)
class Views:
    """What the encoders see of a batch, and how to reassemble their tokens.

    Args:
        batch: One image per view: all whole images, then the tiles of the first, the second, ...; without tiles, the
            batch itself.
        index_BM: int64 index of each token among those of all views (V T); :data:`NEWLINE` ends a row of tiles. None
            without tiles.
        lengths: Number of tokens of each image; None if all have the same.
    """

    batch: Batch
    index_BM: Tensor | None
    lengths: tuple[int, ...] | None

    def whole(self, seen: VisionTokens) -> VisionTokens:
        """Select the tokens of the whole images from those of all views, as without tiles."""
        if self.index_BM is None:
            return seen
        count = len(self.index_BM)
        gates, cls = seen.gates_BTK, seen.cls_BD
        return replace(
            seen,
            tokens_BTD=seen.tokens_BTD[:count],
            cls_BD=None if cls is None else cls[:count],
            gates_BTK=None if gates is None else gates[:count],
        )

    def join(self, seen: VisionTokens) -> VisionTokens:
        """Join the tokens of all views into one row per image: the whole, then its tiles in reading order, unpadded.

        Everything else (gates, [CLS]) is that of the whole images.
        """
        whole = replace(self.whole(seen), lengths=self.lengths)
        if self.index_BM is None:
            return whole
        tokens_XD = seen.tokens_BTD.flatten(0, 1)
        joined_BMD = tokens_XD[self.index_BM.clamp(min=0)]
        return replace(whole, tokens_BTD=joined_BMD, newline_BT=self.index_BM == NEWLINE)
