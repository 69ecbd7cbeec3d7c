"""Knowledge merging: teach one plain CLIP to produce the tokens that CLIP and experts gave together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts import FeatureCache
from visexpert.io.weights import cache_root
from visexpert.losses import normalized_mse, token_distance
from visexpert.methods.base import Method
from visexpert.methods.fusing import FusingMethod
from visexpert.methods.parts import Part
from visexpert.methods.seen import Compared, RouterBalance, Seen
from visexpert.methods.settings import EvaluationSettings, MergeSettings, MergingOptimizer
from visexpert.methods.tove.merge_student import MergeStudent
from visexpert.metrics.tokens import TokenError
from visexpert.names import EncoderName
from visexpert.optim import ParameterGroup
from visexpert.types import Batch, ImageSource, LossTerm, VisionTokens, imaged
from visexpert.vision import TiledClipEncoder, add_mole
from visexpert.vision.lora import ClipLora

FUSED = EncoderName("teacher", "fused")


class Merging(Method):
    """ToVE's second half (arXiv 2504.00691, "knowledge merging"): student = a copy of CLIP, targets = t_fuse.

    Loss = token_weight * distance(student's tokens, t_fuse) + lm_weight * L_text, the latter through the same
    language model; + balance_weight * L_bal of its routers where the student has MoLE. Experts run only as targets.
    The paper gives no form of the loss; the defaults are what measures best on Tabletop (docs/results/merge.md).

    Args:
        teacher: A trained method that fuses experts, such as ToVE, weights in place.
        student: Merge into a CLIP with MoLE; null for a plain one.
        merging: What trains, and against what.
        optimizer: Rates and schedule.
        evaluation: What is scored beside the loss and the answers.
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
            raise ConfigError("Merging: adaptation='none' leaves a plain CLIP nothing to learn; use full or lora.")
        if merging.targets == "store" and isinstance(teacher.clip, TiledClipEncoder):
            raise ConfigError(
                "Merging: targets='store' keeps tokens of whole images, but this CLIP reads images in tiles; use "
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
        if student is not None:
            add_mole(self.clip, **vars(student.mole))
        self.settings, self.lm_weight = merging, merging.lm_weight
        self.lora = None
        if merging.adaptation == "lora":
            self.lora = ClipLora(self.clip, rank=merging.lora_rank, alpha=merging.lora_alpha)
        self._stored: FeatureCache | None = None
        self.error = TokenError()
        self.settle_training()

    def view_tokens(self, batch: Batch) -> VisionTokens:
        """Tokens in the fusion space: CLIP's own, or, where that is the language's, the projector's."""
        tokens: VisionTokens = self.clip(batch.images_01())
        return tokens if self.teacher.fusion_space == "clip" else super().to_language(tokens)

    def to_language(self, tokens: VisionTokens) -> VisionTokens:
        """Through the projector, where it has not been yet."""
        return super().to_language(tokens) if self.teacher.fusion_space == "clip" else tokens

    def compare(self, seen: Seen) -> Compared:
        """Distance to the teacher's tokens, of every view."""
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
        """How far the student's tokens are from the teacher's."""
        batch = seen.views.batch
        if seen.batch.counts()["image"]:
            there_B = batch.has_image_B
            self.error.update(imaged(seen.tokens.tokens_BTD, there_B), imaged(self._target(batch), there_B))

    @property
    def router_balance(self) -> RouterBalance | None:
        """That of a student with MoLE."""
        return None if self.student is None else self.student.router_balance

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """The teacher, experts included."""
        return {"teacher": self.teacher}

    def unused_modules(self) -> Sequence[nn.Module]:
        """The teacher but for the language model, which both share."""
        return [part for name, part in self.teacher.named_children() if name != "language"]

    def own_parts(self) -> Sequence[Part]:
        """The teacher."""
        return [Part.of("teacher", "teachers", self.teacher)]

    def trained_groups(self) -> Sequence[ParameterGroup]:
        """CLIP (or its low-rank updates); the projector where it is part of what is compared; MoLE; the language."""
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
        """Nothing: the teacher came with its weights."""

    def merged(self) -> FusingMethod:
        """Fold low-rank updates in and hand on a model without experts, ready to score and save."""
        if self.lora is not None:
            self.lora.merge()
            self.lora = None
        self.clip.requires_grad_(True)
        return self.teacher.plain(self.clip, self.projector, self.language, clip_lr=self.lr)

    @property
    def feature_cache(self) -> FeatureCache | None:
        """Where the teacher's tokens are kept, or those of its encoders."""
        return self._stored or self.teacher.feature_cache

    def on_fit_start(self) -> None:
        """Open the teacher's feature cache, or compute its tokens for the whole training set."""
        if self.settings.targets == "store":
            self._store_targets(self.image_sources(wanted_by="targets: store needs; use targets: live"))
        elif (cache := self.teacher.feature_cache) is not None:
            self.teacher.read_features(cache, self.image_sources(wanted_by="the teacher's store needs"))

    def on_validation_epoch_start(self) -> None:
        """Fresh scores."""
        super().on_validation_epoch_start()
        self.error.reset()

    def on_validation_epoch_end(self) -> None:
        """Log scores, and the error over all tokens of all processes."""
        super().on_validation_epoch_end()
        error = self.error.compute()
        if error["num_images"]:
            self.log("val/nmse", error["nmse"], batch_size=1)

    def _own_modules(self) -> tuple[nn.Module, ...]:
        """What trains of CLIP itself, without MoLE."""
        if self.settings.adaptation == "none":
            return ()
        if self.lora is not None:
            return self.lora.modules()
        return self.clip.read_modules() if self.student is None else self.clip.plain_modules()

    @torch.no_grad()
    def _target(self, batch: Batch) -> Tensor:
        if self._stored is not None:
            stored = self._stored.read(FUSED, batch)
            if stored is not None:
                return stored
        return self.teacher.transferred(batch).tokens_BTD

    def _store_targets(self, sources: Mapping[str, ImageSource]) -> None:
        teacher, own = self.teacher, self.teacher.feature_cache
        cache = FeatureCache(cache_root() / "features", dtype="float16" if own is None else own.dtype)

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
                device=self.device,
            )
        self._stored = cache
