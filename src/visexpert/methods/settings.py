"""Training settings in a config, shared by all methods that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from visexpert.errors import ConfigError, require_numbers
from visexpert.experts import FeatureCache
from visexpert.io.weights import cache_root
from visexpert.losses.agglomerative import RelationForm
from visexpert.losses.distill import Convention
from visexpert.losses.terms import RouterBalanceForm, TokenDistance
from visexpert.methods.step import OnNan, RouterBalance
from visexpert.store import SHARD_MB, StoreDtype, check_url, is_url
from visexpert.transfer import AdapterKind, Alignment, Standardization
from visexpert.typed import typed

TeacherWeighting = Literal["attention", "uniform", "gate"]
TokenWeighting = Literal["attention", "uniform"]
TeacherBalance = Literal["none", "running_mean"]
Adaptation = Literal["full", "lora", "none"]
Targets = Literal["live", "store"]


@typed
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


@typed
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


@typed
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


@typed
@dataclass(frozen=True, kw_only=True)
class MergingOptimizer(OptimizerSettings):
    """Merging's rates.

    Args:
        lr: Peak learning rate of CLIP and, if tokens are fused in the language space, of the projector.
        language_lr: Peak learning rate of the language model; at 0 student and teacher share the teacher's.
    """

    lr: float = 1e-3
    language_lr: float = 0.0


@typed
@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What to score besides the loss and the answers.

    Args:
        caption_images: Number of test images to caption (greedy), the first ones by row; 0 for none, null for all. Logs
            also show how many were captioned: ``caption/images`` of ``caption/images_of``.
        meteor: Also score captions by METEOR (Java, about 25 s for 500 captions); null: if Java is installed.
        knn_images: Where the data have classes: number of training images that classify the test images by their
            nearest neighbors (``test/knn``), drawn by the data's seed; 0 for no such scores, null for all.
        alignment_images: Where the encoder's source has a text tower: number of test images, the first ones by row, on
            which retrieval and zero-shot classification through it are scored (``test/alignment``); 0 for no such
            scores, null for all.
    """

    caption_images: int | None = None
    meteor: bool | None = None
    knn_images: int | None = 10_000
    alignment_images: int | None = 1_000

    def __post_init__(self) -> None:
        require_numbers(
            "evaluation",
            least=0,
            caption_images=self.caption_images,
            knn_images=self.knn_images,
            alignment_images=self.alignment_images,
        )


