"""Every file under configs/ trains two steps: its own precision, strategy, clipping, accumulation and callbacks.

What is replaced is said in tests/shipped_runs.py.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterator

import pytest

from tests.shipped_runs import NORM, ShippedRuns, Watch
from tests.test_configs import AT_SCALE as LARGE
from tests.test_configs import CONFIGS, FILES, base_of, before, is_overlay

STAGES = ("movekd/llava/", "movekd/tabletop-", "movekd/tabletop-paper-", "tove/paper/vicuna-")
"""What the names of files that train in two stages begin with, up to ``stage1.yaml``."""

OVER = {
    "hubs/movekd-v1.0.yaml": ("movekd/llava/stage1.yaml",),
    "hubs/movekd-v1.1.yaml": ("movekd/llava/stage2.yaml",),
    "hubs/tove.yaml": ("tove/paper/vit-b16.yaml",),
    "movekd/llava/13b.yaml": ("movekd/llava/stage1.yaml", "hubs/movekd-v1.0.yaml"),
    "movekd/llava/next.yaml": ("movekd/llava/stage2.yaml", "hubs/movekd-v1.0.yaml"),
    "movekd/llava/siglip2.yaml": ("movekd/llava/stage1.yaml", "hubs/movekd-v1.0.yaml"),
    "tove/siglip2-b16.yaml": ("tove/paper/vit-b16.yaml", "hubs/tove.yaml"),
    "tove/paper/vit-l14.yaml": ("tove/paper/vit-b16.yaml", "hubs/tove.yaml"),
    "tove/paper/questions.yaml": ("tove/paper/vit-b16.yaml", "hubs/tove.yaml"),
}
"""What files at the papers' scale are laid over."""

LATER = ("movekd/llava/next.yaml", "tove/paper/questions.yaml", "hybrid/gate-weighted.yaml", "zoo/language-2.yaml")
"""Files that no run has from which theirs starts."""

AT_SCALE = sorted(
    name
    for name in (path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
    if name.startswith(LARGE)
)
CHAINS = {name: (*base_of(name), *before(name), name) if is_overlay(name) else (name,) for name in FILES}
CHAINS |= {name: (*OVER.get(name, ()), name) for name in AT_SCALE}
CHAINS["zoo/language-2.yaml"] = ("tove/tabletop.yaml", "zoo/language.yaml", "zoo/language-2.yaml")
for stage in (1, 2):
    CHAINS[f"released over stage {stage}"] = (f"movekd/llava/stage{stage}.yaml", "movekd/released.yaml")

ROWS = [name for name in CHAINS if "/ablations/" in name]

ALONE = ("depth", "edges", "normals", "segmentation", "semantic", "semantic64", "top1")
UNMOVED = {f"tove/ablations/{name}.yaml": {"gate (no decay)"} for name in ALONE}
"""Groups that get no gradient: the gate of one expert, or of one kept, is 1 whatever its logits; the rest decays."""


def start_of(chain: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The files of the run that a chain starts from, and where in its folder that start is."""
    last = "checkpoints/last.ckpt"
    if chain[-1].startswith("hybrid/"):
        merged = chain[-1] == "hybrid/from-merged.yaml"
        over = ("tove/ablations/merge.yaml",) if merged else ()
        return ("tove/tabletop.yaml", *over), f"merged/{last}" if merged else last
    first = {f"{stage}stage2.yaml": f"{stage}stage1.yaml" for stage in STAGES}
    return tuple(first.get(name, name) for name in chain if name not in LATER), last


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShippedRuns]:
    with pytest.MonkeyPatch.context() as patch:
        yield ShippedRuns(tmp_path_factory.mktemp("shipped"), patch, start_of)


def test_every_file_is_in_a_chain() -> None:
    assert {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")} <= set(CHAINS)


def check_steps(name: str, losses: Collection[float], watch: Watch, clip: float | None) -> None:
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert len(watch.norms) == 2
    for norm in watch.norms:
        assert norm == pytest.approx(clip, rel=1e-2) if clip else 1.0 < norm <= NORM * 1.01
    still = {key for key, group in watch.groups.items() if group.lr > 0 and not group.moved}
    assert watch.groups and still == UNMOVED.get(name, set())
    assert sorted(watch.changed) == []


def check_run(name: str, shipped: ShippedRuns) -> None:
    run = shipped.run(CHAINS[name])
    assert run.steps == 2 and run.finished
    with (run.folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = [float(value) for row in rows for key, value in row.items() if "loss" in key and value]
    check_steps(name, losses, run.watch, run.clip)
    assert (run.folder / "checkpoints" / "last.ckpt").is_file()
    assert [phase for phase in run.phases if not (run.folder / phase / "metrics.json").is_file()] == []


@pytest.mark.parametrize("name", CHAINS)
def test_two_steps_of_every_file(name: str, shipped: ShippedRuns) -> None:
    """In a whole run; of a row of ablations that differs from such a run in the model alone, the steps."""
    assert shipped.settings(CHAINS[name])["trainer"]["max_steps"] > 0
    if len(CHAINS[name]) > 1:  # a row of ablations differs from its base; some repeat what a file between says
        assert shipped.settings(CHAINS[name]) != shipped.settings(CHAINS[name][:1])
    if name in ROWS and shipped.is_known(CHAINS[name]):
        steps = shipped.steps(CHAINS[name])
        check_steps(name, steps.losses.values(), steps.watch, steps.clip)
    else:
        check_run(name, shipped)


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_a_whole_run_of_every_row_of_ablations(name: str, shipped: ShippedRuns) -> None:
    check_run(name, shipped)
