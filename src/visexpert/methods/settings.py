"""The words for training in a config: each setting once, for every method that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from visexpert.errors import ConfigError, require_numbers
from visexpert.experts import FeatureCache
from visexpert.io.weights import cache_root
from visexpert.losses.distill import Convention
from visexpert.losses.terms import TokenDistance
from visexpert.methods.step import OnNan
from visexpert.store import StoreDtype
from visexpert.transfer import AdapterKind, Alignment

TeacherWeighting = Literal["attention", "uniform", "gate"]
TokenWeighting = Literal["attention", "uniform"]
Adaptation = Literal["full", "lora", "none"]
Targets = Literal["live", "store"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with linear warm-up and a cosine to zero.

    Args:
        lr: Peak learning rate of everything that has no rate of its own.
        language_lr: Peak learning rate of the language model; 0 freezes it.
        language_frozen_steps: The language model trains from this step on only (fresh adapters settle first).
        weight_decay: On matrices; never on biases, norms or embeddings.
        warmup_steps: Linear warm-up, then cosine to zero at the end of training.
        betas: Of AdamW. 0.98 forgets sooner, which suits short runs; the scripts of LLaVA and MoVE-KD have 0.999.
        on_nan: Of a step whose loss or gradient is NaN or infinite, which is never taken: ``stop`` ends the run,
            ``skip`` goes on with the next one, but ends the run after more than 10 in a row. Its rows are in
            ``not_finite.jsonl``.

    Raises:
        ConfigError: A number outside its range.
    """

    lr: float = 2e-3
    language_lr: float = 2e-3
    language_frozen_steps: int = 0
    weight_decay: float = 0.02
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    on_nan: OnNan = "stop"

    def __post_init__(self) -> None:
        require_numbers(
            "optimizer",
            least=0,
            lr=self.lr,
            language_lr=self.language_lr,
            language_frozen_steps=self.language_frozen_steps,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
        )
        for beta in self.betas:
            require_numbers("optimizer", least=0, below=1, betas=beta)


@dataclass(frozen=True, kw_only=True)
class ToVEOptimizer(OptimizerSettings):
    """ToVE's rates.

    Args:
        gate_lr: Peak learning rate of the gate; null is ``lr``.
        clip_lr: Peak learning rate of CLIP; 0 keeps it frozen (paper). Above 0 it is the fine-tuned control, and what a
            merged run's configuration says, since then CLIP's weights are in the checkpoint.
    """

    gate_lr: float | None = None
    clip_lr: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers("optimizer", least=0, gate_lr=self.gate_lr, clip_lr=self.clip_lr)


@dataclass(frozen=True, kw_only=True)
class MoVEKDOptimizer(OptimizerSettings):
    """MoVE-KD's rates; ``lr`` is that of adapters, heads and projector.

    Args:
        clip_lr: Peak learning rate of the student's own weights; 0 trains MoLE alone (the paper's first stage).
        mole_lr: Of MoLE; null is ``lr``.
    """

    clip_lr: float = 1e-3
    mole_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers("optimizer", least=0, clip_lr=self.clip_lr, mole_lr=self.mole_lr)


