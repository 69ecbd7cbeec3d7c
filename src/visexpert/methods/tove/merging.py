"""Knowledge merging: teach one plain encoder to give the tokens that encoder and experts gave together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts import FeatureCache
from visexpert.io.weights import cache_root
from visexpert.losses import normalized_mse, token_distance
from visexpert.methods.base import Method
from visexpert.methods.fusing import FusingMethod
from visexpert.methods.parts import Part
from visexpert.methods.settings import BalanceSettings, EvaluationSettings, MergeSettings, MergingOptimizer
from visexpert.methods.step import Compared, LossTerm, Seen
from visexpert.metrics.tokens import TokenError
from visexpert.names import EncoderName
from visexpert.optim import ParameterGroup
from visexpert.typed import typed
from visexpert.types import Batch, ImageSource, VisionTokens, imaged
from visexpert.vision import MoLESettings, VisionEncoder, add_mole, equipped_blocks


@dataclass(frozen=True)
class MergeStudent(BalanceSettings):
    """A student with MoLE, which learns with low-rank experts beside the encoder's own weights.

    Args:
        mole: The MoLE to add to the encoder's MLPs.
        mole_lr: Its peak learning rate; null is the encoder's.

    Raises:
        ConfigError: A weight or rate outside its range, or an unknown form.
    """

    owner: ClassVar[str] = "MergeStudent"
    mole: MoLESettings = field(default_factory=MoLESettings)
    mole_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mole_lr is not None and self.mole_lr <= 0:
            raise ConfigError(f"MergeStudent: mole_lr must be above 0, or null for the encoder's, got {self.mole_lr}.")

    def group(self, clip: VisionEncoder, *, lr: float) -> ParameterGroup:
        """Return the trainable parts of MoLE, with their learning rate.

        Args:
            clip: The student, with MoLE.
            lr: Learning rate of the encoder.
        """
        balanced = self.balance_weight > 0
        parts = [part for mole in equipped_blocks(clip).values() for part in mole.learning_modules(balanced=balanced)]
        return ParameterGroup("mole", tuple(parts), lr if self.mole_lr is None else self.mole_lr)


FUSED = EncoderName("teacher", "fused")


@typed
class Merging(Method):
    """ToVE's second half (arXiv 2504.00691, "knowledge merging"): student = a copy of the encoder, targets = t_fuse.

    Loss = token_weight * distance(student's tokens, t_fuse) + lm_weight * L_text, the latter through the same
    language model; + balance_weight * L_bal of the routers if the student has MoLE. Experts run only for the targets.
    The paper does not give the loss; the defaults score best on Tabletop (docs/results/merge.md).

    Args:
        teacher: A trained method that fuses experts, such as ToVE, with its weights loaded.
        student: Merge into an encoder with MoLE; null for a plain one.
        merging: What trains, and on which loss.
        optimizer: Rates and schedule.
        evaluation: What to score besides the loss and the answers.
    """

    def __init__(
        self,
        *,
        teacher: FusingMethod,
        student: MergeStudent | None = None,
        merging: MergeSettings = MergeSettings(),
        optimizer: MergingOptimizer = MergingOptimizer(),
        evaluation: EvaluationSettings = EvaluationSettings(),
    ) -> None:
        if student is None and merging.adaptation == "none":
            raise ConfigError("Merging: adaptation='none' leaves a plain encoder nothing to learn; use full or lora.")
        if merging.targets == "store" and teacher.clip.reads_tiles:
            raise ConfigError(
                "Merging: targets='store' keeps tokens of whole images, but this encoder reads images in tiles; use "
                "targets: live."
            )
        optimizer = replace(optimizer, on_nan=teacher.on_nan)
        if merging.lm_weight == 0:
            optimizer = replace(optimizer, language_lr=0.0)
        shared = optimizer.language_lr == 0
        super().__init__(
            clip=copy.deepcopy(teacher.clip).requires_grad_(False),
            projector=copy.deepcopy(teacher.projector),
            language=teacher.language if shared else copy.deepcopy(teacher.language),
            optimizer=optimizer,
            evaluation=evaluation,
        )
        self.teacher = teacher
        self.student = student
        self.router_balance = None if student is None else student.router_balance
        if student is not None:
            add_mole(self.clip, **vars(student.mole))
        self.settings, self.lm_weight = merging, merging.lm_weight
        self.lora = None
        if merging.adaptation == "lora":
            self.lora = ClipLora(self.clip, rank=merging.lora_rank, alpha=merging.lora_alpha)
        self._stored: FeatureCache | None = None
        self.error = TokenError()
        self.keep_pooled(merging.keep_pooled)
        self.settle_training()

    def view_tokens(self, batch: Batch) -> VisionTokens:
        """Return tokens in the fusion space: the encoder's, or projected ones if fused after the projector."""
        tokens: VisionTokens = self.clip(batch.images_01())
        return tokens if self.teacher.fusion_space == "clip" else super().to_language(tokens)

    def to_language(self, tokens: VisionTokens) -> VisionTokens:
        """Project the tokens if :meth:`view_tokens` did not."""
        return super().to_language(tokens) if self.teacher.fusion_space == "clip" else tokens

    def compare(self, seen: Seen) -> Compared:
        """Return the distance to the teacher's tokens, over all views."""
        if self.settings.token_weight == 0:
            return Compared()
        student_BTD, target_BTD = seen.tokens.tokens_BTD, self._target(seen.views.batch)
        there_B = seen.views.batch.has_image_B
        distance = token_distance(
            student_BTD, target_BTD, self.settings.distance, normalize=self.settings.normalize, has_image_B=there_B
        )
        nmse = normalized_mse(student_BTD.detach(), target_BTD, has_image_B=there_B)
        return Compared({"token_loss": LossTerm(distance, "image", self.settings.token_weight)}, {"nmse": nmse})

    def compare_in_validation(self, seen: Seen) -> None:
        """Collect the error of the student's tokens."""
        batch = seen.views.batch
        if seen.batch.counts()["image"]:
            there_B = batch.has_image_B
            self.error.update(imaged(seen.tokens.tokens_BTD, there_B), imaged(self._target(batch), there_B))

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Return the teacher, with its experts."""
        return {"teacher": self.teacher}

    def unused_modules(self) -> Sequence[nn.Module]:
        """Return the teacher without its language model, which both share."""
        return [part for name, part in self.teacher.named_children() if name != "language"]

    def own_parts(self) -> Sequence[Part]:
        """Return the teacher."""
        return [Part.of("teacher", "teachers", self.teacher)]

    def trained_groups(self) -> Sequence[ParameterGroup]:
        """Return encoder (or its low-rank updates), projector if its output is compared, MoLE, language model."""
        modules = self._own_modules()
        if self.teacher.fusion_space == "language":
            modules = (*modules, self.projector)
        groups = [ParameterGroup("student", modules, self.lr)] if modules else []
        if self.student is not None:
            groups.append(self.student.group(self.clip, lr=self.lr))
        if self.language_lr > 0:
            groups.append(ParameterGroup("language", self.language.trained_modules(), self.language_lr))
        return groups

    def load_weights(self) -> None:
        """Do nothing: the teacher has its weights."""

    def merged(self) -> FusingMethod:
        """Fold low-rank updates in, and return a model without experts, ready to score and save."""
        if self.lora is not None:
            self.lora.merge()
            self.lora = None
        self.clip.requires_grad_(True)
        kept = {} if self.kept is None else {"keep_pooled": self.kept.weight}
        return self.teacher.plain(self.clip, self.projector, self.language, clip_lr=self.lr, **kept)

    def check_pooled_teacher(self) -> None:
        """Do nothing: the teacher's encoder is there."""

    def frozen_encoder(self) -> VisionEncoder:
        """Return the teacher's encoder."""
        return self.teacher.clip

    @property
    def feature_cache(self) -> FeatureCache | None:
        """Where the teacher's tokens are stored, or those of its encoders."""
        return self._stored or self.teacher.feature_cache

    def on_fit_start(self) -> None:
        """Open the teacher's store, or compute its tokens for the whole training set."""
        stores = self.settings.targets == "store"
        cache = self.teacher.feature_cache or (FeatureCache(cache_root() / "features") if stores else None)
        if cache is not None:
            why = "targets: store needs; use targets: live" if stores else "the teacher's store needs"
            self.read_features(cache, self.image_sources(wanted_by=why))

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read the teacher's tokens of these images from the store, or those of its encoders; see :class:`Method`."""
        if self.settings.targets == "store":
            self._store_targets(cache, sources)
        else:
            self.teacher.read_features(cache, sources)

    def on_validation_epoch_start(self) -> None:
        """Reset the scores."""
        super().on_validation_epoch_start()
        self.error.reset()

    def on_validation_epoch_end(self) -> None:
        """Log scores, and the token error over all processes."""
        super().on_validation_epoch_end()
        error = self.error.compute()
        if error["num_images"]:
            self.log("val/nmse", error["nmse"], batch_size=1)

    def _own_modules(self) -> tuple[nn.Module, ...]:
        """Return the trainable parts of the encoder itself, without MoLE."""
        if self.settings.adaptation == "none":
            return ()
        if self.lora is not None:
            return self.lora.modules(pooled=self.kept is not None)
        if self.student is not None:
            return self.clip.plain_modules(pooled=self.kept is not None)
        return *self.clip.read_modules(), *(self.clip.pooled_modules() if self.kept is not None else ())

    @torch.no_grad()
    def _target(self, batch: Batch) -> Tensor:
        if self._stored is not None:
            stored = self._stored.read(FUSED, batch)
            if stored is not None:
                return stored
        return self.teacher.transferred(batch).tokens_BTD

    def _store_targets(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        teacher = self.teacher

        def encode(images_BCHW: Tensor) -> Tensor:
            rows = torch.arange(len(images_BCHW))
            return teacher.transferred(Batch(images_BCHW, rows, split="")).tokens_BTD

        for split, source in sources.items():
            cache.prepare(
                FUSED,
                split,
                source,
                fingerprint=teacher.fusion_fingerprint(),
                encode=encode,
                grid_hw=teacher.clip.grid_hw,
                width=teacher.fused_width,
                device=self.device,
            )
        self._stored = cache


class ClipLora:
    """Low-rank updates on the linear layers of an encoder's blocks; its base weights are frozen.

    Args:
        clip: The encoder, changed in place.
        rank: Rank of each update.
        alpha: Updates are scaled by alpha / rank.

    Raises:
        ConfigError: The rank is below 1.
    """

    def __init__(self, clip: VisionEncoder, *, rank: int, alpha: float) -> None:
        if rank < 1:
            raise ConfigError(f"LoRA: rank must be at least 1, got {rank}.")
        clip.requires_grad_(False)
        targets = list(clip.linear_names())
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
        self._clip = clip
        self._lora = LoraModel(clip.model, config, "default")

    def modules(self, *, pooled: bool = False) -> tuple[nn.Module, ...]:
        """Return the low-rank factors of the layers in use.

        Args:
            pooled: Whether the pooled output is in use, too; its norm stays frozen.
        """
        behind = self._clip.pooled_modules() if pooled else ()
        parts = (*self._clip.read_modules(), *behind)
        read = [layer for part in parts for layer in part.modules() if isinstance(layer, LoraLayer)]
        return tuple(part for layer in read for part in (layer.lora_A, layer.lora_B))

    def merge(self) -> None:
        """Add the updates to the weights and remove every trace of LoRA; keys and shapes are the encoder's own."""
        self._lora.merge_and_unload()
