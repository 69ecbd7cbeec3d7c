"""MoVE-KD: several vision teachers distilled into one CLIP student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts import ExpertHub, FeatureCache, VisionExpert
from visexpert.language import LanguageSide, NoLanguage, Projector, supervised
from visexpert.language.projector import ProjectorKind
from visexpert.losses import router_balance, text_loss
from visexpert.losses.balance import RouterBalanceForm
from visexpert.losses.distill import Convention
from visexpert.methods.base import Method
from visexpert.methods.distillation import ANCHOR, STUDENT, Distillation, Distilled, TeacherWeighting, TokenWeighting
from visexpert.methods.optimiser import ParameterGroup
from visexpert.methods.start import start_from
from visexpert.resources import cache_root
from visexpert.store import StoreDtype
from visexpert.transfer import AdapterKind, Direction, TokenGate, make_kd_head
from visexpert.types import Batch, ExpertTokens, ImageSource, StepOutput, VisionTokens
from visexpert.vision import ClipEncoder, ClsAttention, collect_routing


class MoVEKD(Method):
    """MoVE-KD (arXiv 2501.01709, CVPR 2025): L = text_weight L_text + kd_weight L_kd + balance_weight L_bal.

    The student is a CLIP, plain or with MoLE (``clip.init_args.mole``). A frozen copy of it without MoLE gives [CLS]
    attention and is, as ``clip``, one of the teachers. At inference only the student and the language side remain.

    Defaults are what measured best in miniature, not the paper's; configs/movekd says the paper's forms by name.

    Args:
        clip: The student.
        experts: Frozen teachers by name, beside CLIP.
        language: Language side; :class:`~visexpert.language.NoLanguage` for distillation of the encoder alone.
        use: Names of the experts to use; null for all.
        anchor_share: Weight of CLIP among the teachers, 0 to 1 (paper: 0.8); null takes CLIP out of them.
        direction: ``to_student`` (paper: adapters carry teachers into the student's space and train with it),
            ``to_teacher`` (heads on the student predict standardised teacher tokens) or ``fixed`` (an orthogonal map).
        adapter: What is trained of it: ``released``, ``linear`` or ``mlp``; null takes the direction's own.
        adapter_hidden: Hidden width of ``mlp``.
        teacher_weighting: ``attention`` (paper), ``uniform``, or ``gate``: ToVE's gate on CLIP's tokens weighs the
            experts token by token; it is read from ``init_from`` (a run of ToVE with the same experts in the same
            order and a linear gate; the checkpoint keeps it) and frozen.
        token_weighting: ``attention`` (paper) or ``uniform``.
        convention: ``paper`` or ``released`` formulas of weights and loss.
        kd_weight: Weight of the distillation loss (paper: 0.5).
        text_weight: Weight of the text's loss; 0 with NoLanguage.
        balance_weight: Weight of the routers' balance loss, where there is MoLE (released code: 0.01).
        balance_form: ``pooled`` (released) or ``per_layer``.
        projector: Student tokens to the language width: ``linear``, ``mlp2x_gelu`` (paper) or ``identity``. Without a
            language side the student's own tokens are handed on, and probed.
        projector_norm: LayerNorm before it.
        clip_lr: Peak learning rate of the student's own weights; 0 trains MoLE alone (the paper's first stage).
        mole_lr: Of MoLE; null is ``lr``.
        feature_cache: As in :class:`~visexpert.methods.ToVE`; caches the experts, not the student.
        feature_dtype: ``float16`` or ``float32``.
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
        anchor_share: float | None = 0.3,
        direction: Literal["to_student", "to_teacher", "fixed"] = "to_teacher",
        adapter: AdapterKind | None = None,
        adapter_hidden: int | None = None,
        teacher_weighting: TeacherWeighting = "uniform",
        token_weighting: TokenWeighting = "uniform",
        convention: Convention = "paper",
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
        caption_images: int = 500,
        meteor: bool | None = None,
    ) -> None:
        super().__init__(
            language=language, lr=lr, language_lr=language_lr if text_weight > 0 else 0.0,
            language_frozen_steps=language_frozen_steps, weight_decay=weight_decay, warmup_steps=warmup_steps,
            caption_images=caption_images, meteor=meteor,
        )  # fmt: skip
        self._check_weights(kd_weight=kd_weight, text_weight=text_weight, balance_weight=balance_weight)
        self.clip = clip
        self.hub = ExpertHub({name: expert for name, expert in experts.items() if use is None or name in use})
        if unknown := [name for name in use or () if name not in experts]:
            raise ConfigError(f"MoVEKD: use names {unknown}, which are not among the experts {sorted(experts)}.")
        self.teacher_names = ((ANCHOR,) if anchor_share is not None else ()) + self.hub.names
        if not self.teacher_names or {ANCHOR, STUDENT} & set(self.hub.names):
            raise ConfigError(
                f"MoVEKD: teachers {list(self.teacher_names)} cannot be: there must be at least one, and {ANCHOR!r} "
                f"and {STUDENT!r} are names of our own; rename the expert."
            )
        self.projector = (
            Projector(in_dim=clip.width, out_dim=language.width, kind=projector, norm=projector_norm)
            if self.reads_text
            else Projector(in_dim=clip.width, out_dim=clip.width, kind="identity")
        )
        self.distillation = Distillation(
            {name: self._head(name, direction, adapter, adapter_hidden) for name in self.teacher_names},
            teacher_weighting=teacher_weighting, token_weighting=token_weighting, convention=convention,
            anchor_share=0.0 if anchor_share is None else anchor_share,
        )  # fmt: skip
        self.gate = None
        if teacher_weighting == "gate":
            self.gate = TokenGate(dim=clip.width, num_experts=len(self.hub.names)).requires_grad_(False)
        attends = "attention" in (teacher_weighting, token_weighting)
        self.anchor = clip.plain_copy() if attends or self.gate is not None or anchor_share is not None else None
        self.kd_weight, self.text_weight, self.balance_weight = kd_weight, text_weight, balance_weight
        self.balance_form: RouterBalanceForm = balance_form
        self.clip_lr, self.mole_lr = clip_lr, lr if mole_lr is None else mole_lr
        self.init_from, self.init_complete = init_from, init_complete
        folder = cache_root() / "features" if feature_cache == "auto" else feature_cache
        self._cache = None if folder is None else FeatureCache(folder, dtype=feature_dtype)

    def encode(self, batch: Batch) -> VisionTokens:
        """What the student gives the language side: (B, T, d_lang), or (B, T, D) without one. No teacher is run."""
        tokens: VisionTokens = self.clip(batch.unit_images())
        return VisionTokens(self.projector(tokens.tokens_BTD), tokens.grid_hw, cls_BD=tokens.cls_BD)

    def step(self, batch: Batch) -> StepOutput:
        """Student -> text; teachers -> distillation; routers -> balance."""
        images_BCHW = batch.unit_images()
        with collect_routing(self.clip) as routing:
            student: VisionTokens = self.clip(images_BCHW)
        loss, parts = student.tokens_BTD.new_zeros(()), {}
        if self.text_weight > 0:
            parts["text_loss"] = self._text_loss(student, batch)
            loss = loss + self.text_weight * parts["text_loss"]
        if self.kd_weight > 0:
            distilled = self._distil(student.tokens_BTD, images_BCHW, batch)
            parts |= {"kd_loss": distilled.loss, **distilled.watched}
            loss = loss + self.kd_weight * distilled.loss
        else:
            parts |= self.distillation.watch({STUDENT: student.tokens_BTD}, has_image_B=batch.has_image_B)
        record = routing.record()
        if record is not None and self.balance_weight > 0:
            parts["balance_loss"] = router_balance(
                record.probs_LBNE, record.choice_LBN, self.balance_form, has_image_B=batch.has_image_B
            )
            loss = loss + self.balance_weight * parts["balance_loss"]
        return StepOutput(loss, parts, len(batch))

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
        mole = tuple(part for layer in self.clip.mole_layers() for part in self._learning(layer))
        groups = [
            ParameterGroup("fusion", tuple(fusion), self.lr),
            ParameterGroup("clip", self.clip.plain_modules(), self.clip_lr),
            ParameterGroup("mole", mole, self.mole_lr),
        ]
        if self.text_weight > 0:
            groups.append(ParameterGroup("language", (self.language,), self.language_lr))
        return [group for group in groups if group.lr > 0 and any(list(m.parameters()) for m in group.modules)]

    def setup(self, stage: str) -> None:
        """Also leave out of the gradient whatever no group trains (DDP wants it so).

        Raises:
            ConfigError: A fit that must start from another run, which is not named.
        """
        if stage == "fit" and not self._loaded and self.init_from is None:
            self._check_start()
        super().setup(stage)
        trained = {id(p) for group in self.trained_groups() for m in group.modules for p in m.parameters()}
        for part in (self.clip, self.distillation, self.projector):
            for parameter in part.parameters():
                parameter.requires_grad_(id(parameter) in trained)

    def load_weights(self) -> None:
        """Student, its frozen copy, teachers, language side; then ``init_from``."""
        self.clip.load_weights()
        if self.anchor is not None:
            self.anchor.load_weights()
        self.hub.load_weights()
        self.language.load_weights()
        if self.init_from is not None:
            keys = start_from(
                self, self.init_from, complete=self.init_complete, ignore=tuple(self.frozen_modules()),
                need=("gate",) if self.gate is not None else (),
            )  # fmt: skip
            self._check_gate(keys)
            if not self.init_complete:
                self.distillation.forget_start()  # another stage goes on from its start, another run does not

    def on_fit_start(self) -> None:
        """Fill or open the feature cache of the experts."""
        if self._cache is not None and self.kd_weight > 0:
            self.read_features(
                self._cache, self.image_sources(wanted_by="feature_cache needs; set it to null to run encoders live")
            )

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read the experts' tokens of these images from the store from now on."""
        self._cache = cache
        self.hub.use_cache(cache, sources, resample={})

    def _check_start(self) -> None:
        if self.gate is not None:
            raise ConfigError(
                "MoVEKD: teacher_weighting='gate' reads the gate of a ToVE run; name its checkpoint by init_from."
            )
        if self.init_complete:
            raise ConfigError("MoVEKD: init_complete is set, but there is no start; name a checkpoint by init_from.")

    def _check_gate(self, keys: Sequence[str]) -> None:
        """The gate's columns have no names: compare those of what the other run had for each of its experts."""
        parts = [key.removeprefix("distillation.").split(".") for key in keys]
        owners = [part[1] for part in parts if part[0] in ("adapters", "heads") and part[1] != ANCHOR]
        names = tuple(dict.fromkeys(owners))
        if self.gate is not None and names and names != self.hub.names:
            raise ConfigError(
                f"MoVEKD: the gate in {self.init_from} weighs {list(names)}, the teachers here are "
                f"{list(self.hub.names)}; name the same experts in the same order."
            )

    def _text_loss(self, student: VisionTokens, batch: Batch) -> Tensor:
        if not self.reads_text or batch.text is None:
            raise ConfigError("MoVEKD: text_weight is above 0, but there is no text or no language side; set it to 0.")
        vision = VisionTokens(self.projector(student.tokens_BTD), student.grid_hw)
        targets_M, _ = supervised(batch.text)
        return text_loss(self.language(vision, batch.text), targets_M)

    def _distil(self, student_BTD: Tensor, images_BCHW: Tensor, batch: Batch) -> Distilled:
        clip, gates_BTK = None, None
        teachers: dict[str, ExpertTokens] = {}
        if self.anchor is not None:
            with torch.no_grad():
                clip = ClsAttention.of(self.anchor, images_BCHW)
                if self.gate is not None:
                    everything_K = torch.ones(len(self.hub.names), dtype=torch.bool, device=images_BCHW.device)
                    gates_BTK = self.gate(clip.tokens.tokens_BTD, everything_K).gates_BTK
            teachers[ANCHOR] = ExpertTokens(clip.tokens.tokens_BTD, clip.tokens.grid_hw)
        teachers |= self.hub(images_BCHW, index_B=batch.index_B, split=batch.split)
        distilled: Distilled = self.distillation(
            student_BTD, teachers, clip, gates_BTK=gates_BTK, has_image_B=batch.has_image_B
        )
        return distilled

    def _head(self, name: str, direction: Direction, adapter: AdapterKind | None, hidden: int | None) -> nn.Module:
        sizes = {"clip_width": self.clip.width, "clip_grid": self.clip.grid_hw}
        if name == ANCHOR:
            return make_kd_head(name, ClipTeacher(self.clip.width, self.clip.grid_hw), direction="raw", **sizes)  # type: ignore[arg-type]
        return make_kd_head(
            name,
            self.hub[name],
            direction=direction,
            adapter=adapter,
            hidden_dim=hidden,
            **sizes,  # type: ignore[arg-type]
        )

    def _learning(self, layer: nn.Module) -> list[nn.Module]:
        """What of a MoLE layer has a gradient: a router that only balance teaches has none without it."""
        router, *experts = layer.added_modules()  # type: ignore[operator]
        return [router, *experts] if self.balance_weight > 0 or layer.router_learns else experts

    def _check_weights(self, **weights: float) -> None:
        wrong = {name: value for name, value in weights.items() if value < 0}
        if wrong or weights["kd_weight"] + weights["text_weight"] == 0:
            raise ConfigError(f"MoVEKD: weights {weights} must not be negative, and text or kd must have one above 0.")
        if weights["text_weight"] > 0 and isinstance(self.language, NoLanguage):
            raise ConfigError("MoVEKD: NoLanguage reads no text; set text_weight to 0.")


@dataclass(frozen=True)
class ClipTeacher:
    """Sizes of the frozen CLIP as a teacher.

    Args:
        token_dim: Its width.
        grid_hw: Its grid.
    """

    token_dim: int
    grid_hw: tuple[int, int]
