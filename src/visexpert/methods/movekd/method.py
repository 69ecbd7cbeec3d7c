"""MoVE-KD: several vision teachers distilled into one CLIP student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from visexpert.errors import ConfigError, DataError
from visexpert.experts import ExpertHub, FeatureCache, VisionExpert
from visexpert.grids import resample_tokens
from visexpert.language import LanguageModel, NoLanguage, Projector
from visexpert.language.base import ProjectorSettings
from visexpert.losses import across_image_variances
from visexpert.methods.accumulation import batches_done
from visexpert.methods.base import Method
from visexpert.methods.columns import Columns
from visexpert.methods.movekd.agglomeration import Agglomeration
from visexpert.methods.movekd.distillation import Distillation, Distilled
from visexpert.methods.movekd.heads import (
    fit_standardization,
    kd_heads,
    run_teachers,
    store_anchor,
    stored_anchor,
    summary_widths,
)
from visexpert.methods.movekd.looks import Looks
from visexpert.methods.parts import Part, StoredTokens
from visexpert.methods.settings import (
    AgglomerationSettings,
    AuxiliarySettings,
    EvaluationSettings,
    HeadSettings,
    MoVEKDOptimizer,
    StoreSettings,
    WeightingSettings,
)
from visexpert.methods.start import start_from
from visexpert.methods.step import Compared, LossTerm, Seen
from visexpert.methods.views import EncoderViews, view_encoders
from visexpert.names import CLIP, STUDENT
from visexpert.optim import ParameterGroup
from visexpert.transfer import TokenGate
from visexpert.typed import typed
from visexpert.types import Batch, ImageSource, VisionTokens, imaged
from visexpert.vision import VisionEncoder

FROZEN_ENCODER_PART = "frozen encoder"


@typed
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
        weighting: How teachers and tokens are weighted.
        agglomeration: What is added to the error of each token, as agglomerative encoders do; by default nothing.
        kd_weight: Weight of the distillation loss (paper: 0.5).
        lm_weight: Weight of the text loss; 0 with NoLanguage.
        auxiliary: Losses besides text and distillation: the routers' balance loss, with MoLE, and the one that keeps
            the pooled output.
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
        clip: VisionEncoder,
        experts: dict[str, VisionExpert],
        language: LanguageModel,
        use: list[str] | None = None,
        heads: HeadSettings = HeadSettings(),
        weighting: WeightingSettings = WeightingSettings(),
        agglomeration: AgglomerationSettings = AgglomerationSettings(),
        kd_weight: float = 0.5,
        lm_weight: float = 1.0,
        auxiliary: AuxiliarySettings = AuxiliarySettings(),
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
            projector=projector_of(clip, language, projector),
            language=language,
            hub=ExpertHub.chosen(experts, use, owner="MoVEKD"),
            optimizer=optimizer,
            evaluation=evaluation,
        )
        check_weights(language, kd_weight=kd_weight, lm_weight=lm_weight)
        share = weighting.clip_teacher_weight
        made = kd_heads(
            clip, self.hub, heads, with_anchor=share is not None, cls_weighs=weighting.teachers == "attention"
        )
        self.teacher_names = tuple(made)
        kept_whole = {"lm_weight": lm_weight, "auxiliary.keep_pooled": auxiliary.keep_pooled}
        check_agglomeration(agglomeration, weighting)
        check_shift(agglomeration, heads, weighting, store, kept_whole=kept_whole)
        self.looks = Looks.of(clip, agglomeration)
        self._look = None if self.looks is None else self.looks.largest()
        extras = self._extras(agglomeration, with_anchor=share is not None, live=store.folder is None)
        self.distillation = Distillation(made, weighting, agglomeration=extras)
        self.gate = None
        if weighting.teachers == "gate":
            self.gate = TokenGate(dim=clip.width, num_experts=len(self.hub.names)).requires_grad_(False)
        attends = "attention" in (weighting.teachers, weighting.tokens)
        self.anchor = clip.plain_copy() if attends or self.gate is not None or share is not None else None
        self.kd_weight, self.lm_weight = kd_weight, lm_weight
        self.router_balance = auxiliary.router_balance
        if self.router_balance is None and clip.routed_blocks_behind():
            raise ConfigError(
                "MoVEKD: clip's mole.layers name blocks behind the tokens, which only auxiliary.balance_weight "
                "reaches, and it is 0; raise it, or leave layers out."
            )
        self.clip_lr = optimizer.clip_lr
        self.mole_lr = optimizer.lr if optimizer.mole_lr is None else optimizer.mole_lr
        self.init_from, self.init_complete = init_from, init_complete
        self._cache = store.open()
        self.keep_pooled(auxiliary.keep_pooled)

    def _extras(self, settings: AgglomerationSettings, *, with_anchor: bool, live: bool) -> Agglomeration | None:
        """Return what is added to the error of each token; let experts summarize images if their summary is compared.

        Args:
            settings: What is added.
            with_anchor: Whether CLIP is a teacher.
            live: Whether experts run in each step.
        """
        if not settings.adds:
            return None
        widths: dict[str, int] = {}
        if settings.summary > 0:
            widths = summary_widths(self.clip, self.hub, with_anchor=with_anchor, live=live)
            for name in (name for name in self.hub.names if name in widths):
                self.hub[name].summarizes = True
        return Agglomeration(
            self.teacher_names, settings, summary_widths=widths, student_width=self.clip.width, anchor=CLIP
        )

    def view_tokens(self, batch: Batch) -> VisionTokens:
        """Return the student's tokens (B, T, D); no teacher runs."""
        tokens: VisionTokens = self.clip(batch.images_01())
        return tokens

    def see(self, batch: Batch, *, watch_routers: bool = False) -> Seen:
        """Encode images; in training, at the size and in the crop that are drawn for the batch."""
        look = self._look
        if self.looks is None or look is None or not self.training:
            return super().see(batch, watch_routers=watch_routers)
        framed = self.looks.framed(batch)
        with self.clip.at_size(look.side):
            seen = super().see(self.looks.cropped(framed, look.student), watch_routers=watch_routers)
        return replace(seen, batch=framed)

    def compare(self, seen: Seen) -> Compared:
        """Return the distillation loss, over whole images only: teachers see no tiles."""
        if self.kd_weight == 0:
            tokens_BTD = imaged(seen.views.whole(seen.tokens).tokens_BTD, seen.batch.has_image_B)
            return Compared({}, self.distillation.watch(across_image_variances({STUDENT: tokens_BTD})))
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

    def frozen_encoder(self) -> VisionEncoder | None:
        """Return the student's start, which may be a teacher."""
        return super().frozen_encoder() if self.anchor is None else self.anchor

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Return the teachers: the hub, and the copy of CLIP."""
        return {"hub": self.hub} if self.anchor is None else {"hub": self.hub, "anchor": self.anchor}

    def unused_modules(self) -> Sequence[nn.Module]:
        """Return the parts that only distillation needs."""
        return [part for part in (self.hub, self.anchor, self.distillation, self.gate) if part is not None]

    def own_parts(self) -> Sequence[Part]:
        """Return the frozen CLIP, the heads, and the gate that weights teachers."""
        teacher = [] if self.anchor is None else [Part.of(FROZEN_ENCODER_PART, "teachers", self.anchor)]
        gate = [] if self.gate is None else [Part.of("gate", "transfer", self.gate)]
        return [*teacher, Part.of("KD heads", "transfer", self.distillation), *gate]

    def stored_tokens(self) -> Mapping[str, StoredTokens]:
        """Store teachers' tokens on their own grids, and CLIP's with [CLS] attention; nothing without distillation."""
        if self.kd_weight == 0:
            return {}
        clip = {} if self.anchor is None else {FROZEN_ENCODER_PART: stored_anchor(self.anchor)}
        return clip | {
            f"expert {name}": StoredTokens(math.prod(expert.grid_hw), expert.token_dim)
            for name, expert in self.hub.attached_experts().items()
        }

    def trained_groups(self) -> Sequence[ParameterGroup]:
        """Return heads and projector, the student's own weights, MoLE, the language model; without groups of rate 0."""
        fusion: list[nn.Module] = self.distillation.trained_modules() if self.kd_weight > 0 else []
        fusion += [self.projector] if self.lm_weight > 0 else []
        groups = [
            ParameterGroup("fusion", tuple(fusion), self.lr),
            ParameterGroup(
                "clip",
                self.clip.plain_modules(balanced=self.router_balance is not None, pooled=self.kept is not None),
                self.clip_lr,
            ),
            ParameterGroup("mole", mole_parts(self.clip, balanced=self.router_balance is not None), self.mole_lr),
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
        """Check that a fit that must start from another run names one.

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
        """Fill or open the store of the teachers; measure those whose standardization must not move during training."""
        if self._cache is not None and self.kd_weight > 0:
            self.read_features(
                self._cache, self.image_sources(wanted_by="store.folder needs; set it to null to run encoders live")
            )
        data = getattr(self.trainer, "datamodule", None)
        if self.kd_weight > 0 and data is not None and hasattr(data, "image_sources"):
            sources: Mapping[str, ImageSource] = data.image_sources()
            training = {split: source for split, source in sources.items() if split.split("/")[-1].startswith("train")}
            fit_standardization(self.distillation.kd_heads(), self.hub, training)

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read the teachers' tokens of these images from the store from now on."""
        self._cache = cache
        self.hub.use_cache(cache, sources, resample={})
        if self.anchor is not None:
            store_anchor(self.anchor, cache, sources)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed as every method does, and draw the size and crops of the batch."""
        super().on_train_batch_start(batch, batch_idx)
        if self.looks is not None and self._trainer is not None:
            self._look = self.looks.draw(self._run_seed(), batches_done(self.trainer))

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
        """Check that teachers were finite, then save as every method does."""
        self.distillation.check_finite()
        super().on_save_checkpoint(checkpoint)

    def _distil(self, seen: Seen) -> Distilled:
        batch, whole = seen.batch, seen.views.whole(seen.tokens)
        look = self._look if self.training else None
        if self.looks is not None and look is not None:
            batch = self.looks.cropped(batch, look.teachers)
        lesson = run_teachers(self.hub, self.anchor, self.gate, batch, cache=self._cache)
        tokens_BTD = whole.tokens_BTD
        if look is not None:
            tokens_BTD = resample_tokens(tokens_BTD, whole.grid_hw, self.clip.grid_hw)
        distilled: Distilled = self.distillation(
            tokens_BTD,
            lesson.teachers,
            lesson.clip,
            summary_BD=None if self.distillation.agglomeration is None else summary_of(whole),
            gates_BTK=lesson.gates_BTK,
            has_image_B=batch.has_image_B,
            look=look,
        )
        return distilled


def summary_of(tokens: VisionTokens) -> Tensor:
    """Return an encoder's summary (B, D): its [CLS] token, or the mean of its tokens if it has none."""
    return tokens.tokens_BTD.mean(1) if tokens.cls_BD is None else tokens.cls_BD


def check_agglomeration(agglomeration: AgglomerationSettings, weighting: WeightingSettings) -> None:
    """Check that agglomeration and weighting go together.

    Raises:
        ConfigError: They do not.
    """
    if agglomeration.adds and weighting.teachers == "gate":
        raise ConfigError(
            "MoVEKD: weighting.teachers='gate' weighs teachers token by token, but agglomeration weighs them image by "
            "image; use 'uniform' or 'attention', or leave agglomeration out."
        )


def projector_of(clip: VisionEncoder, language: LanguageModel, settings: ProjectorSettings) -> Projector:
    """Return what maps the student's tokens to the language width; without a language model they stay as they are."""
    if isinstance(language, NoLanguage):
        return Projector(in_dim=clip.width, out_dim=clip.width, kind="identity")
    return Projector(in_dim=clip.width, out_dim=language.width, **vars(settings))


def check_shift(
    agglomeration: AgglomerationSettings,
    heads: HeadSettings,
    weighting: WeightingSettings,
    store: StoreSettings,
    *,
    kept_whole: Mapping[str, float],
) -> None:
    """Check that what is compared can be shifted.

    Args:
        agglomeration: Its ``shift`` is the most patches between the crops.
        heads: How experts are compared.
        weighting: How teachers are weighted.
        store: Whether their tokens are stored.
        kept_whole: Weights, by name, of losses on whole images.

    Raises:
        ConfigError: It cannot.
    """
    if agglomeration.shift == 0:
        return
    wrong = {
        name: f"{name}={weight:g} needs whole images; set it to 0" for name, weight in kept_whole.items() if weight
    }
    if store.folder is not None:
        wrong["store"] = f"store.folder={store.folder!r} holds tokens of whole images; set it to null"
    if heads.alignment == "to_student" and heads.adapter in (None, "released"):
        wrong["adapter"] = "heads.adapter='released' is tied to the places of whole images; set it to linear or mlp"
    if weighting.teachers == "gate":
        wrong["gate"] = "weighting.teachers='gate' weighs the tokens of whole images; use 'uniform' or 'attention'"
    if wrong:
        raise ConfigError(
            f"MoVEKD: agglomeration.shift={agglomeration.shift} shows crops, but {' and '.join(wrong.values())}."
        )


def check_weights(language: LanguageModel, **weights: float) -> None:
    """Check the weights of losses: ``kd_weight``, ``lm_weight``.

    Raises:
        ConfigError: One is negative, text and distillation are both 0, or text has one without a language model.
    """
    wrong = {name: value for name, value in weights.items() if value < 0}
    if wrong or weights["kd_weight"] + weights["lm_weight"] == 0:
        raise ConfigError(f"MoVEKD: weights must be at least 0, and kd_weight or lm_weight above 0, got {weights}.")
    if weights["lm_weight"] > 0 and isinstance(language, NoLanguage):
        raise ConfigError("MoVEKD: NoLanguage reads no text; set lm_weight to 0.")


def mole_parts(clip: VisionEncoder, *, balanced: bool) -> tuple[nn.Module, ...]:
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
