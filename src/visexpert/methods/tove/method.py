"""ToVE: transfer the knowledge of a hub of frozen experts into frozen CLIP tokens, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError, require_numbers
from visexpert.experts import ExpertHub, FeatureCache, VisionExpert
from visexpert.io.weights import weights_digest
from visexpert.language import LanguageModel, Projector
from visexpert.language.base import ProjectorSettings
from visexpert.losses import gate_balance
from visexpert.methods.columns import Columns
from visexpert.methods.fusing import FusingMethod, FusionSpace
from visexpert.methods.parts import Part, StoredTokens
from visexpert.methods.settings import EvaluationSettings, StoreSettings, ToVEOptimizer, require_words
from visexpert.methods.step import Compared, LossTerm, Seen
from visexpert.names import CLIP, EncoderName
from visexpert.optim import ParameterGroup
from visexpert.transfer import GateOutput, GateSettings, ResidualTransfer, TokenAdapter, TokenGate
from visexpert.transfer.gate import TransferMode
from visexpert.typed import typed
from visexpert.types import Batch, ImageSource, VisionTokens, imaged
from visexpert.vision import MoLESettings, VisionEncoder

CLIP_TOKENS = EncoderName("clip", CLIP)


@typed
class ToVE(FusingMethod):
    """ToVE (arXiv 2504.00691, ICLR 2025): t_fuse = t_clip + sum_k g_k P_k(e_k), g = softmax of a gate on CLIP's token.

    CLIP and experts are frozen. At step 0 the model equals its CLIP-only twin (adapters end in zeros). With no expert
    attached it *is* CLIP-only. The paper's code was never released: options marked "unconfirmed" are our reading.

    Args:
        clip: The frozen CLIP.
        experts: Frozen experts by name.
        language: Language model.
        use: Names of the experts to use; the others are not built. Null for all, [] for CLIP only.
        detached: Names of used experts that start detached: built, but not loaded or run, and -inf in the gate.
        projector: CLIP tokens to the language width (its kind and norm are unconfirmed).
        adapter_hidden: Hidden width of each P_k; null for the width of the fused tokens (unconfirmed).
        fusion_space: ``language`` - fuse after the projector (paper); ``clip`` - before it.
        gate: Which experts each token listens to.
        transfer: ``residual`` (paper) or ``replacement`` (control: CLIP's own token is dropped).
        keep_pooled: Weight of the loss that keeps CLIP's pooled output while it trains, see
            :class:`~visexpert.methods.pooled.KeptPooled`.
        blind: Control: all vision tokens are zero, so only the text is left.
        store: Tokens of frozen encoders on disk.
        init_from: Checkpoint of an earlier run to start from. Experts are matched by name: those it lacks start fresh,
            those that only it has are left out.
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
        detached: list[str] | None = None,
        projector: ProjectorSettings = ProjectorSettings(),
        adapter_hidden: int | None = None,
        fusion_space: FusionSpace = "language",
        gate: GateSettings = GateSettings(),
        transfer: TransferMode = "residual",
        keep_pooled: float = 0.0,
        blind: bool = False,
        store: StoreSettings = StoreSettings(),
        init_from: str | None = None,
        optimizer: ToVEOptimizer = ToVEOptimizer(),
        evaluation: EvaluationSettings = EvaluationSettings(),
    ) -> None:
        super().__init__(
            clip=clip,
            projector=Projector(in_dim=clip.width, out_dim=language.width, **vars(projector)),
            language=language,
            hub=ExpertHub.chosen(experts, use, owner="ToVE", detached=detached or ()),
            optimizer=optimizer,
            evaluation=evaluation,
        )
        require_words("ToVE", fusion_space=(fusion_space, FusionSpace))
        require_numbers("ToVE", least=1, adapter_hidden=adapter_hidden)
        fused_width = language.width if fusion_space == "language" else clip.width
        self.adapters = nn.ModuleDict(
            {name: self._adapter(self.hub[name], fused_width, adapter_hidden, transfer) for name in self.hub.names}
        )
        self.gate = None
        if self.hub.names:
            self.gate = TokenGate(dim=clip.width, num_experts=len(self.hub.names), settings=gate)
        self.transfer = ResidualTransfer(mode=transfer)
        self.fusion_space: FusionSpace = fusion_space
        self.balance_weight, self.balance_form = gate.balance_weight, gate.balance_form
        self.gate_lr = optimizer.lr if optimizer.gate_lr is None else optimizer.gate_lr
        self.clip_lr = optimizer.clip_lr
        self.blind = blind
        self.init_from = init_from
        self._plain: dict[str, Any] = {
            "projector": projector,
            "fusion_space": fusion_space,
            "evaluation": evaluation,
        }
        if store.folder is not None and clip.reads_tiles:
            raise ConfigError(
                f"ToVE: store.folder={store.folder!r} holds tokens of whole images, but this CLIP reads images in "
                "tiles; set it to null."
            )
        self._cache = store.open()
        if keep_pooled > 0 and (optimizer.clip_lr == 0 or blind or not self._needs_clip):
            raise ConfigError(
                f"ToVE: keep_pooled={keep_pooled:g} has nothing to keep, since CLIP does not train (clip_lr="
                f"{optimizer.clip_lr:g}, blind={blind}) or is not read; set it to 0, or train CLIP."
            )
        self.keep_pooled(keep_pooled)

    def view_tokens(self, batch: Batch) -> VisionTokens:
        """Return tokens after the transfer, see :meth:`transferred`."""
        return self.transferred(batch)

    def to_language(self, tokens: VisionTokens) -> VisionTokens:
        """Project the tokens if they were fused before the projector; return zeros if blind."""
        if self.fusion_space == "clip":
            tokens = super().to_language(tokens)
        return VisionTokens(torch.zeros_like(tokens.tokens_BTD), tokens.grid_hw) if self.blind else tokens

    def transferred(self, batch: Batch) -> VisionTokens:
        """Return tokens after the transfer, in the fusion space, which merging teaches a CLIP to produce.

        (B, T, d_lang) if ``fusion_space`` is ``language``; otherwise (B, T, D), before the projector.
        """
        if not self._needs_clip:
            return self._experts_alone(batch)
        clip = self._clip_tokens(batch)
        base_BTD = clip.tokens_BTD if self.fusion_space == "clip" else self.projector(clip.tokens_BTD)
        if not self.hub.attached:
            return VisionTokens(base_BTD, clip.grid_hw)
        assert self.gate is not None
        adapted = self._adapted(batch)
        gate = self.gate(clip.tokens_BTD, self.hub.attached_mask)
        fused_BTD = self.transfer(base_BTD, adapted, gate.gates_BTK, self.hub.names)
        balance = self._balance(gate, batch.has_image_B)
        return VisionTokens(fused_BTD, clip.grid_hw, gates_BTK=gate.gates_BTK, balance=balance)

    def _balance(self, gate: GateOutput, has_image_B: Tensor | None) -> Tensor:
        """Return L_aux over samples with an image."""
        assert self.gate is not None
        gates_BTK = imaged(gate.gates_BTK, has_image_B)
        load_K = None if gate.load_BK is None else imaged(gate.load_BK, has_image_B).sum(0)
        return gate_balance(gates_BTK, gate.attached_K, self.balance_form, load_K=load_K, top_k=self.gate.top_k or 1)

    def compare(self, seen: Seen) -> Compared:
        """Return L_aux, if there is a gate."""
        balance = seen.tokens.balance
        if balance is None or self.blind:
            return Compared()
        return Compared({"balance_loss": LossTerm(balance, "image", self.balance_weight)})

    def columns(self) -> Columns:
        """Return the hub's experts, in the order of the gate's columns."""
        return Columns.of(self.hub.names, self.gate)

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Return the hub, and CLIP unless it has a learning rate."""
        return {"hub": self.hub} if self.clip_lr > 0 else {"clip": self.clip, "hub": self.hub}

    def drop_experts(self, names: Iterable[str]) -> None:
        """Remove experts for good, with their adapters and gate rows; the tokens are the same as with them detached.

        Raises:
            ConfigError: A name that is not in the hub.
        """
        gone = list(dict.fromkeys(names))
        for name in gone:
            self.hub[name]  # raises for an unknown name before anything is removed
        kept = [index for index, name in enumerate(self.hub.names) if name not in gone]
        for name in gone:
            self.hub.drop(name)
            del self.adapters[name]
        if self.gate is not None and kept:
            self.gate.keep(kept)
        elif not kept:
            self.gate = None

    def plain(
        self,
        clip: VisionEncoder,
        projector: Projector,
        language: LanguageModel,
        *,
        clip_lr: float,
        keep_pooled: float = 0.0,
    ) -> ToVE:
        """Build a ToVE without experts, with a trainable CLIP."""
        optimizer = ToVEOptimizer(clip_lr=clip_lr, on_nan=self.on_nan)
        model = ToVE(
            clip=clip, experts={}, language=language, optimizer=optimizer, keep_pooled=keep_pooled, **self._plain
        )
        model.projector = projector
        model.mark_loaded()
        return model

    def fusion_fingerprint(self) -> str:
        """Return a digest of encoders, projector, adapters and gate."""
        parts = [self.clip.fingerprint(), self.fusion_space, self.transfer.mode]
        parts += [f"{name}:{self.hub[name].fingerprint()}" for name in self.hub.attached]
        trained = nn.ModuleDict({"projector": self.projector, "adapters": self.adapters})
        if self.gate is not None:
            trained["gate"] = self.gate
        return weights_digest(trained, facts=repr(parts))

    def subset_modules(self) -> Sequence[nn.Module]:
        """Return CLIP, and each attached expert with its adapter."""
        experts = self.hub.attached
        return [self.clip, *(self.hub[name] for name in experts), *(self.adapters[name] for name in experts)]

    def detached_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments with the remaining experts, and the gate's current top_k."""
        top_k = None if self.gate is None else self.gate.top_k
        gate = {**(settings.get("gate") or {}), "top_k": top_k}
        return self._derived_config(settings, self.hub.names) | {"gate": gate}

    def merged_config(
        self, settings: Mapping[str, Any], *, clip_lr: float, mole: MoLESettings | None, keep_pooled: float = 0.0
    ) -> dict[str, Any]:
        """Return arguments without experts, with CLIP's learning rate and MoLE."""
        changed = self._derived_config(settings, ())
        changed["optimizer"] = {**(settings.get("optimizer") or {}), "clip_lr": clip_lr}
        if keep_pooled > 0:
            changed["keep_pooled"] = keep_pooled
        if mole is not None:
            clip = settings["clip"]
            changed["clip"] = {**clip, "init_args": {**(clip.get("init_args") or {}), "mole": asdict(mole)}}
        return changed

    def _derived_config(self, settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        experts = {name: settings["experts"][name] for name in names}
        return {**settings, "experts": experts, "use": None, "detached": None, "init_from": None}

    def rates(self) -> dict[str, float]:
        """Add the rates of gate and CLIP."""
        return {**super().rates(), "gate_lr": self.gate_lr, "clip_lr": self.clip_lr}

    def beside_clip(self) -> Sequence[str]:
        """Name ``blind: true``, if set."""
        return ["blind: true"] if self.blind else []

    def own_parts(self) -> Sequence[Part]:
        """Return the experts' adapters, and the gate."""
        parts = [Part.of("expert adapters", "transfer", self.adapters)]
        return parts if self.gate is None else [*parts, Part.of("gate", "transfer", self.gate)]

    stores_test_images = True

    def stored_tokens(self) -> Mapping[str, StoredTokens]:
        """Store tokens of CLIP, if frozen, and of attached experts, with features on CLIP's grid."""
        clip = {"encoder": StoredTokens(math.prod(self.clip.grid_hw), self.clip.width)} if self._stores_clip else {}
        grids = self._stored_grids()
        return clip | {
            f"expert {name}": StoredTokens(math.prod(grids.get(name, expert.grid_hw)), expert.token_dim)
            for name, expert in self.hub.attached_experts().items()
        }

    def unused_modules(self) -> Sequence[nn.Module]:
        """Return detached experts with their adapters, and CLIP if nothing reads its tokens."""
        gone = [name for name in self.hub.names if name not in self.hub.attached]
        unused: list[nn.Module] = [self.hub[name] for name in gone] + [self.adapters[name] for name in gone]
        if not self._needs_clip:
            unused += [self.clip] if self.fusion_space == "clip" else [self.clip, self.projector]
        return unused

    @property
    def _needs_clip(self) -> bool:
        """Whether anything depends on CLIP's tokens: the residual, or a gate with several experts."""
        alone = len(self.hub.attached) == 1 or (self.gate is not None and self.gate.kind == "uniform")
        return self.transfer.mode == "residual" or not alone or not self.hub.attached

    def trained_groups(self) -> Sequence[ParameterGroup]:
        """Return gate, adapters and projector, unless blind, and the language model, unless its rate is 0."""
        groups = [] if self.blind else self._vision_groups()
        if self.language_lr > 0:
            groups.append(ParameterGroup("language", self.language.trained_modules(), self.language_lr))
        return groups

    def _vision_groups(self) -> list[ParameterGroup]:
        unused = {id(module) for module in self.unused_modules()}
        fusion = [module for module in (self.projector, *self.adapters.values()) if id(module) not in unused]
        groups = [ParameterGroup("fusion", tuple(fusion), self.lr)]
        if self.gate is not None and self.hub.attached and self._needs_clip:
            groups.append(ParameterGroup("gate", (self.gate,), self.gate_lr))
        if self.clip_lr > 0 and self._needs_clip:
            behind = self.clip.pooled_modules() if self.kept is not None else ()
            groups.append(ParameterGroup("clip", (*self.clip.read_modules(), *behind), self.clip_lr))
        return groups

    def on_fit_start(self) -> None:
        """Fill or open the store for the training and validation images."""
        self._open_cache()

    def on_test_start(self) -> None:
        """Fill or open the store for the test images."""
        self._open_cache()

    def _open_cache(self) -> None:
        if self._cache is not None:
            self.read_features(
                self._cache, self.image_sources(wanted_by="store.folder needs; set it to null to run encoders live")
            )

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read CLIP's tokens, if it is frozen, and those of attached experts; see :meth:`Method.read_features`."""
        self._cache = cache
        for split, source in sources.items() if self._stores_clip else ():
            cache.prepare(
                CLIP_TOKENS,
                split,
                source,
                fingerprint=self.clip.fingerprint(),
                encode=lambda images: self.clip(images).tokens_BTD,
                grid_hw=self.clip.grid_hw,
                width=self.clip.width,
                device=self.device,
            )
        self.hub.use_cache(cache, sources, resample=self._stored_grids())

    @property
    def _stores_clip(self) -> bool:
        return self._needs_clip and self.clip_lr == 0

    def _stored_grids(self) -> dict[str, tuple[int, int]]:
        """Return the grid of stored features, which is CLIP's; maps are stored on their own."""
        experts = self.hub.attached_experts()
        return {name: self.clip.grid_hw for name, expert in experts.items() if expert.tokens == "features"}

    def _adapted(self, batch: Batch) -> dict[str, Tensor]:
        return {name: self.adapters[name](tokens) for name, tokens in self.hub(batch).items()}

    def _experts_alone(self, batch: Batch) -> VisionTokens:
        """Return the average of the attached experts if nothing depends on CLIP, without running it."""
        adapted = self._adapted(batch)
        fused_BTD = torch.stack(list(adapted.values())).mean(0)
        shares = [there / len(adapted) for there in self.hub.attached_mask]
        gates_K = torch.tensor(shares, dtype=fused_BTD.dtype).to(fused_BTD.device, non_blocking=True)
        return VisionTokens(
            fused_BTD, self.clip.grid_hw, gates_BTK=gates_K.expand(*fused_BTD.shape[:2], len(self.hub.names))
        )

    def _clip_tokens(self, batch: Batch) -> VisionTokens:
        cached = None if self._cache is None else self._cache.read(CLIP_TOKENS, batch)
        if cached is not None:
            return VisionTokens(cached, self.clip.grid_hw)
        with torch.set_grad_enabled(self.clip_lr > 0 and torch.is_grad_enabled()):
            tokens: VisionTokens = self.clip(batch.images_01())
        return tokens

    def _adapter(self, expert: VisionExpert, width: int, hidden: int | None, transfer: TransferMode) -> TokenAdapter:
        return TokenAdapter(
            in_dim=expert.token_dim,
            out_dim=width,
            out_grid=self.clip.grid_hw,
            hidden_dim=hidden,
            map_grid=expert.grid_hw if expert.tokens == "prediction" else None,
            zero_init=transfer == "residual",
        )