@typed
@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Tokens of frozen encoders, computed once for training and validation images and shared by all runs.

    Args:
        folder: Folder of the store, or a URL that fsspec reads and writes (``s3://``, ``gs://``); ``auto`` is
            ``features`` in the cache ($VISEXPERT_CACHE, else ~/.cache/visexpert); null runs the encoders in each step.
        dtype: ``float16``, ``bfloat16`` (for tokens beyond 6.5e4), ``float32`` (equal to running the encoders in each
            step, up to rounding) or ``int8`` (with a scale per token: half of float16's space, some 1 % of error).
        fill: Compute tokens that are missing; false refuses them, and says how those that are stored differ.
        shard_mb: Size of new shards, in millions of bytes; a kill loses at most one.
        batch_size: Images per call of an encoder while the store is filled.
        cache: Folder of this machine for shards of a URL, which are fetched once and take as much space as there;
            null is ``fetched`` in the cache.

    Raises:
        ConfigError: The folder is a URL that fsspec cannot open, or a number is not positive.
    """

    folder: str | None = None
    dtype: StoreDtype = "float16"
    fill: bool = True
    shard_mb: float = SHARD_MB
    batch_size: int = 64
    cache: str | None = None

    def __post_init__(self) -> None:
        require_numbers("store", above=0, shard_mb=self.shard_mb, batch_size=self.batch_size)
        if self.folder is not None and is_url(self.folder):
            check_url(self.folder)

    def open(self) -> FeatureCache | None:
        """Open the store; None if there is no folder."""
        if self.folder is None:
            return None
        folder = cache_root() / "features" if self.folder == "auto" else self.folder
        return FeatureCache(
            folder,
            dtype=self.dtype,
            fill=self.fill,
            shard_mb=self.shard_mb,
            batch_size=self.batch_size,
            local=self.cache,
        )


@typed
@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the student is compared with each expert; CLIP's tokens are always compared as they are.

    Args:
        alignment: ``to_student`` (paper: adapters carry teachers into the student's space and train with it),
            ``to_teacher`` (heads on the student predict standardized teacher tokens) or ``fixed`` (an orthogonal map
            of each standardized teacher, without parameters; as good as heads with a weak CLIP teacher).
        adapter: Part to train: ``released``, ``linear`` or ``mlp``; null is the alignment's default.
        hidden: Hidden width of ``mlp``.
        standardize: How ``to_teacher`` and ``fixed`` standardize a teacher: ``channel`` (each channel by its own mean
            and variance) or ``phi_s`` (PHI-S, arXiv 2410.01680: a rotation and one scale, see
            :class:`~visexpert.transfer.standardize.PhiS`), whose statistics come from training images before the fit.
    """

    alignment: Alignment = "fixed"
    adapter: AdapterKind | None = None
    hidden: int | None = None
    standardize: Standardization = "channel"

    def __post_init__(self) -> None:
        require_words("heads", standardize=(self.standardize, Standardization))
        require_numbers("heads", least=1, hidden=self.hidden)


@typed
@dataclass(frozen=True, kw_only=True)
class AgglomerationSettings:
    """What agglomerative encoders add to the error of each token; by default nothing.

    Args:
        relations: Weight of the relational loss: similarities between an image's tokens, student against teacher, in
            the space where the head compares them (:func:`~visexpert.losses.agglomerative.relation_errors`; after
            SigLino, arXiv 2512.20157). It compares every pair of tokens, so memory grows with their square.
        relation_form: ``symmetric``, or ``asymmetric``: only pull near pairs together and push far ones apart.
        summary: Weight of the summary loss, one minus the cosine of the student's [CLS] token (its mean token, if it
            has none), through a head, and the teacher's own summary, as AM-RADIO (arXiv 2312.06709). Teachers without
            one take no part: the mean of patch tokens is not a summary.
        drop: Probability with which an image leaves out a teacher in a step, except the one with its largest loss
            (UNIC, arXiv 2408.05088, with 0.5).
        balance: ``running_mean`` divides each teacher's loss by its running mean (AdaLoss, arXiv 1708.06832), so that
            all weigh alike whatever their scale; ``none``.
        balance_momentum: Share of the old value in a step of the running mean.
        image_sizes: Sides in pixels that the student trains at (multi-resolution training: RADIOv2.5, arXiv
            2412.07679). Each batch has one of them, in rounds of random order, the same on all processes. Position
            embeddings are interpolated, and tokens are compared on the grid of the encoder's own size. Teachers read
            their own size; validation and export use the encoder's. Empty: the encoder's own size alone.
        shift: Most patches, down and across, between the crops that student and teachers see of an image; they are
            compared where the crops overlap (shift-equivariant loss: C-RADIOv4, arXiv 2601.17237), so that the student
            does not learn what a teacher adds at fixed places. Images are enlarged by as many patches, and both crops
            drawn anew for each batch. Teachers must run live. Validation compares whole images.

    Raises:
        ConfigError: An unknown value, or a number outside its range.
    """

    relations: float = 0.0
    relation_form: RelationForm = "symmetric"
    summary: float = 0.0
    drop: float = 0.0
    balance: TeacherBalance = "none"
    balance_momentum: float = 0.99
    image_sizes: Sequence[int] = ()
    shift: int = 0

    def __post_init__(self) -> None:
        require_words(
            "agglomeration",
            relation_form=(self.relation_form, RelationForm),
            balance=(self.balance, TeacherBalance),
        )
        require_numbers("agglomeration", least=0, relations=self.relations, summary=self.summary)
        require_numbers("agglomeration", least=0, most=1, drop=self.drop)
        require_numbers("agglomeration", least=0, below=1, balance_momentum=self.balance_momentum)
        require_numbers("agglomeration", least=0, shift=self.shift)
        for side in self.image_sizes:
            require_numbers("agglomeration", least=1, image_sizes=side)
        if len(set(self.image_sizes)) < len(self.image_sizes):
            raise ConfigError(
                f"agglomeration: image_sizes={list(self.image_sizes)} names a size twice; name each once."
            )

    @property
    def adds(self) -> bool:
        """Whether anything differs from the weighted error of each token."""
        return self.balance != "none" or max(self.relations, self.summary, self.drop) > 0

    @property
    def varies(self) -> bool:
        """Whether batches differ in what student and teachers see of them."""
        return self.shift > 0 or len(self.image_sizes) > 0


@typed
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


@typed
@dataclass(frozen=True, kw_only=True)
class BalanceSettings:
    """How the routers of a student with MoLE are balanced.

    Args:
        balance_weight: Weight of the balance loss (MoVE-KD's released code: 0.01). At 0 a router that learns from
            nothing else (``top1``, ``released``) keeps its initial weights.
        balance_form: ``pooled`` (released) or ``per_layer``.

    Raises:
        ConfigError: A negative weight, or an unknown form.
    """

    owner: ClassVar[str]
    balance_weight: float = 0.01
    balance_form: RouterBalanceForm = "pooled"

    def __post_init__(self) -> None:
        require_words(self.owner, balance_form=(self.balance_form, RouterBalanceForm))
        require_numbers(self.owner, least=0, balance_weight=self.balance_weight)

    @property
    def router_balance(self) -> RouterBalance | None:
        """How the routers are balanced; None at a weight of 0."""
        return RouterBalance(self.balance_weight, self.balance_form) if self.balance_weight > 0 else None


@typed
@dataclass(frozen=True, kw_only=True)
class AuxiliarySettings(BalanceSettings):
    """MoVE-KD's losses besides text and distillation.

    Args:
        keep_pooled: Weight of the loss that keeps the student's pooled output, see
            :class:`~visexpert.methods.pooled.KeptPooled`.
    """

    owner: ClassVar[str] = "auxiliary"
    keep_pooled: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self.owner, least=0, keep_pooled=self.keep_pooled)


@typed
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
        keep_pooled: Weight of the loss that keeps the pooled output, see :class:`~visexpert.methods.pooled.KeptPooled`.
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
    keep_pooled: float = 0.0
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