@dataclass(frozen=True, kw_only=True)
class MergingOptimizer(OptimizerSettings):
    """Merging's rates.

    Args:
        lr: Peak learning rate of CLIP and, where the fusion space is the language model's, of the projector.
        language_lr: Peak learning rate of the language model; 0 keeps it as the teacher's, so that both can share it.
    """

    lr: float = 1e-3
    language_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is scored beside the loss and the answers.

    Args:
        caption_images: Images of the test split that get a generated caption (greedy): the first ones, by row; 0 for
            none, null for all. What the scores stand on is beside them: ``caption/images``, ``caption/images_of``.
        meteor: Score captions by METEOR, too (Java, about 25 s for 500 captions); null where Java is installed.
    """

    caption_images: int | None = None
    meteor: bool | None = None

    def __post_init__(self) -> None:
        require_numbers("evaluation", least=0, caption_images=self.caption_images)


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Tokens of frozen encoders, computed once for training and validation images and shared by all runs.

    Args:
        folder: Where they are kept; ``auto`` is ``features`` in the cache ($VISEXPERT_CACHE, else ~/.cache/visexpert);
            null runs the encoders at each step.
        dtype: ``float16``, ``bfloat16`` (for tokens beyond 6.5e4) or ``float32`` (equal to encoders that run at each
            step, up to rounding).
    """

    folder: str | None = None
    dtype: StoreDtype = "float16"

    def open(self) -> FeatureCache | None:
        """The store; None where there is to be none."""
        if self.folder is None:
            return None
        return FeatureCache(cache_root() / "features" if self.folder == "auto" else self.folder, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the student is compared with each expert; CLIP is always compared as it is.

    Args:
        alignment: ``to_student`` (paper: adapters carry teachers into the student's space and train with it),
            ``to_teacher`` (heads on the student predict standardized teacher tokens) or ``fixed`` (an orthogonal map
            of each standardized teacher; with a weak CLIP teacher level with heads, and nothing to train).
        adapter: What is trained of it: ``released``, ``linear`` or ``mlp``; null takes the alignment's own.
        hidden: Hidden width of ``mlp``.
    """

    alignment: Alignment = "fixed"
    adapter: AdapterKind | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        require_numbers("heads", least=1, hidden=self.hidden)


@dataclass(frozen=True, kw_only=True)
class WeightingSettings:
    """How teachers and tokens are weighed in the distillation loss.

    Args:
        clip_teacher_weight: Weight of CLIP among the teachers, 0 to 1 (paper: 0.8); null takes CLIP out of them.
        teachers: ``attention`` (paper: agreement with CLIP's [CLS] token), ``uniform``, or ``gate``: ToVE's gate on
            CLIP's tokens weighs the experts token by token; it is read from ``init_from`` (a run of ToVE with these
            experts, in any order and perhaps with others, and a linear gate; the checkpoint keeps it) and frozen.
        tokens: ``attention`` (paper: CLIP's [CLS] attention) or ``uniform``.
        convention: ``paper`` or ``released`` formulas of weights and loss, see :mod:`visexpert.losses.distill`.
        detach: Keep the loss from training adapters to shift the weights of teachers; the released code does not.

    Raises:
        ConfigError: An unknown word, or a weight outside 0 to 1.
    """

    clip_teacher_weight: float | None = 0.1
    teachers: TeacherWeighting = "uniform"
    tokens: TokenWeighting = "attention"
    convention: Convention = "paper"
    detach: bool = True

    def __post_init__(self) -> None:
        require_words(
            "weighting",
            teachers=(self.teachers, TeacherWeighting),
            tokens=(self.tokens, TokenWeighting),
            convention=(self.convention, Convention),
        )
        require_numbers("weighting", least=0, most=1, clip_teacher_weight=self.clip_teacher_weight)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What knowledge merging trains, and against what.

    Args:
        adaptation: ``full`` trains every weight of CLIP that is read; ``lora`` low-rank updates, folded in at the end;
            ``none`` leaves CLIP's own weights as they are, so that the student's MoLE alone learns.
        lora_rank: Rank of the updates.
        lora_alpha: Their scale times the rank.
        distance: Distance of the student's tokens to t_fuse: ``mse``, ``cosine`` or ``smooth_l1``.
        normalize: LayerNorm on the tokens of both sides before the distance.
        token_weight: Weight of the distance; 0 fine-tunes CLIP by text alone (the control).
        lm_weight: Weight of the text's loss, read by the same language model; 0 needs no text.
        targets: ``live`` runs the teacher at each step (frozen encoders from its store, where it has one); ``store``
            computes t_fuse of every training image once and keeps it on disk, for a CLIP without tiles.

    Raises:
        ConfigError: An unknown word, or weights that leave nothing to train by.
    """

    adaptation: Adaptation = "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    distance: TokenDistance = "mse"
    normalize: bool = False
    token_weight: float = 1.0
    lm_weight: float = 0.0
    targets: Targets = "live"

    def __post_init__(self) -> None:
        require_words(
            "merging",
            adaptation=(self.adaptation, Adaptation),
            distance=(self.distance, TokenDistance),
            targets=(self.targets, Targets),
        )
        require_numbers("merging", least=0, token_weight=self.token_weight, lm_weight=self.lm_weight)
        require_numbers("merging", least=1, lora_rank=self.lora_rank)
        if self.token_weight + self.lm_weight == 0:
            raise ConfigError("merging: token_weight and lm_weight are both 0; one must be above 0.")


def require_words(owner: str, **words: tuple[str, object]) -> None:
    """Check that settings are words of their lists.

    Args:
        owner: Whose settings, for the message.
        words: Each setting with the ``Literal`` that lists what is allowed.

    Raises:
        ConfigError: One is not.
    """
    for name, (value, allowed) in words.items():
        if value not in get_args(allowed):
            raise ConfigError(f"{owner}: {name}={value!r} is unknown; use one of {', '.join(get_args(allowed))}.")
