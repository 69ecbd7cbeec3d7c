"""Expert detachment as a phase of a run: RUN/detached, the model without experts that contribute too little."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import LightningDataModule

from visexpert.callbacks.cost import CostReport
from visexpert.callbacks.phase import (
    TRAINING,
    Phase,
    PhaseSettings,
    scores_told,
    usual_score,
    weights_identity,
    write_checkpoint,
    write_derived_config,
)
from visexpert.callbacks.subsets import SubsetScoring, SubsetTiming
from visexpert.errors import ConfigError
from visexpert.io.run_files import read_json, set_aside, write_json, write_text
from visexpert.methods import FusingMethod
from visexpert.methods.start import start_from
from visexpert.methods.tove.subset_search import (
    Choice,
    Criterion,
    Measure,
    Search,
    Subset,
    SubsetScore,
    check,
    choose,
    interpolated_cost,
    pareto_front,
)
from visexpert.processes import is_first, of_first
from visexpert.report.palette import spared
from visexpert.report.pareto import contribution_figure, contribution_table, pareto_figure, subset_label, subset_table
from visexpert.timing import MARK, TOLD, UNSTEADY

log = logging.getLogger(__name__)

FACTS = "detachment.json"
ACCURACY = "vqa/accuracy"


class ExpertDetachment(Phase):
    """Detach the experts that contribute too little for their cost, after training or on a finished run.

    Subsets of experts are scored on validation images and timed on this machine; the best one by exactly one
    criterion (``min_contribution``, ``keep`` or ``latency_budget``) stays. The others are removed for good, with
    their adapters and gate rows. Writes RUN/detached, a run of its own: configuration, scores, a smaller checkpoint,
    and every subset's score and cost (``detachment.json``, ``detachment.md``, ``figures/pareto.png``,
    ``figures/contribution.png``).
    Run the same command again to resume an interrupted detachment; a finished one is not repeated.

    Args:
        min_contribution: Detach experts whose removal raises the validation loss by less than this.
        keep: Number of experts to keep.
        latency_budget: Greatest cost of the vision side as a multiple of the encoder's alone, at least 1.
        budget_measure: What the budget counts: ``ms`` as measured here and now, or ``gflop``, equal on every machine.
        search: ``exhaustive`` tries all 2^K subsets; ``greedy`` takes out one expert after another; ``auto`` is
            exhaustive for up to 6 experts.
        loss: Validation metric that decides; lower is better.
        score: Validation metric of the table and the Pareto front; higher is better. A minus before its name changes
            its sign. null takes ``vqa/accuracy`` where the validation data has it, else the loss with its sign changed.
        images: Validation images to score each subset on; null takes all.
        timing_images: Images per call while measuring milliseconds.
        timing_seconds: Shortest time to measure them for, twice.
        retune_steps: Optimizer steps to re-tune the remaining model; 0 skips this and costs accuracy.
        retune_lr: Peak learning rate of re-tuning, for all trainable parameters; null takes the run's own rates.
        eval_every: Steps between scores on the validation images while re-tuning.
        checkpoint_every: Steps between checkpoints while re-tuning.
        name: Folder inside the run's.
    """

    def __init__(
        self,
        *,
        min_contribution: float | None = None,
        keep: int | None = None,
        latency_budget: float | None = None,
        budget_measure: Measure = "ms",
        search: Search = "auto",
        loss: str = "nll/nll",
        score: str | None = None,
        images: int | None = None,
        timing_images: int = 16,
        timing_seconds: float = 2.0,
        retune_steps: int = 200,
        retune_lr: float | None = None,
        eval_every: int = 500,
        checkpoint_every: int = 250,
        name: str = "detached",
    ) -> None:
        super().__init__(name=name)
        least = {"images": (images, 1), "timing_images": (timing_images, 1), "retune_steps": (retune_steps, 0)}
        least |= {"eval_every": (eval_every, 1), "checkpoint_every": (checkpoint_every, 1)}
        for key, (number, lowest) in least.items():
            if number is not None and number < lowest:
                raise ConfigError(f"ExpertDetachment: {key}={number} must be at least {lowest}.")
        if retune_lr is not None and not (retune_lr > 0 and retune_steps > 0):
            raise ConfigError(
                f"ExpertDetachment: retune_lr={retune_lr} with retune_steps={retune_steps} trains nothing; give both "
                "above 0, or leave retune_lr out."
            )
        self.criterion = Criterion(min_contribution, keep, latency_budget, budget_measure)
        self.search: Search = search
        self.loss, self.score = loss, score
        self.images = images
        self.timing_images, self.timing_seconds = timing_images, timing_seconds
        self.retune_steps, self.retune_lr = retune_steps, retune_lr
        self.eval_every, self.checkpoint_every = eval_every, checkpoint_every

    needs_validation = True

    def check_start(self, model: FusingMethod) -> None:
        """See :meth:`Phase.check_start`.

        Raises:
            ConfigError: There are no experts, or fewer than are to be kept.
        """
        check(model.hub.attached, self.criterion, self.search)

    def apply(self, model: FusingMethod, data: LightningDataModule, folder: Path, settings: PhaseSettings) -> Path:
        """Search, detach, train on, score, save. See :meth:`Phase.apply`."""
        out = folder / self.name
        steps = model.trained_steps + self.retune_steps
        kept = of_first(lambda: self._begun(model, out))
        if kept is None:
            kept = self._find(model, data, folder, settings)
        model.drop_experts([name for name in model.hub.names if name not in kept])
        finished = out / "checkpoints" / "last.ckpt"
        if finished.is_file():
            log.info("%s is detached already; delete it, or give another name, to detach again.", out)
            start_from(model, str(finished))
            model.count_steps(steps)
            self._tell(folder, out)
            return out
        cost = CostReport()
        if not self._retune(model, data, out, settings, cost):
            return out
        model.count_steps(steps)
        of_first(lambda: write_derived_config(folder, out, model.detached_config))
        settings.trainer(out, cost=cost).test(model, datamodule=data, verbose=False)
        write_checkpoint(model, out, steps=steps)
        self._tell(folder, out)
        return out

    def _begun(self, model: FusingMethod, out: Path) -> Subset | None:
        """What an earlier start kept, refusing one with other settings and setting aside one of other weights."""
        if not (out / FACTS).is_file():
            return None
        before = read_json(out / FACTS)
        other = [
            f"{key}={before['settings'].get(key)!r}, now {value!r}"
            for key, value in self._settings().items()
            if before["settings"].get(key) != value
        ]
        if other:
            raise ConfigError(
                f"ExpertDetachment: '{out}' was begun with {'; '.join(other)}; give another name, or delete it."
            )
        if before["weights"] != weights_identity(model):
            log.info("%s was made from other weights; it is kept as %s.", out, set_aside(out))
            return None
        return tuple(before["kept"])

    def _find(self, model: FusingMethod, data: LightningDataModule, folder: Path, settings: PhaseSettings) -> Subset:
        """Search the subsets and write down all that was found; times are those of the first process."""
        everything, weights = model.hub.attached, weights_identity(model)
        check(everything, self.criterion, self.search)
        scoring = SubsetScoring(model, images=self.images)
        timing = SubsetTiming(model, images=self.timing_images, seconds=self.timing_seconds)

        def measure(subsets: Sequence[Subset]) -> tuple[Mapping[Subset, float], Mapping[Subset, float]]:
            timing.subsets = tuple(dict.fromkeys(subsets))
            _validate(timing, data, settings, folder, limit_val_batches=1)
            return of_first(lambda: (dict(timing.milliseconds), dict(timing.unsteadiness)))

        def evaluate(subsets: Sequence[Subset]) -> list[SubsetScore]:
            scoring.subsets = tuple(subsets)
            _validate(scoring, data, settings, folder)
            return of_first(lambda: [self._score(subset, scoring, milliseconds, unsteadiness) for subset in subsets])

        try:
            milliseconds, unsteadiness = measure([(), *((name,) for name in everything), everything])
            choice = choose(everything, self.criterion, evaluate, search=self.search)
            again, unsteady = measure([(), choice.kept])
        finally:
            model.hub.attach_only(everything)
        found = Findings(
            choice,
            self.criterion,
            scoring.gate_mass,
            scoring.seen,
            again[()],
            again[choice.kept],
            max(unsteady.values()),
        )
        name = self._score_name(next(iter(scoring.metrics.values())))  # all subsets have the same
        out = folder / self.name
        of_first(lambda: found.write(out, score_name=name, settings=self._settings(), weights=weights))
        return choice.kept

    def _score(
        self,
        subset: Subset,
        scoring: SubsetScoring,
        milliseconds: Mapping[Subset, float],
        unsteadiness: Mapping[Subset, float],
    ) -> SubsetScore:
        metrics = scoring.metrics[subset]
        name = self._score_name(metrics)
        for wanted in (self.loss, name.removeprefix("-")):
            if wanted not in metrics:
                raise ConfigError(
                    f"ExpertDetachment: the validation data gives no {wanted!r}; it gives {', '.join(sorted(metrics))}."
                )
        score = -metrics[name[1:]] if name.startswith("-") else metrics[name]
        cost = interpolated_cost(subset, milliseconds)
        doubt = unsteadiness.get(subset, max(unsteadiness.values()))  # subsets between get sums of the others
        return SubsetScore(subset, metrics[self.loss], score, cost, scoring.gflop[subset], doubt)

    def _score_name(self, metrics: Mapping[str, float]) -> str:
        """Return the name of the score; a minus before it changes the sign of a loss."""
        if self.score is not None:
            return self.score
        return ACCURACY if ACCURACY in metrics else f"-{self.loss}"

    def _retune(
        self, model: FusingMethod, data: LightningDataModule, out: Path, settings: PhaseSettings, cost: CostReport
    ) -> bool:
        """Train the remaining model; return whether training finished."""
        if not self.retune_steps:
            return True
        trainer = settings.trainer(
            out,
            steps=self.retune_steps,
            checkpoint_every=self.checkpoint_every,
            cost=cost,
            val_check_interval=min(self.eval_every, self.retune_steps),
            check_val_every_n_epoch=None,
        )
        unfinished = out / "checkpoints" / TRAINING
        start = str(unfinished) if unfinished.is_file() else None
        with model.retuning(self.retune_lr, steps=self.retune_steps):
            trainer.fit(model, datamodule=data, ckpt_path=start, weights_only=True)
        return not trainer.interrupted

    def _tell(self, folder: Path, out: Path) -> None:
        """Say what was kept, and how it scores against the whole run."""
        if is_first():
            print(self._outcome(folder, out), flush=True)

    def _outcome(self, folder: Path, out: Path) -> str:
        facts = read_json(out / FACTS)
        asked = (self.score or usual_score(folder)).removeprefix("-")
        told = scores_told(folder, out, (f"test/{asked}", f"test/{self.loss}")) or ["The test data gives no score"]
        names = {key: ", ".join(facts[key]) or "none" for key in ("kept", "detached")}
        return (
            f"Kept: {names['kept']}; dropped: {names['detached']}; re-tuned for {self.retune_steps} steps. "
            f"{'; '.join(told)}."
        )

    def next_commands(self, folder: Path, out: Path) -> tuple[tuple[object, ...], ...]:
        """See :meth:`Phase.next_commands`."""
        comparing = ("compare", folder, out, "--out", folder / "compare")
        return (("merge", out), comparing) if read_json(out / FACTS)["kept"] else (comparing,)

    def _settings(self) -> dict[str, Any]:
        return {
            **asdict(self.criterion),
            "search": self.search,
            "loss": self.loss,
            "score": self.score,
            "images": self.images,
            "retune_steps": self.retune_steps,
            "retune_lr": self.retune_lr,
        }


@dataclass(frozen=True)
class Findings:
    """Results of a search.

    Args:
        choice: Scores, contributions and what is kept.
        criterion: By what.
        gate_mass: Mean gate of each expert over validation tokens, all experts attached; empty without a gate.
        images: Validation images that subsets were scored on.
        clip_ms: Time per image of the encoder alone, measured beside that of what is kept.
        kept_ms: Time per image of what is kept.
        unsteadiness: Of these two; see :class:`~visexpert.methods.tove.subset_search.SubsetScore`.
    """

    choice: Choice
    criterion: Criterion
    gate_mass: Mapping[str, float]
    images: int
    clip_ms: float
    kept_ms: float
    unsteadiness: float = 0.0

    def write(self, out: Path, *, score_name: str, settings: Mapping[str, Any], weights: str) -> None:
        """Write figures, ``detachment.md`` and, last, ``detachment.json``.

        Args:
            out: The phase's folder.
            score_name: What the score is.
            settings: Of the phase.
            weights: Identity of the model that was searched.
        """
        choice, measure, budget = self.choice, self.criterion.measure, self.criterion.latency_budget
        experts = tuple(contribution.expert for contribution in choice.contributions)
        front = [score.experts for score in pareto_front(choice.scores, measure=measure)]
        limit = None if budget is None else budget * choice.scores[0].cost(measure)
        with spared("pareto"):
            pareto_figure(
                choice.scores,
                out / "figures" / "pareto.png",
                front=front,
                kept=choice.kept,
                experts=experts,
                measure=measure,
                budget=limit,
                score_name=score_name,
            )
        with spared("contribution"):
            contribution_figure(choice.contributions, self.gate_mass, out / "figures" / "contribution.png")
        tables = contribution_table(choice.contributions, self.gate_mass, kept=choice.kept)
        tables += "\n" + subset_table(choice.scores, front=front, kept=choice.kept, experts=experts)
        write_text(out / "detachment.md", f"{self._summary(experts, settings, score_name)}\n{tables}")
        facts = {
            "settings": settings,
            "weights": weights,
            "experts": experts,
            "kept": choice.kept,
            "detached": choice.detached,
            "search": choice.search,
            "images": self.images,
            "contributions": [asdict(one) for one in choice.contributions],
            "gate_mass": self.gate_mass,
            "scores": [{**asdict(score), "front": score.experts in front} for score in choice.scores],
            "measured": {
                "clip_ms": self.clip_ms,
                "kept_ms": self.kept_ms,
                "ratio": self.kept_ms / self.clip_ms,
                "unsteadiness": self.unsteadiness,
            },
        }
        write_json(out / FACTS, facts)

    def _summary(self, experts: Subset, settings: Mapping[str, Any], score_name: str) -> str:
        given = ("min_contribution", "keep", "latency_budget")
        by = next(f"{name} = {settings[name]}" for name in given if settings[name] is not None)
        unit = f" ({self.criterion.measure})" if self.criterion.latency_budget is not None else ""
        mark = MARK * (self.unsteadiness > UNSTEADY)
        return (
            f"# Expert detachment\n\nKept: {subset_label(self.choice.kept, experts)}, by {by}{unit}, "
            f"{self.choice.search} search; {settings['loss']} and {score_name} on {self.images} validation "
            f"images. Measured once more, side by side, what is kept takes {mark}{self.kept_ms:.3f} ms per image, "
            f"{self.kept_ms / self.clip_ms:.2f} x the encoder alone.\n\nCosts are those of the vision side, encoders "
            "live. GFLOP is counted for each subset. Milliseconds are measured for the encoder alone, with each expert "
            f"and with all of them in turn; subsets between them get the sum of their parts.{self._footnote}\n"
        )

    @property
    def _footnote(self) -> str:
        """What a marked time means, where there is one."""
        doubts = (self.unsteadiness, *(score.unsteadiness for score in self.choice.scores))
        return f" {TOLD}." if max(doubts) > UNSTEADY else ""


def _validate(
    module: L.LightningModule, data: LightningDataModule, settings: PhaseSettings, folder: Path, **options: Any
) -> None:
    """Pass validation batches through a module as ``visexpert validate`` would; write nothing."""
    settings.scorer(folder, **options).validate(module, datamodule=data, verbose=False)
