"""MoVE-KD: several vision teachers distilled into one CLIP student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from visexpert.errors import ConfigError, DataError
from visexpert.experts import ExpertHub, FeatureCache, VisionExpert
from visexpert.language import LanguageModel, NoLanguage, Projector
from visexpert.language.base import ProjectorSettings
from visexpert.losses.terms import RouterBalanceForm
from visexpert.methods.base import Method
from visexpert.methods.columns import Columns
from visexpert.methods.movekd.distillation import Distillation, Distilled
from visexpert.methods.movekd.heads import kd_heads, run_teachers, store_anchor, stored_anchor
from visexpert.methods.parts import Part, StoredTokens
from visexpert.methods.settings import (
    EvaluationSettings,
    HeadSettings,
    MoVEKDOptimizer,
    StoreSettings,
    WeightingSettings,
    require_words,
)
from visexpert.methods.start import start_from
from visexpert.methods.step import Compared, LossTerm, RouterBalance, Seen
from visexpert.methods.views import EncoderViews, view_encoders
from visexpert.names import CLIP, STUDENT
from visexpert.optim import ParameterGroup
from visexpert.transfer import TokenGate
from visexpert.types import Batch, ImageSource, VisionTokens, imaged
from visexpert.vision import ClipEncoder

FROZEN_CLIP_PART = "frozen CLIP"


class MoVEKD(Method):
    """MoVE-KD (arXiv 2501.01709, CVPR 2025): L = lm_weight L_text + kd_weight L_kd + balance_weight L_bal.

    The student is a CLIP, plain or with MoLE (``clip.init_args.mole``). A frozen copy of it without MoLE gives [CLS]
    attention and is, as ``clip``, one of the teachers. At inference only the student and the language model remain.

    The defaults are those that score best on Tabletop (docs/results/movekd-tabletop.md), not the paper's, which
    configs/movekd names.

    Args:
        clip: The student.
        experts: Frozen teachers by name, besides CLIP.
        language: Language model; :class:`~visexpert.language.NoLanguage` for distillation of the encoder alone.
        use: Names of the experts to use; null for all.
        heads: How the student is compared with each expert.
        weighting: How teachers and tokens are weighed.
        kd_weight: Weight of the distillation loss (paper: 0.5).
        lm_weight: Weight of the text loss; 0 with NoLanguage.
        balance_weight: Weight of the routers' balance loss, with MoLE (released code: 0.01).
        balance_form: ``pooled`` (released) or ``per_layer``.
        projector: Maps student tokens to the language width. Without a language model the student's own tokens are
            passed on and probed.
        store: Tokens on disk of the teachers, including the frozen CLIP, not of the student.
        init_from: Checkpoint of an earlier run to start from, e.g. the first stage's.
        init_complete: Refuse a start with missing or unexpected parts.
        optimizer: Rates and schedule.
        evaluation: What to score besides the loss and the answers.
    """

    def __init__(
        self,
        *,
        clip: ClipEncoder,
        experts: dict[str, VisionExpert],
        language: LanguageModel,
        use: list[str] | None = None,
        heads: HeadSettings = HeadSettings(),
        weighting: WeightingSettings = WeightingSettings(),
        kd_weight: float = 0.5,
        lm_weight: float = 1.0,
        balance_weight: float = 0.01,
        balance_form: RouterBalanceForm = "pooled",
        projector: ProjectorSettings = ProjectorSettings(),
        store: StoreSettings = StoreSettings(),
        init_from: str | None = None,
        init_complete: bool = False,
        optimizer: MoVEKDOptimizer = MoVEKDOptimizer(),
        evaluation: EvaluationSettings = EvaluationSettings(),
    ) -> None:
        if lm_weight == 0:
            optimizer = replace(optimizer, language_lr=0.0)
        super().__init__(
            clip=clip,
            projector=Projector(in_dim=clip.width, out_dim=clip.width, kind="identity")
            if isinstance(language, NoLanguage)
            else Projector(in_dim=clip.width, out_dim=language.width, **vars(projector)),
            language=language,
            hub=ExpertHub.chosen(experts, use, owner="MoVEKD"),
            optimizer=optimizer,
            evaluation=evaluation,
        )
        require_words("MoVEKD", balance_form=(balance_form, RouterBalanceForm))
        check_weights(language, kd_weight=kd_weight, lm_weight=lm_weight, balance_weight=balance_weight)
        share = weighting.clip_teacher_weight
        made = kd_heads(
            clip, self.hub, heads, with_anchor=share is not None, cls_weighs=weighting.teachers == "attention"
        )
        self.teacher_names = tuple(made)
        self.distillation = Distillation(made, weighting)
        self.gate = None
        if weighting.teachers == "gate":
            self.gate = TokenGate(dim=clip.width, num_experts=len(self.hub.names)).requires_grad_(False)
        attends = "attention" in (weighting.teachers, weighting.tokens)
        self.anchor = clip.plain_copy() if attends or self.gate is not None or share is not None else None
        self.kd_weight, self.lm_weight, self.balance_weight = kd_weight, lm_weight, balance_weight
        if self.balance_weight == 0 and clip.routed_blocks_behind():
            raise ConfigError(
                "MoVEKD: clip's mole.layers name blocks behind the tokens, which only balance_weight reaches, and it "
                "is 0; raise it, or leave layers out."
            )
        self.balance_form: RouterBalanceForm = balance_form
        self.router_balance = RouterBalance(balance_weight, balance_form) if balance_weight > 0 else None
        self.clip_lr = optimizer.clip_lr
        self.mole_lr = optimizer.lr if optimizer.mole_lr is None else optimizer.mole_lr
        self.init_from, self.init_complete = init_from, init_complete
        self._cache = store.open()

    def view_tokens(self, batch: Batch) -> VisionTokens:
        """Return the student's tokens (B, T, D); no teacher runs."""
        tokens: VisionTokens = self.clip(batch.images_01())
        return tokens

    def compare(self, seen: Seen) -> Compared:
        """Return the distillation loss, over whole images only: teachers see no tiles."""
        if self.kd_weight == 0:
            tokens_BTD = seen.views.whole(seen.tokens).tokens_BTD
            return Compared({}, self.distillation.watch({STUDENT: imaged(tokens_BTD, seen.batch.has_image_B)}))
        distilled = self._distil(seen)
        return Compared({"kd_loss": LossTerm(distilled.loss, "image", self.kd_weight)}, distilled.watched)

    def compare_in_validation(self, seen: Seen) -> None:
        """Collect the distillation loss, and the distance to each teacher."""
        if self.kd_weight > 0:
            distilled = self._distil(seen)
            found = {"kd_loss": distilled.loss, **{f"kd/{name}": value for name, value in distilled.distances.items()}}
            self.evaluators["val"].add_means(found, images=seen.batch.counts()["image"])

    def views(self, batch: Batch) -> EncoderViews:
        """Return [CLS] attention of the frozen CLIP, if there is one, and attention and routing of the student."""
        encoders = {} if self.anchor is None else {CLIP: self.anchor}
        return view_encoders({**encoders, STUDENT: self.clip}, batch, student=STUDENT)

    def columns(self) -> Columns:
        """Return the hub's experts, in the order of the columns of the frozen gate."""
        return Columns.of(self.hub.names, self.gate, fixed=True)

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Return the teachers: the hub, and the copy of CLIP."""
        return {"hub": self.hub} if self.anchor is None else {"hub": self.hub, "anchor": self.anchor}

    def unused_modules(self) -> Sequence[nn.Module]:
        """Return the parts that only distillation needs."""
        return [part for part in (self.hub, self.anchor, self.distillation, self.gate) if part is not None]

    def own_parts(self) -> Sequence[Part]:
        """Return the frozen CLIP, the heads, and the gate that weights teachers."""
        teacher = [] if self.anchor is None else [Part.of(FROZEN_CLIP_PART, "teachers", self.anchor)]
        gate = [] if self.gate is None else [Part.of("gate", "transfer", self.gate)]
        return [*teacher, Part.of("KD heads", "transfer", self.distillation), *gate]

    def stored_tokens(self) -> Mapping[str, StoredTokens]:
        """Store teachers' tokens on their own grids, and CLIP's with [CLS] attention; nothing without distillation."""
        if self.kd_weight == 0:
            return {}
        clip = {} if self.anchor is None else {FROZEN_CLIP_PART: stored_anchor(self.anchor)}
        return clip | {
            f"expert {name}": StoredTokens(math.prod(expert.grid_hw), expert.token_dim)
            for name, expert in self.hub.attached_experts().items()
        }

    def trained_groups(self) -> Sequence[ParameterGroup]:
        """Return heads and projector, the student's own weights, MoLE, the language model; without groups of rate 0."""
        fusion: list[nn.Module] = [self.distillation.heads] if self.kd_weight > 0 else []
        fusion += [self.projector] if self.lm_weight > 0 else []
        groups = [
            ParameterGroup("fusion", tuple(fusion), self.lr),
            ParameterGroup("clip", self.clip.plain_modules(balanced=self.balance_weight > 0), self.clip_lr),
            ParameterGroup("mole", mole_parts(self.clip, balanced=self.balance_weight > 0), self.mole_lr),
        ]
        if self.lm_weight > 0:
            groups.append(ParameterGroup("language", self.language.trained_modules(), self.language_lr))
        return [group for group in groups if group.lr > 0 and any(list(m.parameters()) for m in group.modules)]

    def load_weights(self) -> None:
        """Load student, its frozen copy, teachers and language model, then ``init_from``."""
        self.clip.load_weights()
        if self.anchor is not None:
            self.anchor.load_weights()
        self.hub.load_weights()
        self.language.load_weights()
        if self.init_from is not None:
            brought = ("language",) if self.language.has_source else ()  # not in checkpoints of a stage that froze it
            start_from(
                self,
                self.init_from,
                complete=self.init_complete,
                ignore=(*self.frozen_modules(), *brought),
                need=("gate",) if self.gate is not None else (),
            )
            if not self.init_complete:
                self.distillation.forget_start()  # the next stage keeps its start, a new run does not

    def check_start(self) -> None:
        """Check that a fit that must start from another run has it.

        Raises:
            ConfigError: ``init_from`` is not set.
            WeightsError: The run has no checkpoint.
        """
        if self.init_from is None and self.gate is not None:
            raise ConfigError(
                "MoVEKD: weighting.teachers='gate' reads the gate of a ToVE run; name its checkpoint by init_from."
            )
        if self.init_from is None and self.init_complete:
            raise ConfigError("MoVEKD: init_complete needs a start; name a checkpoint with init_from.")
        super().check_start()

    def on_fit_start(self) -> None:
        """Fill or open the store of the teachers."""
        if self._cache is not None and self.kd_weight > 0:
            self.read_features(
                self._cache, self.image_sources(wanted_by="store.folder needs; set it to null to run encoders live")
            )

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read the teachers' tokens of these images from the store from now on."""
        self._cache = cache
        self.hub.use_cache(cache, sources, resample={})
        if self.anchor is not None:
            store_anchor(self.anchor, cache, sources)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check the gradients; if they are not finite because of a teacher's tokens, name the teacher."""
        try:
            super().on_before_optimizer_step(optimizer)
        except DataError:
            self.distillation.check_finite()
            raise

    def on_train_end(self) -> None:
        """Check that teachers were finite in the last steps, too."""
        self.distillation.check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that teachers were finite, then save as every method."""
        self.distillation.check_finite()
        super().on_save_checkpoint(checkpoint)

    def _distil(self, seen: Seen) -> Distilled:
        batch, whole = seen.batch, seen.views.whole(seen.tokens)
        lesson = run_teachers(self.hub, self.anchor, self.gate, batch, cache=self._cache)
        distilled: Distilled = self.distillation(
            whole.tokens_BTD,
            lesson.teachers,
            lesson.clip,
            gates_BTK=lesson.gates_BTK,
            has_image_B=batch.has_image_B,
        )
        return distilled


def check_weights(language: LanguageModel, **weights: float) -> None:
    """Check the weights of losses: ``kd_weight``, ``lm_weight``, ``balance_weight``.

    Raises:
        ConfigError: One is negative, text and distillation are both 0, or text has one without a language model.
    """
    wrong = {name: value for name, value in weights.items() if value < 0}
    if wrong or weights["kd_weight"] + weights["lm_weight"] == 0:
        raise ConfigError(f"MoVEKD: weights must be at least 0, and kd_weight or lm_weight above 0, got {weights}.")
    if weights["lm_weight"] > 0 and isinstance(language, NoLanguage):
        raise ConfigError("MoVEKD: NoLanguage reads no text; set lm_weight to 0.")


def mole_parts(clip: ClipEncoder, *, balanced: bool) -> tuple[nn.Module, ...]:
    """Return the parts of MoLE that get a gradient.

    Without a balance loss (``balanced``), a router that learns from it alone gets none, nor does anything behind the
    tokens. With it, the experts of the last block get none, since no router follows them.
    """
    behind = [block.get_submodule("mlp") for block in clip.routed_blocks_behind()]
    parts: list[nn.Module] = []
    for layer in clip.mole_layers():
        router, *experts = layer.added_modules()
        if layer in behind:
            parts += [router, *(() if layer is behind[-1] else experts)] if balanced else ()
        else:
            parts += [router, *experts] if balanced or layer.router_learns else experts
    return tuple(parts)
