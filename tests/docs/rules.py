"""The one list of commands on pages that do not run as they are typed: what runs instead, or nothing, and why.

A command without a rule runs as it stands, so that a new one cannot hide. A rule that no command needs fails a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SCENES = (
    *("--data.init_args.num_train=24", "--data.init_args.num_val=8", "--data.init_args.num_test=8"),
    "--data.init_args.rendering.workers=0",
)
STEPS = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu")
SMALL = (*SCENES, *STEPS)
CAPTIONS = "--model.init_args.evaluation.caption_images=2"
ALONE = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
ONE_PROCESS = (*STEPS, *ALONE, "--overwrite")


@dataclass(frozen=True)
class Rule:
    """What becomes of a command; of several rules that fit, the one with the longest beginning counts.

    Args:
        begin: How the command begins.
        why: Why it does not run as it stands.
        add: What is added to it.
        instead: What takes the place of the beginning; None keeps it, and () leaves the command out.
        page: The page on which it stands; None for every page.
        code: The exit code with which it ends.
        parsed: Whether a fit is only parsed.
    """

    begin: str
    why: str
    add: tuple[str, ...] = ()
    instead: tuple[str, ...] | None = None
    page: str | None = None
    code: int = 0
    parsed: bool = False

    def fits(self, page: str, words: Sequence[str]) -> bool:
        """Return whether the rule is on this command."""
        begin = self.begin.split()
        return self.page in (None, page) and list(words[: len(begin)]) == begin

    def applied(self, words: Sequence[str]) -> list[str]:
        """Return the words that run; none where the command is left out."""
        if self.instead == ():
            return []
        rest = words[len(self.begin.split()) :]
        return [*(self.begin.split() if self.instead is None else self.instead), *rest, *self.add]


RULES = (
    # What a page says for another machine or a person; nothing runs.
    Rule("git clone", "needs the network", instead=()),
    Rule("cd visexpert", "goes with git clone", instead=()),
    Rule("source .venv/bin/activate", "belongs to a shell; .ci/run sets the same environment up", instead=()),
    Rule("pip install", "installs packages; .ci/check-wheel installs the wheel", instead=()),
    Rule("pre-commit install", "changes the clone", instead=()),
    Rule("python -m pytest", "is what runs this", instead=()),
    Rule("visexpert demo", "takes minutes; .ci/check-wheel runs it with --smoke", instead=()),
    Rule("lmms-eval", "is another program and needs its data; its plug-in has tests/integrations", instead=()),
    Rule(
        "visexpert plan --config movekd/llava/stage1",
        "needs the configurations of published models; tests/planning counts the same models",
        instead=(),
    ),
    Rule("visexpert import FOLDER", "needs released weights; tests/commands has a file of their form", instead=()),
    Rule(
        "visexpert export runs/movekd --format llava",
        "needs a run with a causal language model; tests/commands/test_export.py exports one",
        instead=(),
    ),
    Rule(
        "python -m benchmarks.stage1_step",
        "minutes at true sizes, a GPU, or the released code; tests/benchmarks has it at tiny sizes",
        instead=(),
    ),
    Rule("python -m benchmarks.whole_step", "minutes, and 15 GB", instead=()),
    # The nearest thing that runs on two cores without a network.
    Rule("make", "trains, or sets up an environment: make says what it would run", ("--dry-run",)),
    Rule(
        "torchrun --nproc_per_node 8 -m visexpert.cli fit",
        "8 GPUs",
        (*STEPS, *ALONE, "--overwrite"),
        ("visexpert", "fit"),
    ),
    Rule(
        "torchrun --nproc_per_node 8 -m visexpert.cli extract",
        "8 GPUs",
        instead=("visexpert", "extract"),
    ),
    Rule(
        "visexpert extract --engine ray --workers 8",
        "Ray",
        instead=("visexpert", "extract"),
    ),
    Rule("srun visexpert extract", "Slurm", instead=("visexpert", "extract")),
    Rule("srun visexpert fit", "Slurm", (*STEPS, *ALONE, "--overwrite"), ("visexpert", "fit")),
    Rule("visexpert fit --config mine.yaml", "GPUs", (*STEPS, *ALONE, "--overwrite"), page="clusters.md"),
    Rule(
        "visexpert fit --config mine.yaml --run runs/mine --ckpt_path last",
        "goes on from a run of two steps",
        (*ALONE, "--trainer.max_steps=4"),
        page="clusters.md",
    ),
    Rule("visexpert fit --config movekd/llava/stage1", "needs CLIP, Vicuna and LLaVA's data", parsed=True),
    Rule("visexpert fit --config tove/smoke --config wandb.yaml", "needs the package wandb", parsed=True),
    Rule("visexpert fit --config tove/smoke --config mlflow.yaml", "needs the package mlflow", parsed=True),
    Rule("visexpert data check movekd/llava/stage1", "says that LLaVA's data is missing", code=2),
    Rule("visexpert try facebook/dinov2-large", "says that the model is missing", code=2),
    Rule("visexpert serve", "runs until it is stopped: asked for its page once, or parsed where gradio is missing"),
    # The same command, with fewer steps and scenes.
    Rule("python -m benchmarks.mole_speed", "minutes", ("--rounds", "2")),
    Rule("visexpert fit", "minutes", (*SMALL, CAPTIONS)),
    Rule("visexpert fit --config movekd/encoder-only", "minutes; it writes no captions", SMALL),
    Rule("visexpert fit --config adapter_tuning.yaml", "is small as it stands"),
    Rule("visexpert fit --config tove/tabletop --config mine.yaml", "minutes", STEPS, page="quickstart.md"),
    Rule(
        "visexpert fit --config tove/tabletop --run runs/tove --ckpt_path last",
        "goes on from a run of two steps",
        (*SMALL, CAPTIONS, "--trainer.max_steps=4"),
    ),
    Rule("visexpert detach", "minutes", ("--retune_steps", "2")),
    Rule("visexpert merge", "minutes", ("--steps", "2")),
)


def rule_of(page: str, words: Sequence[str]) -> Rule | None:
    """Return the rule for a command of a page, or None: it runs as it stands."""
    found = [rule for rule in RULES if rule.fits(page, words)]
    return max(found, key=lambda rule: len(rule.begin.split()), default=None)
