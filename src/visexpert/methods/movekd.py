"""MoVE-KD: several vision teachers distilled into one CLIP student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from visexpert.errors import ConfigError, DataError, require_numbers
from visexpert.experts import ExpertHub, FeatureCache, VisionExpert
from visexpert.io.weights import cache_root
from visexpert.language import LanguageSide, Projector
from visexpert.language.projector import ProjectorKind
from visexpert.losses.balance import RouterBalanceForm
from visexpert.losses.distill import Convention
from visexpert.methods.base import Method
from visexpert.methods.columns import Columns
from visexpert.methods.distillation import Distillation, Distilled, TeacherWeighting, TokenWeighting
from visexpert.methods.finite import OnNan
from visexpert.methods.optimiser import ParameterGroup
from visexpert.methods.seen import Compared, RouterBalance, Seen
from visexpert.methods.start import start_from
from visexpert.methods.student import check_weights, mole_parts
from visexpert.methods.teachers import HeadSettings, ask_teachers, kd_heads, store_anchor
from visexpert.methods.views import EncoderViews, view_encoders
from visexpert.names import CLIP, STUDENT
from visexpert.store import StoreDtype
from visexpert.transfer import AdapterKind, TokenGate
from visexpert.types import Batch, ImageSource, LossTerm, VisionTokens
from visexpert.vision import ClipEncoder


class MoVEKD(Method):
    """MoVE-KD (arXiv 2501.01709, CVPR 2025): L = text_weight L_text + kd_weight L_kd + balance_weight L_bal.

    The student is a CLIP, plain or with MoLE (``clip.init_args.mole``). A frozen copy of it without MoLE gives [CLS]
    attention and is, as ``clip``, one of the teachers. At inference only the student and the language side remain.

    Defaults are what measured best in miniature (docs/results/movekd-tabletop.md), not the paper's; configs/movekd says
    the paper's forms by name.

    Args:
        clip: The student.
        experts: Frozen teachers by name, beside CLIP.
        language: Language side; :class:`~visexpert.language.NoLanguage` for distillation of the encoder alone.
        use: Names of the experts to use; null for all.
        anchor_share: Weight of CLIP among the teachers, 0 to 1 (paper: 0.8); null takes CLIP out of them.
        direction: ``to_student`` (paper: adapters carry teachers into the student's space and train with it),
            ``to_teacher`` (heads on the student predict standardised teacher tokens) or ``fixed`` (an orthogonal map
            of each standardised teacher; with a weak CLIP teacher level with heads, and nothing to train).
        adapter: What is trained of it: ``released``, ``linear`` or ``mlp``; null takes the direction's own.
        adapter_hidden: Hidden width of ``mlp``.
        teacher_weighting: ``attention`` (paper), ``uniform``, or ``gate``: ToVE's gate on CLIP's tokens weighs the
            experts token by token; it is read from ``init_from`` (a run of ToVE with these experts, in any order and
            perhaps with others, and a linear gate; the checkpoint keeps it) and frozen.
        token_weighting: ``attention`` (paper) or ``uniform``.
        convention: ``paper`` or ``released`` formulas of weights and loss.
        detach_weights: Keep the loss from training adapters to shift the weights of teachers; the released code does
            not.
        kd_weight: Weight of the distillation loss (paper: 0.5).
        text_weight: Weight of the text's loss; 0 with NoLanguage.
        balance_weight: Weight of the routers' balance loss, where there is MoLE (released code: 0.01).
        balance_form: ``pooled`` (released) or ``per_layer``.
        projector: Student tokens to the language width: ``linear``, ``mlp2x_gelu`` (paper) or ``identity``. Without a
            language side the student's own tokens are handed on, and probed.
        projector_norm: LayerNorm before it.
        clip_lr: Peak learning rate of the student's own weights; 0 trains MoLE alone (the paper's first stage).
        mole_lr: Of MoLE; null is ``lr``.
        feature_cache: As in :class:`~visexpert.methods.ToVE`; keeps the teachers,
            the frozen CLIP among them, not the student.
        feature_dtype: ``float16``, ``bfloat16`` or ``float32``.
        init_from: Checkpoint of an earlier run to start from, e.g. the first stage's.
        init_complete: Refuse a start that leaves any of the model's trained parts fresh, or has parts of another.
        kwargs: See :class:`~visexpert.methods.base.Method`; ``lr`` is that of adapters, heads and projector.
    """

    def __init__(
        self,
        *,
        clip: ClipEncoder,
        experts: dict[str, VisionExpert],
        language: LanguageSide,
        use: list[str] | None = None,
        anchor_share: float | None = 0.1,
        direction: Literal["to_student", "to_teacher", "fixed"] = "fixed",
        adapter: AdapterKind | None = None,
        adapter_hidden: int | None = None,
        teacher_weighting: TeacherWeighting = "uniform",
        token_weighting: TokenWeighting = "attention",
        convention: Convention = "paper",
        detach_weights: bool = True,
        kd_weight: float = 0.5,
        text_weight: float = 1.0,
        balance_weight: float = 0.01,
        balance_form: RouterBalanceForm = "pooled",
        projector: ProjectorKind = "linear",
        projector_norm: bool = True,
        clip_lr: float = 1e-3,
        mole_lr: float | None = None,
        feature_cache: str | None = None,
        feature_dtype: StoreDtype = "float16",
        init_from: str | None = None,
        init_complete: bool = False,
        lr: float = 2e-3,
        language_lr: float = 2e-3,
        language_frozen_steps: int = 0,
        weight_decay: float = 0.02,
        warmup_steps: int = 100,
        betas: tuple[float, float] = (0.9, 0.98),
        caption_images: int | None = None,
        meteor: bool | None = None,
        on_nan: OnNan = "stop",
    ) -> None:
        super().__init__(
            language=language, lr=lr, language_lr=language_lr if text_weight > 0 else 0.0,
            language_frozen_steps=language_frozen_steps, weight_decay=weight_decay, warmup_steps=warmup_steps,
            betas=betas, caption_images=caption_images, meteor=meteor, on_nan=on_nan,
        )  # fmt: skip
        require_numbers("MoVEKD", least=0, clip_lr=clip_lr, mole_lr=mole_lr)
        require_numbers("MoVEKD", least=1, adapter_hidden=adapter_hidden)
        check_weights(language, kd_weight=kd_weight, text_weight=text_weight, balance_weight=balance_weight)
        self.clip = clip
        self.hub = ExpertHub.chosen(experts, use, owner="MoVEKD")
        self.projector = (
            Projector(in_dim=clip.width, out_dim=language.width, kind=projector, norm=projector_norm)
            if self.reads_text
            else Projector(in_dim=clip.width, out_dim=clip.width, kind="identity")
        )
        heads = kd_heads(
            clip, self.hub, HeadSettings(direction, adapter, adapter_hidden), with_anchor=anchor_share is not None,
            cls_weighs=teacher_weighting == "attention",
        )  # fmt: skip
        self.teacher_names = tuple(heads)
        self.distillation = Distillation(
            heads, teacher_weighting=teacher_weighting, token_weighting=token_weighting, convention=convention,
            anchor_share=0.0 if anchor_share is None else anchor_share, detach_weights=detach_weights,
        )  # fmt: skip
        self.gate = None
        if teacher_weighting == "gate":
            self.gate = TokenGate(dim=clip.width, num_experts=len(self.hub.names)).requires_grad_(False)
        attends = "attention" in (teacher_weighting, token_weighting)
        self.anchor = clip.plain_copy() if attends or self.gate is not None or anchor_share is not None else None
        self.kd_weight, self.text_weight, self.balance_weight = kd_weight, text_weight, balance_weight
        if self.balance_weight == 0 and clip.routed_blocks_behind():
            raise ConfigError(
                "MoVEKD: clip's mole.layers name blocks behind the tokens, which only balance_weight reaches, and it "
                "is 0; raise it, or leave layers out."
            )
        self.balance_form: RouterBalanceForm = balance_form
        self.clip_lr, self.mole_lr = clip_lr, lr if mole_lr is None else mole_lr
        self.init_from, self.init_complete = init_from, init_complete
        folder = cache_root() / "features" if feature_cache == "auto" else feature_cache
        self._cache = None if folder is None else FeatureCache(folder, dtype=feature_dtype)

    def view_tokens(self, batch: Batch) -> VisionTokens:
        """What the student makes of images: (B, T, D). No teacher is run."""
        tokens: VisionTokens = self.clip(batch.unit_images())
        return tokens

    def compare(self, seen: Seen) -> Compared:
        """Distillation, of whole images only: teachers know no tiles."""
        if self.kd_weight == 0:
            sides = {STUDENT: seen.whole.tokens_BTD}
            return Compared({}, self.distillation.watch(sides, has_image_B=seen.batch.has_image_B))
        distilled = self._distil(seen)
        return Compared({"kd_loss": LossTerm(distilled.loss, "image", self.kd_weight)}, distilled.watched)

    def compare_in_validation(self, seen: Seen) -> None:
        """How far the student is from its teachers."""
        if self.kd_weight > 0:
            distilled = self._distil(seen)
            found = {"kd_loss": distilled.loss, **{f"kd/{name}": value for name, value in distilled.distances.items()}}
            self.evaluators["val"].add_means(found, images=seen.batch.counts()["image"])

    @property
    def router_balance(self) -> RouterBalance | None:
        """Where there is MoLE; see ``balance_weight``."""
        return RouterBalance(self.balance_weight, self.balance_form) if self.balance_weight > 0 else None

    def views(self, batch: Batch) -> EncoderViews:
        """[CLS] attention of CLIP, where it is kept, and of the student; what its routers choose."""
        encoders = {} if self.anchor is None else {CLIP: self.anchor}
        return view_encoders({**encoders, STUDENT: self.clip}, batch, student=STUDENT)

    def columns(self) -> Columns:
        """The hub's experts, in the order of the columns of a gate, which is frozen."""
        return Columns.of(self.hub.names, self.gate, fixed=True)

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Teachers: the hub, and the copy of CLIP."""
        return {"hub": self.hub} if self.anchor is None else {"hub": self.hub, "anchor": self.anchor}

    def unused_modules(self) -> Sequence[nn.Module]:
        """All that only distillation needs."""
        return [part for part in (self.hub, self.anchor, self.distillation, self.gate) if part is not None]

    def trained_groups(self) -> Sequence[ParameterGroup]:
        """Heads and projector; the student's own weights; MoLE; the language side. A rate of 0 leaves a group out."""
        fusion: list[nn.Module] = [self.distillation.heads] if self.kd_weight > 0 else []
        fusion += [self.projector] if self.text_weight > 0 else []
        groups = [
            ParameterGroup("fusion", tuple(fusion), self.lr),
            ParameterGroup("clip", self.clip.plain_modules(balanced=self.balance_weight > 0), self.clip_lr),
            ParameterGroup("mole", mole_parts(self.clip, balanced=self.balance_weight > 0), self.mole_lr),
        ]
        if self.text_weight > 0:
            groups.append(ParameterGroup("language", self.language.trained_modules(), self.language_lr))
        return [group for group in groups if group.lr > 0 and any(list(m.parameters()) for m in group.modules)]

    def load_weights(self) -> None:
        """Student, its frozen copy, teachers, language side; then ``init_from``."""
        self.clip.load_weights()
        if self.anchor is not None:
            self.anchor.load_weights()
        self.hub.load_weights()
        self.language.load_weights()
        if self.init_from is not None:
            brought = ("language",) if self.language.has_source else ()  # left out by a stage that froze it
            start_from(
                self, self.init_from, complete=self.init_complete, ignore=(*self.frozen_modules(), *brought),
                need=("gate",) if self.gate is not None else (),
            )  # fmt: skip
            if not self.init_complete:
                self.distillation.forget_start()  # another stage goes on from its start, another run does not

    def check_start(self) -> None:
        """Refuse a fit that must start from another run, which is not named or not there.

        Raises:
            ConfigError: It is not named.
            WeightsError: It is not there.
        """
        if self.init_from is None and self.gate is not None:
            raise ConfigError(
                "MoVEKD: teacher_weighting='gate' reads the gate of a ToVE run; name its checkpoint by init_from."
            )
        if self.init_from is None and self.init_complete:
            raise ConfigError("MoVEKD: init_complete is set, but there is no start; name a checkpoint by init_from.")
        super().check_start()

    def on_fit_start(self) -> None:
        """Fill or open the feature cache of the teachers."""
        if self._cache is not None and self.kd_weight > 0:
            self.read_features(
                self._cache, self.image_sources(wanted_by="feature_cache needs; set it to null to run encoders live")
            )

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read the teachers' tokens of these images from the store from now on."""
        self._cache = cache
        self.hub.use_cache(cache, sources, resample={})
        if self.anchor is not None:
            store_anchor(self.anchor, cache, sources)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """As every method; where the loss is not finite because a teacher's tokens are not, say so."""
        try:
            super().on_before_optimizer_step(optimizer)
        except DataError:
            self.distillation.check_finite()
            raise

    def on_train_end(self) -> None:
        """The last steps, too, were with finite teachers."""
        self.distillation.check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every method, once it is clear that no teacher has spoilt the weights."""
        self.distillation.check_finite()
        super().on_save_checkpoint(checkpoint)

    def _distil(self, seen: Seen) -> Distilled:
        batch = seen.batch
        lesson = ask_teachers(self.hub, self.anchor, self.gate, batch, cache=self._cache)
        distilled: Distilled = self.distillation(
            seen.whole.tokens_BTD, lesson.teachers, lesson.clip, gates_BTK=lesson.gates_BTK,
            has_image_B=batch.has_image_B,
        )  # fmt: skip
        return distilled
