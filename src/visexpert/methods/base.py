"""What every method shares: the step's logging, the optimizer, scoring and resumable randomness."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
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
from visexpert.types import Batch, ImageSource, Unit, VisionTokens
from visexpert.vision import ClipEncoder, collect_routing


class Method(CheckpointedModule):
    """A method turns images into vision tokens; the language model reads them; the base trains, scores and saves.

    This class is all that fit, plan, export, caption, serve and compare ask of a method. A method must say
    :meth:`view_tokens`, :meth:`frozen_modules` and :meth:`trained_groups`; all else has an answer that fits a method
    with nothing of its own there. Detachment and merging ask more: :class:`~visexpert.methods.fusing.FusingMethod`.

    Args:
        clip: The encoder: what `visexpert export` writes.
        projector: Its tokens to those of the language model.
        language: Language model.
        hub: Frozen experts or teachers; None for a method without.
        optimizer: Rates and schedule.
        evaluation: What is scored beside the loss and the answers.
    """

    _cache: FeatureCache | None = None

    router_balance: RouterBalance | None = None
    """How the routers of a student with MoLE are balanced; None if they are not."""

    lm_weight: float = 1.0
    """Weight of the text's loss; at 0 no text is read in training."""

    def __init__(
        self,
        *,
        clip: ClipEncoder,
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
        self._joined: bool | None = None
        self._step_shares = StepShares()
        self._batch_shares: dict[Unit, float | Tensor] = {}

    @abstractmethod
    def view_tokens(self, batch: Batch) -> VisionTokens:
        """Tokens of images, as the method trains and compares them, without regard to tiles.

        Args:
            batch: One view in each row: an image, or a tile of one, which no store knows (``split`` is empty).
        """

    def to_language(self, tokens: VisionTokens) -> VisionTokens:
        """Bring what :meth:`view_tokens` gives into the width that the language model reads."""
        return replace(tokens, tokens_BTD=self.projector(tokens.tokens_BTD))

    def see(self, batch: Batch, *, watch_routers: bool = False) -> Seen:
        """Cut images into views and encode them.

        Args:
            batch: A batch.
            watch_routers: Keep what the routers of MoLE decide, those behind the tokens included.
        """
        views = self.clip.views_of(batch)
        if not watch_routers:
            return Seen(batch, views, self.view_tokens(views.batch))
        with collect_routing(self.clip) as routing:
            tokens = self.view_tokens(views.batch)
        return Seen(batch, views, tokens, routing.record())

    def read_by_language(self, seen: Seen) -> VisionTokens:
        """One row of tokens for each sample, tiles joined, as the language model reads them."""
        return seen.views.join(self.to_language(seen.tokens))

    def encode(self, batch: Batch) -> VisionTokens:
        """Images to the tokens that the language model reads: (B, T, d_lang)."""
        return self.read_by_language(self.see(batch))

    # -- What commands ask ----------------------------------------------------------------------------------------

    def unused_modules(self) -> Sequence[nn.Module]:
        """Parts that a deployed model would not load, such as detached experts."""
        return ()

    @property
    def read_experts(self) -> tuple[str, ...]:
        """Attached experts that a deployed model runs; teachers, which it does without, are not among them."""
        unused = {id(module) for part in self.unused_modules() for module in part.modules()}
        return tuple(name for name in self.hub.attached if id(self.hub[name]) not in unused)

    def licenses(self) -> Mapping[str, str]:
        """License of the encoder and of each expert, by part: what a trained encoder may owe its knowledge to."""
        experts = {f"expert {name}": self.hub[name].license for name in self.hub.names}
        return {"clip": self.clip.license, **experts}

    def beside_clip(self) -> Sequence[str]:
        """What the language model reads through beside encoder, projector and experts, as a message names it.

        An export of the encoder leaves it behind, and one of the whole model has no place for it.
        """
        return ()

    def parts(self) -> Sequence[Part]:
        """All parts with their roles, those inside another one before it: MoLE before CLIP."""
        added = [part for layer in self.clip.mole_layers() for part in layer.added_modules()]
        return [
            Part("MoLE", "student", tuple(added)),
            Part("CLIP", "student", (self.clip,)),
            *(Part(f"expert {name}", "teachers", (self.hub[name],)) for name in self.hub.names),
            Part("projector", "transfer", (self.projector,)),
            Part("language model", "language", (self.language,)),
            *self.own_parts(),
        ]

    def own_parts(self) -> Sequence[Part]:
        """Parts beside encoder, experts, projector and language model: every other module, by its own name."""
        shared = {id(part) for part in (self.clip, self.hub, self.projector, self.language)}
        return [Part.of(name, "transfer", part) for name, part in self.named_children() if id(part) not in shared]

    def stored_tokens(self) -> Mapping[str, StoredTokens]:
        """What :meth:`read_features` keeps of each image, by name of the part in :meth:`parts`."""
        return {}

    def read_features(self, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
        """Read frozen tokens of these images from the store from now on, computing them where it lacks them.

        Args:
            cache: The run's cache.
            sources: Images by split; batches of other splits run the encoders live.
        """

    def step(self, batch: Batch) -> StepOutput:
        """Loss of one batch: see, read, compare, balance."""
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
        """Losses beside the text's and the routers' balance."""
        return Compared()

    def compare_in_validation(self, seen: Seen) -> None:
        """Keep what there is to score of a validation batch beside what the language model makes of it."""

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
        """Whether there is a language model at all."""
        return not isinstance(self.language, NoLanguage)

    @property
    def language_joins(self) -> bool:
        """Whether the language model trains in the present step."""
        return self.language_lr > 0 and self.global_step >= self.language_frozen_steps

    @property
    def feature_cache(self) -> FeatureCache | None:
        """Where tokens of frozen encoders are kept, if anywhere."""
        return self._cache

    def views(self, batch: Batch) -> EncoderViews | None:
        """What happens inside the encoders on a batch, for figures; None where there is nothing to show."""
        return None

    # -- Lightning hooks ------------------------------------------------------------------------------------------

    def load_weights(self) -> None:
        """Encoder, attached experts, language model; then ``init_from``."""
        self.clip.load_weights()
        self.hub.load_weights()
        self.language.load_weights()
        if self.init_from is not None:
            start_from(self, self.init_from)

    def setup(self, stage: str) -> None:
        """Load weights, settle what trains.

        Raises:
            ConfigError: In a fit, an engine that keeps gradients to itself, with ``language_frozen_steps``.
        """
        if stage == "fit" and self._trainer is not None:
            refuse_engines(self.trainer.strategy, on_nan=self.on_nan, frozen_steps=self.language_frozen_steps)
        super().setup(stage)

    def train(self, mode: bool = True) -> Method:
        """Train mode for what trains at present; all else stays in eval mode, without dropout or noise."""
        super().train(mode)
        for module in self.frozen_modules().values():
            module.eval()
        if mode:
            self._joined = self.language_joins
            settle_modes(self, self._training_ids())
        return self

    def _training_ids(self) -> set[int]:
        """Of the parameters that train in the present step."""
        modules = [module for group in self.trained_groups() if group.lr > 0 for module in group.modules]
        found = {id(parameter) for module in modules for parameter in module.parameters()}
        joined = () if self.language_joins else self.language.parameters()
        return found - {id(parameter) for parameter in joined}

    def on_train_start(self) -> None:
        """Settle modes, which Lightning leaves as they are: a model may come from an evaluation."""
        super().on_train_start()
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed noise and dropout by batch, so that an interrupted run continues as if it had not been."""
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
        """Compute by :meth:`step`, log: the loss of this batch always, its parts when a row is written.

        Returns:
            The batch's part in the loss of its optimizer step, whose text is a mean over all supervised tokens of the
            step, and whose other terms are means over all its images, whatever the number of batches and processes.
        """
        output = self.step(batch)
        if self._trainer is not None:
            self._finite.note(batch, output)
        self._log_step(output, batch)
        return output.shared(self._batch_shares)

    def _log_step(self, output: StepOutput, batch: Batch) -> None:
        """Log what the batches of all processes have as one."""
        together = self._trainer is not None and self.trainer.world_size > 1
        is_row = self._trainer is not None and writes_row(self.trainer)
        counts = _counts(batch)
        loss = loss_over_processes(output, counts, together=together)
        self.log_dict({"train/loss": loss}, prog_bar=True, batch_size=output.batch_size)
        if is_row:  # a dozen calls of log take a fifth of a small step
            parts = parts_over_processes(output, counts, together=together)
            self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=output.batch_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every module, once it is clear that the weights are finite."""
        self._finite.check_weights(self)
        super().on_save_checkpoint(checkpoint)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop gradients of a language model that is not to train yet, and keep NaN and infinity out of the weights.

        Without a gradient a parameter has no step, no decay and no state of the optimizer, and no part in clipping.
        """
        if not self.language_joins:
            for parameter in self.language.parameters():
                parameter.grad = None
        self._finite.look(self)

    def on_validation_epoch_start(self) -> None:
        """Fresh scores."""
        self.evaluators["val"] = Evaluator(captions=0)

    def validation_step(self, batch: Batch, batch_idx: int) -> Mapping[str, EvalOutput]:
        """Score one batch."""
        return {"output": self.evaluate(batch, "val")}

    def on_validation_epoch_end(self) -> None:
        """Log scores under ``val/``."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Fresh scores."""
        self.evaluators["test"] = Evaluator(
            captions=self.evaluation.caption_images, probe=True, meteor=self.evaluation.meteor
        )

    def test_step(self, batch: Batch, batch_idx: int) -> Mapping[str, EvalOutput]:
        """Score one batch, captions included."""
        return {"output": self.evaluate(batch, "test")}

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Written, ...]:
        """What the model writes to each text of a batch."""
        return write_all(batch, self.encode(batch), self.language, self.tokenizer)

    def on_test_epoch_end(self) -> None:
        """Log scores under ``test/``."""
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over :meth:`trained_groups`, warm-up and cosine by step."""
        return adamw_and_cosine(
            self.trained_groups(),
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            trainer=self.trainer,
        )

    # -- Evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch, split: str) -> EvalOutput:
        """Encode and score a batch."""
        seen = self.see(batch)
        if split == "val":
            self.compare_in_validation(seen)
        return self.score(batch, self.read_by_language(seen), split)

    @torch.no_grad()
    def score(self, batch: Batch, vision: VisionTokens, split: str) -> EvalOutput:
        """Score what was made of a batch by one packed forward; generate captions while the split's quota lasts."""
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
        """Images by row of the data in use, for the feature store.

        Args:
            wanted_by: The setting that needs them, and what to do without, for the message.

        Raises:
            ConfigError: The data hands out no images by row.
        """
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "image_sources"):
            raise ConfigError(
                f"{type(self).__name__}: {type(datamodule).__name__} hands out no images by row (image_sources), "
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
        """The seed of the run: set by ``seed_everything``, kept in the environment by Lightning."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _counts(batch: Batch) -> Mapping[Unit, int]:
    return batch.counts() if batch.step is None else batch.step.batch


def writes_row(trainer: L.Trainer) -> bool:
    """Whether a logger writes the current training step (``log_every_n_steps``), or the step is the last one."""
    interval = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector
    step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    return bool(interval and step % interval == 0) or step == trainer.max_steps
