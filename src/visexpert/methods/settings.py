"""Training settings in a config, shared by all methods that have them."""

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
        lr: Peak learning rate of everything without its own rate.
        language_lr: Peak learning rate of the language model; 0 freezes it.
        language_frozen_steps: The language model starts to train at this step, after fresh adapters have settled.
        weight_decay: Weight decay of matrices; biases, norms and embeddings have none.
        warmup_steps: Steps of linear warm-up, followed by a cosine to zero at the end of training.
        betas: AdamW's betas. 0.98 forgets faster, which suits short runs; LLaVA's and MoVE-KD's scripts use 0.999.
        on_nan: What to do if a loss or gradient is NaN or infinite. The step is never taken: ``stop`` ends the run,
            ``skip`` continues with the next step, but ends the run after more than 10 in a row. The rows are listed in
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
        clip_lr: Peak learning rate of CLIP; 0 keeps it frozen (paper). Above 0 for the fine-tuned control, and in the
            configuration of a merged run, so that checkpoints hold CLIP's weights.
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
        mole_lr: Peak learning rate of MoLE; null is ``lr``.
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
        lr: Peak learning rate of CLIP and, if tokens are fused in the language space, of the projector.
        language_lr: Peak learning rate of the language model; at 0 student and teacher share the teacher's.
    """

    lr: float = 1e-3
    language_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What to score besides the loss and the answers.

    Args:
        caption_images: Number of test images to caption (greedy), the first ones by row; 0 for none, null for all. Logs
            also show how many were captioned: ``caption/images`` of ``caption/images_of``.
        meteor: Also score captions by METEOR (Java, about 25 s for 500 captions); null: if Java is installed.
    """

    caption_images: int | None = None
    meteor: bool | None = None

    def __post_init__(self) -> None:
        require_numbers("evaluation", least=0, caption_images=self.caption_images)


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Tokens of frozen encoders, computed once for training and validation images and shared by all runs.

    Args:
        folder: Folder of the store; ``auto`` is ``features`` in the cache ($VISEXPERT_CACHE, else ~/.cache/visexpert);
            null runs the encoders in each step.
        dtype: ``float16``, ``bfloat16`` (for tokens beyond 6.5e4) or ``float32`` (equal to running the encoders in
            each step, up to rounding).
    """

    folder: str | None = None
    dtype: StoreDtype = "float16"

    def open(self) -> FeatureCache | None:
        """Open the store; None if there is no folder."""
        if self.folder is None:
            return None
        return FeatureCache(cache_root() / "features" if self.folder == "auto" else self.folder, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the student is compared with each expert; CLIP's tokens are always compared as they are.

    Args:
        alignment: ``to_student`` (paper: adapters carry teachers into the student's space and train with it),
            ``to_teacher`` (heads on the student predict standardized teacher tokens) or ``fixed`` (an orthogonal map
            of each standardized teacher, without parameters; as good as heads with a weak CLIP teacher).
        adapter: Part to train: ``released``, ``linear`` or ``mlp``; null is the alignment's default.
        hidden: Hidden width of ``mlp``.
    """

    alignment: Alignment = "fixed"
    adapter: AdapterKind | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        require_numbers("heads", least=1, hidden=self.hidden)


@dataclass(frozen=True, kw_only=True)
class WeightingSettings:
    """How teachers and tokens are weighted in the distillation loss.

    Args:
        clip_teacher_weight: Weight of CLIP among the teachers, 0 to 1 (paper: 0.8); null: CLIP is not a teacher.
        teachers: ``attention`` (paper: agreement with CLIP's [CLS] token), ``uniform``, or ``gate``: ToVE's gate on
            CLIP's tokens weights the experts token by token; it is frozen and comes from ``init_from``: a ToVE run with
            a linear gate over these experts, in any order, and possibly others. Checkpoints keep it.
        tokens: ``attention`` (paper: CLIP's [CLS] attention) or ``uniform``.
        convention: ``paper`` or ``released`` formulas of weights and loss, see :mod:`visexpert.losses.distill`.
        detach: Do not let the loss train adapters to shift the weights of teachers; the released code lets it.

    Raises:
        ConfigError: An unknown value, or a weight outside [0, 1].
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
        adaptation: ``full`` trains all weights of CLIP that the tokens depend on; ``lora`` trains low-rank updates,
            folded in at the end; ``none`` trains the student's MoLE only.
        lora_rank: Rank of the updates.
        lora_alpha: Updates are scaled by alpha / rank.
        distance: Distance of the student's tokens to t_fuse: ``mse``, ``cosine`` or ``smooth_l1``.
        normalize: LayerNorm on the tokens of both sides before the distance.
        token_weight: Weight of the distance; 0 fine-tunes CLIP with the text loss only (control).
        lm_weight: Weight of the text loss through the same language model; at 0 no text is needed.
        targets: ``live`` runs the teacher in each step (frozen encoders from its store, if it has one); ``store``
            computes t_fuse of every training image once and stores it, for a CLIP without tiles.

    Raises:
        ConfigError: An unknown value, or no loss with a weight above 0.
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
    """Check that settings have allowed values.

    Args:
        owner: Owner of the settings, for the message.
        words: Each setting's value with the ``Literal`` of allowed ones.

    Raises:
        ConfigError: A value is unknown.
    """
    for name, (value, allowed) in words.items():
        if value not in get_args(allowed):
            raise ConfigError(f"{owner}: {name}={value!r} is unknown; use one of {', '.join(get_args(allowed))}.")
