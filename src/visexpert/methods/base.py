"""Base class of methods: training step, logging, optimizer, scoring and reproducible randomness."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from visexpert.errors import ConfigError
from visexpert.experts import ExpertHub, FeatureCache
from visexpert.language import LanguageModel, NoLanguage, Predictions, Projector
from visexpert.losses import text_loss, token_nll
from visexpert.methods.accumulation import StepShares, batches_done
from visexpert.methods.checkpointed import CheckpointedModule
from visexpert.methods.evaluation import EvalOutput, Evaluator, Written, write_all
from visexpert.methods.parts import Part, StoredTokens, settle_modes
from visexpert.methods.pooled import KeptPooled
from visexpert.methods.settings import EvaluationSettings, OptimizerSettings
from visexpert.methods.start import start_from
from visexpert.methods.step import (
    Compared,
    FiniteGuard,
    LossTerm,
    OnNan,
    RouterBalance,
    Seen,
    StepOutput,
    loss_over_processes,
    parts_over_processes,
    refuse_engines,
)
from visexpert.methods.views import EncoderViews
from visexpert.optim import adamw_and_cosine
from visexpert.processes import one_batch
from visexpert.typed import typed
from visexpert.types import Batch, ImageSource, Unit, VisionTokens, check_images, images_are_checked, no_batch
from visexpert.vision import VisionEncoder, collect_routing


@typed
class Method(CheckpointedModule):
    """Base class of methods, which turn images into vision tokens for a language model.

    fit, plan, export, caption, serve and compare use nothing else of a method. A method must implement
    :meth:`view_tokens`, :meth:`frozen_modules` and :meth:`trained_groups`; everything else has a default. Detachment
    and merging need more: :class:`~visexpert.methods.fusing.FusingMethod`.

    Args:
        clip: The encoder, which `visexpert export` writes.
        projector: Maps its tokens to the language width.
        language: Language model.
        hub: Frozen experts or teachers; None if there are none.
        optimizer: Rates and schedule.
        evaluation: What to score besides the loss and the answers.
    """

    _cache: FeatureCache | None = None

    router_balance: RouterBalance | None = None
    """How the routers of a student with MoLE are balanced; None if they are not."""

    lm_weight: float = 1.0
    """Weight of the text loss; at 0 training reads no text."""

    kept: KeptPooled | None = None
    """How the pooled output of the encoder is kept; None if it is not."""

    def __init__(
        self,
        *,
        clip: VisionEncoder,
        projector: Projector,
        language: LanguageModel,
        hub: ExpertHub | None = None,
        optimizer: OptimizerSettings,
        evaluation: EvaluationSettings,
    ) -> None:
        super().__init__(weight_decay=optimizer.weight_decay)
        self.language = language
        self.clip, self.projector = clip, projector
        self.hub = ExpertHub({}) if hub is None else hub
        self.lr, self.language_lr = optimizer.lr, optimizer.language_lr
        self.language_frozen_steps = optimizer.language_frozen_steps
        self.warmup_steps, self.betas = optimizer.warmup_steps, optimizer.betas
        self.evaluation = evaluation
        self.on_nan: OnNan = optimizer.on_nan
        self._finite = FiniteGuard(self.on_nan)
        self.evaluators: dict[str, Evaluator] = {}
        self.answered = False
        """Whether ``predict_step`` passes over its batch: an earlier call has answered its texts."""
        self._joined: bool | None = None
        self._start: tuple[VisionEncoder, ...] = ()  # a tuple keeps it out of parameters and checkpoints
        self._step_shares = StepShares()
        self._batch_shares: dict[Unit, float | Tensor] = {}

    @abstractmethod
    def view_tokens(self, batch: Batch) -> VisionTokens:
        """Encode views into the tokens that the method trains and compares.

        Args:
            batch: One view per row: an image, or a tile, which is in no store (``split`` is empty).
        """

    def to_language(self, tokens: VisionTokens) -> VisionTokens:
        """Map the tokens of :meth:`view_tokens` to the language width."""
        return replace(tokens, tokens_BTD=self.projector(tokens.tokens_BTD))

    def see(self, batch: Batch, *, watch_routers: bool = False) -> Seen:
        """Cut images into views and encode them.

        Args:
            batch: A batch.
            watch_routers: Record the decisions of MoLE's routers, including those behind the tokens.
        """
        views = self.clip.views_of(batch)
        if not watch_routers:
            return Seen(batch, views, self.view_tokens(views.batch))
        with collect_routing(self.clip) as routing:
            tokens = self.view_tokens(views.batch)
        return Seen(batch, views, tokens, routing.record())

    def keep_pooled(self, weight: float) -> None:
        """Add the loss that keeps the pooled output of the encoder; at a weight of 0 nothing is added.

        Raises:
            ConfigError: The weight is negative, or the encoder has no pooled output.
        """
        self.kept = KeptPooled.of(self.clip, weight, owner=type(self).__name__)

    def check_start(self) -> None:
        """Check early that a fit can start.

        Raises:
            ConfigError: There is no frozen encoder whose pooled output could be kept.
            WeightsError: The run to start from has no checkpoint.
        """
        super().check_start()
        if self.kept is not None:
            self.check_pooled_teacher()

    def check_pooled_teacher(self) -> None:
        """Check that there is a frozen encoder for :meth:`pooled_teacher`; nothing is read.

        Raises:
            ConfigError: The encoder has no source.
        """
        if self.clip.weights_from is None:
            raise ConfigError(
                f"{type(self).__name__}: keep_pooled needs the encoder that training starts from, but this one has no "
                "source; name one, or set keep_pooled to 0."
            )

    def pooled_teacher(self) -> VisionEncoder:
        """Return the frozen encoder whose pooled output is kept.

        Raises:
            ConfigError: There is none: the encoder has no source.
        """
        self.check_pooled_teacher()
        frozen = self.frozen_encoder()
        assert frozen is not None
        return frozen

    def frozen_encoder(self) -> VisionEncoder | None:
        """Return the encoder as it was before training; None if its weights were random and no part keeps them.

        By default a copy that is read from the source, once.
        """
        if self.clip.weights_from is None:
            return None
        if not self._start:
            copy = self.clip.plain_copy()
            copy.load_weights()
            self._start = (copy.eval().requires_grad_(False),)
        return self._start[0].to(self.device)

    def read_by_language(self, seen: Seen) -> VisionTokens:
        """Return the tokens that the language model reads, one row per sample, tiles joined."""
        return seen.views.join(self.to_language(seen.tokens))

    def encode(self, batch: Batch) -> VisionTokens:
        """Encode images into the tokens that the language model reads: (B, T, d_lang).

        Raises:
            ConfigError: Anything but a batch, such as images alone.
            DataError: Images that are neither uint8 nor floats in [0, 1], (B, 3, H, W).
        """
        if not isinstance(batch, Batch):
            raise no_batch(batch, owner=type(self).__name__)
        check_images(batch.images_01(), owner=type(self).__name__)
        with images_are_checked():
            return self.read_by_language(self.see(batch))

    def forward(self, batch: Batch) -> VisionTokens:
        """Do the same as :meth:`encode`."""
        return self.encode(batch)

    def __repr__(self) -> str:
        lines = [f"clip: {self.clip}", *(f"expert {name}: {self.hub[name]}" for name in self.hub.attached)]
        lines += [f"expert {name}: detached" for name in self.hub.names if name not in self.hub.attached]
        lines += [f"language: {self.language}"]
        training = {id(p): p.numel() for g in self.trained_groups() for m in g.modules for p in m.parameters()}
        lines += [f"{sum(training.values()):,} parameters train, {self.trained_steps} steps behind them"]
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    # -- What commands use ----------------------------------------------------------------------------------------

    def unused_modules(self) -> Sequence[nn.Module]:
        """Return the parts that a deployed model does not load, such as detached experts."""
        return ()

    @property
    def read_experts(self) -> tuple[str, ...]:
        """The attached experts that a deployed model runs; it needs no teachers."""
        unused = {id(module) for part in self.unused_modules() for module in part.modules()}
        return tuple(name for name in self.hub.attached if id(self.hub[name]) not in unused)

    def licenses(self) -> Mapping[str, str]:
        """Return the licenses of the encoder and of each expert, by part: all that a trained encoder learned from."""
        experts = {f"expert {name}": self.hub[name].license for name in self.hub.names}
        return {"clip": self.clip.license, **experts}

    def beside_clip(self) -> Sequence[str]:
        """Name what changes the language model's input besides encoder, projector and experts.

        An export of the encoder leaves it out, and one of the whole model cannot hold it.
        """
        return ()

    def parts(self) -> Sequence[Part]:
        """Return all parts with their roles, inner parts before outer ones: MoLE before the encoder."""
        added = [part for layer in self.clip.mole_layers() for part in layer.added_modules()]
        return [
            Part("MoLE", "student", tuple(added)),
            Part("encoder", "student", (self.clip,)),
            *(Part(f"expert {name}", "teachers", (self.hub[name],)) for name in self.hub.names),
            Part("projector", "transfer", (self.projector,)),
            Part("language model", "language", (self.language,)),
            *self.own_parts(),
        ]

    def own_parts(self) -> Sequence[Part]:
        """Return all parts except encoder, experts, projector and language model, by attribute name."""
        shared = {id(part) for part in (self.clip, self.hub, self.projector, self.language)}
        return [Part.of(name, "transfer", part) for name, part in self.named_children() if id(part) not in shared]

    stores_test_images = False
    """Whether :meth:`read_features` is also called for the test images."""

    def stored_tokens(self) -> Mapping[str, StoredTokens]:
        """Return what :meth:`read_features` stores of each image, by name of the part in :meth:`parts`."""
        return {}

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read frozen tokens of these images from the store from now on; compute those that it lacks.

        Args:
            cache: The run's cache.
            sources: Images by split; for other splits the encoders run.
        """

    def step(self, batch: Batch) -> StepOutput:
        """Return the loss of a batch: encode, read by the language model, compare, balance."""
        with images_are_checked():  # by the data module; to check values here, the host would wait for the device
            return self._step(batch)

    def _step(self, batch: Batch) -> StepOutput:
        if self.kept is None:
            return self._step_of(batch)
        with self.kept.recording(self.clip, self.pooled_teacher) as pooled:
            output = self._step_of(batch)
        term = pooled.term(batch)
        return replace(output, terms={**output.terms, "pooled_loss": term})

    def _step_of(self, batch: Batch) -> StepOutput:
        balance = self.router_balance
        seen = self.see(batch, watch_routers=balance is not None)
        terms: dict[str, LossTerm] = {}
        if self.lm_weight > 0:
            terms["text_loss"] = LossTerm(self._text_loss(seen), "token", self.lm_weight)
        compared = self.compare(seen)
        terms |= compared.terms
        if balance is not None and seen.routing is not None:
            terms["balance_loss"] = balance.term(seen)
        return StepOutput(terms, len(batch), compared.watched)

    def compare(self, seen: Seen) -> Compared:
        """Return the method's own losses: those besides the text loss and the routers' balance."""
        return Compared()

    def compare_in_validation(self, seen: Seen) -> None:
        """Collect the method's own scores of a validation batch."""

    def _text_loss(self, seen: Seen) -> Tensor:
        text = seen.batch.text
        if text is None or not self.reads_text:
            raise ConfigError(
                f"{type(self).__name__}: lm_weight is above 0, but there is no text or no language model; add them, "
                "or set it to 0 where the method has it."
            )
        predicted: Predictions = self.language(self.read_by_language(seen), text)
        return text_loss(predicted.logits_MV, predicted.targets_M)

    @property
    def reads_text(self) -> bool:
        """Whether there is a language model."""
        return not isinstance(self.language, NoLanguage)

    @property
    def language_joins(self) -> bool:
        """Whether the language model trains in the current step."""
        return self.language_lr > 0 and self.global_step >= self.language_frozen_steps

    @property
    def feature_cache(self) -> FeatureCache | None:
        """Where tokens of frozen encoders are stored; None if they are not."""
        return self._cache

    def views(self, batch: Batch) -> EncoderViews | None:
        """Return attention and routing on a batch, for figures; None if there is nothing to show."""
        return None

    # -- Lightning hooks ------------------------------------------------------------------------------------------

    def load_weights(self) -> None:
        """Load encoder, attached experts and language model, then ``init_from``."""
        self.clip.load_weights()
        self.hub.load_weights()
        self.language.load_weights()
        if self.init_from is not None:
            start_from(self, self.init_from)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Method:
        """Refuse: a checkpoint holds what trained, not what the model is made of; open the run by ``load_run``.

        Raises:
            ConfigError: Always; the message says what to call.
        """
        path = Path(str(checkpoint_path))
        run = path.parents[1] if path.parent.name == "checkpoints" else "RUN"
        raise ConfigError(
            f"{cls.__name__}.load_from_checkpoint cannot build the model: '{path}' holds what trained, and the run's "
            f"config.yaml what the model is made of; use visexpert.load_run('{run}').model."
        )

    def setup(self, stage: str) -> None:
        """Load weights, and set which parameters train.

        Raises:
            ConfigError: In a fit, see :func:`~visexpert.methods.step.refuse_engines`.
        """
        if stage == "fit" and self._trainer is not None:
            refuse_engines(
                self.trainer.strategy,
                on_nan=self.on_nan,
                frozen_steps=self.language_frozen_steps,
                splits_itself=is_overridden("configure_model", self),
            )
        super().setup(stage)

    def train(self, mode: bool = True) -> Method:
        """Put what trains in the current step into train mode, the rest into eval mode, without dropout or noise."""
        super().train(mode)
        for module in self.frozen_modules().values():
            module.eval()
        if mode:
            self._joined = self.language_joins
            settle_modes(self, self._training_ids())
        return self

    def _training_ids(self) -> set[int]:
        """Return the ``id`` of each parameter that trains in the current step."""
        modules = [module for group in self.trained_groups() if group.lr > 0 for module in group.modules]
        found = {id(parameter) for module in modules for parameter in module.parameters()}
        joined = () if self.language_joins else self.language.parameters()
        return found - {id(parameter) for parameter in joined}

    def on_train_start(self) -> None:
        """Set train and eval modes, which Lightning leaves unchanged: the model may come from an evaluation."""
        super().on_train_start()
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed noise and dropout by batch, so that a resumed run equals an uninterrupted one."""
        done = 0 if self._trainer is None else batches_done(self.trainer)
        torch.manual_seed((self._run_seed() * 1_000_003 + done * 1009 + self.global_rank) % 2**63)
        if batch.step is None or batch.step.place == 0:
            self._moving.keep()
        self._batch_shares = {} if self._trainer is None else self._step_shares.of(batch, self.trainer)
        held_back = self.language_frozen_steps > 0 and self.language_lr > 0
        if held_back and self.trainer.strategy.model is self:  # DDP would wait for gradients; here they can be saved
            for module in self.language.trained_modules():
                module.requires_grad_(self.language_joins)
        if self._joined != self.language_joins:
            self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Run :meth:`step` and log: the loss always, its parts when a row is written.

        Returns:
            The batch's share of the loss of its optimizer step. Over all batches and processes of the step, the text
            loss is a mean over supervised tokens, the other terms are means over images.
        """
        together = self._trainer is not None and self.trainer.world_size > 1
        with one_batch(together=together):
            output = self.step(batch)
        loss = output.shared(self._batch_shares)
        if self._trainer is not None:
            self._finite.note(batch, output)
        self._log_step(output, batch, together=together)
        return loss

    def _log_step(self, output: StepOutput, batch: Batch, *, together: bool) -> None:
        """Log the loss of all processes, and its parts when a row is written."""
        is_row = self._trainer is not None and writes_row(self.trainer)
        counts = _counts(batch)
        loss = loss_over_processes(output, counts, together=together)
        self.log_dict({"train/loss": loss}, prog_bar=True, batch_size=output.batch_size)
        if is_row:  # a dozen calls of log take a fifth of a small step
            parts = parts_over_processes(output, counts, together=together)
            self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=output.batch_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the weights are finite, then leave frozen parts out."""
        self._finite.check_weights(self)
        super().on_save_checkpoint(checkpoint)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of a language model that does not train yet; check that all gradients are finite.

        A parameter without a gradient gets no update, no decay and no optimizer state, and does not count in clipping.
        """
        if not self.language_joins:
            for parameter in self.language.parameters():
                parameter.grad = None
        self._finite.look(self)

    def on_validation_epoch_start(self) -> None:
        """Reset the scores."""
        self.evaluators["val"] = Evaluator(captions=0)

    def validation_step(self, batch: Batch, batch_idx: int) -> Mapping[str, EvalOutput]:
        """Score one batch."""
        return {"output": self.evaluate(batch, "val")}

    def on_validation_epoch_end(self) -> None:
        """Log scores under ``val/``."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Reset the scores."""
        self.evaluators["test"] = Evaluator(
            captions=self.evaluation.caption_images, probe=True, meteor=self.evaluation.meteor
        )

    def test_step(self, batch: Batch, batch_idx: int) -> Mapping[str, EvalOutput]:
        """Score one batch, including captions."""
        return {"output": self.evaluate(batch, "test")}

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Written, ...]:
        """Return what the model writes for each text of a batch; nothing where its texts are ``answered``."""
        if self.answered:
            return ()
        return write_all(batch, self.encode(batch), self.language, self.tokenizer)

    def on_test_epoch_end(self) -> None:
        """Log scores under ``test/``."""
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over :meth:`trained_groups`, with warm-up and cosine by step."""
        return adamw_and_cosine(
            self.trained_groups(),
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            trainer=self.trainer,
            axes=self._axes,
        )

    # -- Evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch, split: str) -> EvalOutput:
        """Encode and score a batch."""
        with images_are_checked():
            seen = self.see(batch)
            if split == "val":
                self.compare_in_validation(seen)
            return self.score(batch, self.read_by_language(seen), split)

    @torch.no_grad()
    def score(self, batch: Batch, vision: VisionTokens, split: str) -> EvalOutput:
        """Score a batch by one packed forward pass; generate captions up to the quota of the split."""
        evaluator = self.evaluators[split]
        if not self.reads_text:
            evaluator.collect_tokens(batch, vision)
            return EvalOutput(vision=vision)
        assert batch.text is not None
        predicted: Predictions = self.language(vision, batch.text)
        tokenizer = self.tokenizer
        evaluator.update_text(
            batch,
            predicted_M=predicted.logits_MV.argmax(-1),
            nll_M=token_nll(predicted.logits_MV, predicted.targets_M),
            tokenizer=tokenizer,
        )
        evaluator.write_answers(batch, vision, self.language, tokenizer)
        captions = evaluator.generate_captions(batch, vision, self.language, tokenizer)
        evaluator.collect_tokens(batch, vision)
        return EvalOutput(vision=vision, captions=captions)

    def image_sources(self, *, wanted_by: str) -> Mapping[str, ImageSource]:
        """Return the data's images by row, for the feature store.

        Args:
            wanted_by: The setting that needs them, and the alternative, for the message.

        Raises:
            ConfigError: The data does not provide images by row.
        """
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "image_sources"):
            raise ConfigError(
                f"{type(self).__name__}: {type(datamodule).__name__} does not provide images by row (image_sources), "
                f"which {wanted_by}."
            )
        sources: Mapping[str, ImageSource] = datamodule.image_sources()
        return sources

    @property
    def tokenizer(self) -> Any:
        """The data's tokenizer."""
        return self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]

    def _log_scores(self, split: str) -> None:
        scores = self.evaluators[split].compute()
        self.log_dict({f"{split}/{name}": value for name, value in scores.items()}, batch_size=1)

    def _run_seed(self) -> int:
        """Return the run's seed, which ``seed_everything`` sets and Lightning keeps in the environment."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _counts(batch: Batch) -> Mapping[Unit, int]:
    return batch.counts() if batch.step is None else batch.step.batch


def writes_row(trainer: L.Trainer) -> bool:
    """Return whether the current training step is logged (``log_every_n_steps``) or is the last one."""
    interval = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector
    step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    return bool(interval and step % interval == 0) or step == trainer.max_steps
