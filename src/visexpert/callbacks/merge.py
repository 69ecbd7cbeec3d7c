"""Knowledge merging as a phase of a run: RUN/merged, one encoder that needs none of the hub's experts."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from visexpert.errors import ConfigError
from visexpert.io.run_files import read_json, set_aside, write_json
from visexpert.methods import FusingMethod, MergeStudent, Merging
from visexpert.methods.settings import MergeSettings, MergingOptimizer
from visexpert.processes import is_first, of_first
from visexpert.report import read_metrics

log = logging.getLogger(__name__)

FACTS = "merge.json"


class KnowledgeMerging(Phase):
    """Merge the encoder and its experts into one plain encoder (ToVE's knowledge merging), after training or later.

    Writes RUN/merged, a run of its own: configuration, scores, checkpoint and ``merge.json`` (how it came about, and
    the license of each expert that contributed). An interrupted merge goes on from its last checkpoint when the same
    command is given again; a finished one is not done again.

    Args:
        steps: Optimizer steps; null is as many as the run had.
        student: Merge into an encoder with MoLE, as MoVE-KD's student has; null for a plain one. `visexpert export` can
            keep it or fold it into a plain encoder.
        merging: What trains, and against what.
        optimizer: Rates and schedule.
        data: Other images to merge on, with or without text (the token distance needs none); null takes the run's.
        eval_every: Steps between scores on the validation scenes.
        checkpoint_every: Steps between checkpoints.
        caption_images: Test images that get a generated caption; null takes the run's number.
        test: Score the merged encoder on the test images; false for tuning, which must not see them.
        name: Folder inside the run's.
    """

    def __init__(
        self,
        *,
        steps: int | None = 2000,
        student: MergeStudent | None = None,
        merging: MergeSettings = MergeSettings(),
        optimizer: MergingOptimizer = MergingOptimizer(),
        data: LightningDataModule | None = None,
        eval_every: int = 500,
        checkpoint_every: int = 250,
        caption_images: int | None = None,
        test: bool = True,
        name: str = "merged",
    ) -> None:
        super().__init__(name=name)
        for key, number in (("steps", steps), ("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
            if number is not None and number < 1:
                raise ConfigError(f"KnowledgeMerging: {key}={number} must be at least 1.")
        self.wanted_steps, self.steps = steps, steps or 0
        self.eval_every, self.checkpoint_every = eval_every, checkpoint_every
        self.data = data
        self.student = student
        self.caption_images, self.test = caption_images, test
        self.merging, self.optimizer = merging, optimizer

    def check_start(self, model: FusingMethod) -> None:
        """See :meth:`Phase.check_start`.

        Raises:
            ConfigError: There is no expert to merge.
        """
        if not model.hub.attached:
            raise ConfigError("KnowledgeMerging: the model uses no expert, so there is nothing to merge; take it out.")

    def apply(self, model: FusingMethod, data: LightningDataModule, folder: Path, settings: PhaseSettings) -> Path:
        """Train the student, score it, save it. See :meth:`Phase.apply`."""
        out = folder / self.name
        self.steps = self.wanted_steps or max(model.trained_steps, 1)
        if of_first(lambda: self._is_done(model, out)):
            log.info("%s is merged already; delete it, or give another name, to merge again.", out)
            self._tell(folder, out)
            return out
        if not model.hub.attached:
            raise ConfigError(f"KnowledgeMerging: '{folder}' uses no experts, so there is nothing to merge.")
        of_first(lambda: write_json(out / FACTS, self._facts(model, folder)))
        evaluation = model.evaluation
        if self.caption_images is not None:
            evaluation = replace(evaluation, caption_images=self.caption_images)
        with torch.random.fork_rng():
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))  # low-rank updates start at random
            student = Merging(
                teacher=model,
                student=self.student,
                merging=self.merging,
                optimizer=self.optimizer,
                evaluation=evaluation,
            )
        teacher_steps = model.trained_steps
        cost = CostReport()
        if not self._train(student, data if self.data is None else self.data, out, settings, cost):
            return out
        merged = student.merged()
        merged.count_steps(teacher_steps + self.steps)
        mole = None if self.student is None else self.student.mole
        kept: dict[str, Any] = {"keep_pooled": self.merging.keep_pooled} if self.merging.keep_pooled > 0 else {}
        derived = partial(merged.merged_config, clip_lr=self.optimizer.lr, mole=mole, **kept)
        of_first(lambda: write_derived_config(folder, out, derived))
        if self.test:
            settings.trainer(out, cost=cost).test(merged, datamodule=data, verbose=False)
        write_checkpoint(merged, out, steps=teacher_steps + self.steps)
        self._tell(folder, out)
        return out

    def _tell(self, folder: Path, out: Path) -> None:
        """Say how far the student's tokens came, and how it scores against the whole run."""
        if is_first():
            print(self._outcome(folder, out), flush=True)

    def _outcome(self, folder: Path, out: Path) -> str:
        curves = read_metrics(out / "metrics.csv")
        told = [
            f"{name} {values[0]:.4g} at the start, {values[-1]:.4g} at the end"
            for name, (_, values) in curves.items()
            if name == "train/nmse"
        ]
        told += scores_told(folder, out, (f"test/{usual_score(folder)}", "test/nll/nll"))
        return f"Merged in {self.steps} steps{''.join(f'; {each}' for each in told)}."

    def next_commands(self, folder: Path, out: Path) -> tuple[tuple[object, ...], ...]:
        """See :meth:`Phase.next_commands`."""
        exported = out.with_name(f"{out.name}-encoder")
        return ("export", folder, "--out", exported), ("caption", out, "IMAGE")

    def _train(
        self, student: Merging, data: LightningDataModule, out: Path, settings: PhaseSettings, cost: CostReport
    ) -> bool:
        """Return whether training finished."""
        trainer = settings.trainer(
            out,
            steps=self.steps,
            checkpoint_every=self.checkpoint_every,
            cost=cost,
            val_check_interval=min(self.eval_every, self.steps),
            check_val_every_n_epoch=None,
        )
        unfinished = out / "checkpoints" / TRAINING
        start = str(unfinished) if unfinished.is_file() else None
        if start is not None:
            log.info("Resuming from %s.", start)
        trainer.fit(student, datamodule=data, ckpt_path=start, weights_only=True)
        return not trainer.interrupted

    def _settings(self) -> dict[str, Any]:
        student = None if self.student is None else asdict(self.student)
        settings = {"steps": self.steps, "student": student, **asdict(self.merging), **asdict(self.optimizer)}
        return dict(json.loads(json.dumps(settings)))  # as they are read back

    def _facts(self, model: FusingMethod, folder: Path) -> dict[str, Any]:
        return {
            "run": str(folder),
            "weights": weights_identity(model),
            **self._settings(),
            "data": None if self.data is None else type(self.data).__name__,
            "teacher_steps": model.trained_steps,
            "layer": model.clip.layer,
            "fusion_space": model.fusion_space,
            "clip_license": model.clip.license,
            "experts": {name: model.hub[name].license for name in model.hub.attached},
        }

    def _is_done(self, model: FusingMethod, out: Path) -> bool:
        """Return whether the folder holds a finished merge; refuse other settings, set aside one of other weights."""
        if (out / FACTS).is_file():
            before = read_json(out / FACTS)
            other = [
                f"{key}={before.get(key)!r}, now {value!r}"
                for key, value in self._settings().items()
                if before.get(key) != value
            ]
            if other:
                raise ConfigError(
                    f"KnowledgeMerging: '{out}' was begun with {'; '.join(other)}; give another name, or delete it."
                )
            if before.get("weights") not in (None, weights_identity(model)):
                log.info("%s was merged from other weights; it is kept as %s.", out, set_aside(out))
        return (out / "checkpoints" / "last.ckpt").is_file()
