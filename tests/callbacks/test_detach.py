"""Detachment of a tiny model: its figures against ``validate``, what is left, and what happens when it is killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.data.formats import write_json
from tests.methods.helpers import bare_trainer, logits_of, noise_batch, shake, tiny_tove, trained_names
from tests.tabletop.quiet import QUIET
from visexpert.callbacks import detach as module
from visexpert.callbacks import phase
from visexpert.callbacks.detach import ExpertDetachment
from visexpert.callbacks.phase import PhaseSettings, write_checkpoint
from visexpert.callbacks.subsets import SubsetTiming, run_once
from visexpert.errors import ConfigError
from visexpert.methods import FusingMethod, ToVE
from visexpert.methods.cost import first_images, measure_cost
from visexpert.runs import build, load_run
from visexpert.tabletop import TabletopData
from visexpert.types import Batch, VisionTokens

CPU = PhaseSettings(accelerator="cpu")
NAMES = ("semantic", "depth", "edges")
QUICK: dict[str, Any] = {"timing_images": 2, "timing_seconds": 0.0, "retune_steps": 0}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and a run seed of this file's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(folder))
        patch.setenv("PL_GLOBAL_SEED", "3")
        yield folder


def scenes(**options: Any) -> TabletopData:
    """Eight scenes to train on, six to validate."""
    sizes = {"num_train": 8, "num_val": 6, "num_test": 2, "batch_size": 4, "eval_batch_size": 4}
    return TabletopData(rendering=QUIET, **{**sizes, **options})


def trained(**options: Any) -> ToVE:
    """A model whose experts all have a say."""
    model = shake(tiny_tove(**{"caption_images": 1, "meteor": False, **options}))
    model.mark_loaded()
    return model


def facts_of(out: Path) -> dict[str, Any]:
    facts = json.loads((out / "detachment.json").read_text(encoding="utf-8"))
    assert isinstance(facts, dict)
    return facts


def losses_of(facts: dict[str, Any]) -> dict[tuple[str, ...], float]:
    return {tuple(row["experts"]): row["loss"] for row in facts["scores"]}


def validated(model: ToVE, folder: Path, data: TabletopData | None = None) -> dict[str, float]:
    """What ``visexpert validate`` says."""
    trainer = bare_trainer(folder, steps=1, limit_val_batches=None)
    (scores,) = trainer.validate(model, datamodule=data or scenes(), verbose=False)
    return dict(scores)


@dataclass(frozen=True)
class Done:
    """A finished detachment: two of three experts are gone."""

    model: ToVE
    out: Path
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def done(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    model = trained()
    out = ExpertDetachment(keep=1, **QUICK).apply(model, scenes(), tmp_path_factory.mktemp("run"), CPU)
    return Done(model, out, facts_of(out))


@pytest.mark.parametrize("attached", [(), ("depth",), ("semantic", "edges"), NAMES])
def test_figures_are_those_of_validate(done: Done, tmp_path: Path, attached: Sequence[str]) -> None:
    model = trained(detached=[name for name in NAMES if name not in attached])
    scores = validated(model, tmp_path)
    (row,) = (row for row in done.facts["scores"] if row["experts"] == list(attached))
    assert row["loss"] == pytest.approx(scores["val/nll/nll"], rel=1e-6)
    assert row["score"] == pytest.approx(scores["val/vqa/accuracy"], abs=1e-6)


def test_every_subset_is_in_the_table_and_the_lowest_loss_of_its_size_is_kept(done: Done) -> None:
    losses = losses_of(done.facts)
    assert len(losses) == 8
    single = {subset: loss for subset, loss in losses.items() if len(subset) == 1}
    assert tuple(done.facts["kept"]) == min(single, key=lambda subset: single[subset])
    assert len(set(losses.values())) == 8  # every expert says something
    assert sorted([*done.facts["kept"], *done.facts["detached"]]) == sorted(NAMES)
    for contribution in done.facts["contributions"]:
        without = tuple(name for name in NAMES if name != contribution["expert"])
        assert contribution["loss"] == pytest.approx(losses[without] - losses[NAMES])


def test_what_is_left_equals_running_with_the_others_detached_to_the_bit(done: Done) -> None:
    batch = noise_batch()
    whole = trained(detached=done.facts["detached"]).eval()
    assert torch.equal(logits_of(done.model.eval(), batch), logits_of(whole, batch))


def test_detached_experts_are_gone_from_model_and_checkpoint(done: Done, tmp_path: Path) -> None:
    whole = trained()
    write_checkpoint(whole, tmp_path, steps=1)
    assert done.model.hub.names == tuple(done.model.adapters) == tuple(done.facts["kept"])
    gone = [nn.ModuleList([whole.hub[name], whole.adapters[name]]) for name in done.facts["detached"]]
    rows = 2 * (16 + 1)  # two rows of the gate on CLIP's 16 channels
    left = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for part in gone for p in part.parameters())
    assert sum(p.numel() for p in done.model.parameters()) == left - rows
    saved = done.out / "checkpoints" / "last.ckpt"
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert not [key for key in state if any(f".{name}." in key for name in done.facts["detached"])]
    assert saved.stat().st_size < (tmp_path / "checkpoints" / "last.ckpt").stat().st_size


def test_the_folder_is_a_runs(done: Done) -> None:
    files = {str(path.relative_to(done.out)) for path in done.out.rglob("*") if path.is_file()}
    expected = {"metrics.json", "environment.json", "detachment.json", "detachment.md", "checkpoints/last.ckpt"}
    assert expected | {"figures/pareto.png", "figures/contribution.png"} <= files
    metrics = json.loads((done.out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["test/nll/nll"] > 0
    assert metrics["cost/parameters_inference"] == sum(p.numel() for p in done.model.parameters())
    page = (done.out / "detachment.md").read_text(encoding="utf-8")
    assert page.count("**kept**") == 1 and f"Kept: {done.facts['kept'][0]}, by keep = 1" in page


def test_gate_mass_is_the_mean_gate_over_validation_tokens(done: Done) -> None:
    data = scenes()
    data.setup("validate")
    model, gates = trained().eval(), []
    for batch in data.val_dataloader():
        gates_BTK = model.encode(batch).gates_BTK
        assert gates_BTK is not None
        gates.append(gates_BTK.flatten(0, 1))
    mean = dict(zip(NAMES, torch.cat(gates).mean(0).tolist(), strict=True))
    assert done.facts["gate_mass"] == pytest.approx(mean, abs=1e-6)
    assert sum(done.facts["gate_mass"].values()) == pytest.approx(1, abs=1e-6)


def test_gflop_are_those_of_the_model_with_the_others_detached(done: Done) -> None:
    for attached in ((), ("depth",), ("semantic", "edges"), NAMES):
        model = trained(detached=[name for name in NAMES if name not in attached]).eval()
        cost = measure_cost(model, first_images(noise_batch(size=32), 1), seconds=0.0)
        (row,) = (row for row in done.facts["scores"] if row["experts"] == list(attached))
        assert row["gflop"] == pytest.approx(cost["gflop_vision"])
    times = {tuple(row["experts"]): row["milliseconds"] for row in done.facts["scores"]}
    assert 0 < times[()] < times[NAMES]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take longer than the tiny model."""
    monkeypatch.setattr(module, "pareto_figure", lambda *arguments, **options: None)
    monkeypatch.setattr(module, "contribution_figure", lambda *arguments, **options: None)
    monkeypatch.setattr(phase, "RunFigures", L.Callback)


@pytest.mark.usefixtures("undrawn")
def test_each_criterion_holds(tmp_path: Path, done: Done) -> None:
    """On the figures of the finished search, so that what must be kept is known."""
    losses = losses_of(done.facts)
    gflop = {tuple(row["experts"]): row["gflop"] for row in done.facts["scores"]}
    budget = 1.0001 * gflop["semantic", "edges"] / gflop[()]
    within = [subset for subset in losses if gflop[subset] <= budget * gflop[()]]
    best = min(within, key=lambda subset: losses[subset])
    price = (losses[()] - losses[best]) / (len(best) + 1)
    priced = min(losses, key=lambda subset: losses[subset] + price * len(subset))
    assert best not in ((), NAMES) and priced not in ((), NAMES)
    data, model = scenes(), trained()
    for criterion, kept in (
        ({"latency_budget": budget, "budget_measure": "gflop"}, best),
        ({"min_contribution": price, "search": "exhaustive"}, priced),
    ):
        work = ExpertDetachment(**criterion, **QUICK)
        assert work._find(model, data, tmp_path, CPU) == kept
        assert model.hub.attached == NAMES  # detaching for good comes later


@pytest.mark.usefixtures("undrawn")
def test_images_bounds_what_is_scored(tmp_path: Path) -> None:
    """Of batches of four and two images, five are scored: as if the split had five."""
    ExpertDetachment(keep=1, images=5, **QUICK)._find(trained(), scenes(), tmp_path, CPU)
    facts = facts_of(tmp_path / "detached")
    assert facts["images"] == 5
    five = validated(trained(), tmp_path, scenes(num_val=5))
    assert losses_of(facts)[NAMES] == pytest.approx(five["val/nll/nll"], rel=1e-5)


def _state(model: FusingMethod) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.usefixtures("undrawn")
def test_retuning_trains_what_is_left_and_nothing_else(tmp_path: Path) -> None:
    model, before = trained(lr=1e-4, language_lr=1e-4, language_frozen_steps=50), {}
    model.count_steps(7)

    class Watched(ExpertDetachment):
        def _retune(self, model: FusingMethod, *rest: Any) -> bool:
            before.update(_state(model))
            return super()._retune(model, *rest)

    work = Watched(keep=2, **{**QUICK, "retune_steps": 3}, retune_lr=0.01)
    out = work.apply(model, scenes(), tmp_path, CPU)
    after = dict(model.named_parameters())
    changed = {key for key, value in after.items() if not torch.equal(before[key], value)}
    assert changed == trained_names(model)
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == model.trained_steps == 10
    assert all(torch.equal(checkpoint["state_dict"][key], after[key]) for key in changed)
    assert (model.lr, model.language_lr, model.language_frozen_steps, model.warmup_steps) == (1e-4, 1e-4, 50, 2)
    moved = max(float((before[key] - after[key]).detach().abs().max()) for key in changed)
    assert 1e-3 < moved  # by the rate of re-tuning, not by the run's
    assert not (out / "checkpoints" / "training.ckpt").exists()


class KilledError(Exception):
    """The run dies here."""


@pytest.mark.usefixtures("undrawn")
def test_a_killed_detachment_is_not_finished_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any, **options: Any) -> None:
        raise KilledError

    work = ExpertDetachment(keep=1, **{**QUICK, "retune_steps": 1})
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(L.Trainer, "test", die)
        work.apply(trained(), scenes(), tmp_path, CPU)
    kept = facts_of(tmp_path / "detached")["kept"]
    with pytest.raises(ConfigError):
        load_run(tmp_path / "detached")
    monkeypatch.setattr(module, "choose", die)  # what was found is not searched for again
    first, again = trained(), trained()
    out = work.apply(first, scenes(), tmp_path, CPU)
    assert list(first.hub.names) == kept
    scored = (out / "metrics.json").stat().st_mtime_ns
    assert work.apply(again, scenes(), tmp_path, CPU) == out
    assert (out / "metrics.json").stat().st_mtime_ns == scored
    assert all(torch.equal(value, _state(again)[key]) for key, value in _state(first).items())  # re-tuned weights, too
    with pytest.raises(ConfigError, match=r"was begun with keep=1, now 2; give another name, or delete it"):
        ExpertDetachment(keep=2, **{**QUICK, "retune_steps": 1}).apply(trained(), scenes(), tmp_path, CPU)


@pytest.mark.usefixtures("undrawn")
def test_a_detachment_of_other_weights_is_set_aside(tmp_path: Path) -> None:
    work = ExpertDetachment(keep=1, **QUICK)
    work._find(trained(), scenes(), tmp_path, CPU)
    assert work._begun(trained(), tmp_path / "detached") is not None
    assert work._begun(shake(tiny_tove(), seed=5), tmp_path / "detached") is None
    assert (tmp_path / "detached.1" / "detachment.json").is_file()
    assert not (tmp_path / "detached").exists()


@pytest.mark.usefixtures("undrawn")
def test_it_follows_a_fit_and_reads_the_runs_feature_cache(tmp_path: Path) -> None:
    model = trained(folder=str(tmp_path / "features"), dtype="float32", lr=1e-3)
    work = ExpertDetachment(keep=1, **QUICK)
    trainer = bare_trainer(tmp_path, steps=2, callbacks=[work], limit_val_batches=None)
    data = scenes()
    trainer.fit(model, datamodule=data)
    assert model.trainer is trainer and data.trainer is trainer
    facts = facts_of(tmp_path / "detached")
    assert torch.load(tmp_path / "detached" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert losses_of(facts)[tuple(facts["kept"])] == pytest.approx(
        validated(model, tmp_path)["val/nll/nll"], rel=1e-4
    )  # live now: the finished model's loss is the one that the table says


@pytest.mark.usefixtures("undrawn")
def test_a_saved_detached_run_opens_and_says_what_the_table_says(tmp_path: Path, zoo_run: Path) -> None:
    run = load_run(zoo_run)
    assert isinstance(run.model, ToVE)
    out = ExpertDetachment(keep=1, **QUICK).apply(run.model, run.data, zoo_run, CPU)
    facts, opened = facts_of(out), load_run(out)
    assert isinstance(opened.model, ToVE)
    assert opened.model.hub.names == tuple(facts["kept"]) and opened.steps == 5
    assert isinstance(opened.data, TabletopData)
    loss = validated(opened.model, tmp_path, opened.data)["val/nll/nll"]
    assert loss == pytest.approx(losses_of(facts)[tuple(facts["kept"])], rel=1e-6)


@pytest.fixture
def zoo_run(tmp_path: Path) -> Path:
    """A run of shipped encoders, written by hand: random weights stand for trained ones."""
    experts = {
        name: {"class_path": "visexpert.tabletop.TinyExpert", "init_args": {"source": f"zoo:{name}"}}
        for name in ("edges", "depth")
    }
    decoder = {"vocab_size": 96, "width": 8, "depth": 1, "heads": 2}
    model = {
        "clip": {"class_path": "visexpert.vision.ClipEncoder", "init_args": {"source": "zoo:clip"}},
        "experts": experts,
        "language": {"class_path": "visexpert.language.CrossAttentionDecoder", "init_args": decoder},
        "gate": {"top_k": 2},
        "evaluation": {"caption_images": 1, "meteor": False},
    }
    sizes = {
        "num_train": 8,
        "num_val": 6,
        "num_test": 2,
        "batch_size": 4,
        "eval_batch_size": 4,
    }
    config = {
        "model": {"class_path": "visexpert.methods.ToVE", "init_args": model},
        "data": {
            "class_path": "visexpert.tabletop.TabletopData",
            "init_args": {**sizes, "rendering": {"workers": 0, "progress": False}},
        },
        "trainer": {"accelerator": "cpu"},
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    built, _ = build(config, folder / "config.yaml")
    assert isinstance(built, ToVE)
    write_checkpoint(shake(built), folder, steps=5)
    return folder


def test_milliseconds_are_ratios_to_clip_in_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slows down by half from turn to turn; CLIP takes 1 s in the first, depth 2 s more, edges 3 s."""
    model, clock, calls = tiny_tove(), [0.0], [0]
    seconds = {"semantic": 0.0, "depth": 2.0, "edges": 3.0}

    def encode(batch: Batch) -> VisionTokens:
        turn = calls[0] // 3
        calls[0] += 1
        clock[0] += 1.5**turn * (1 + sum(seconds[name] for name in model.hub.attached))
        assert batch.split == ""  # live, past any cache
        return VisionTokens(torch.zeros(2, 4, 8), (2, 2))

    monkeypatch.setattr("visexpert.callbacks.subsets.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(model, "encode", encode)
    timing = SubsetTiming(model, images=2, turns=3, seconds=0.0)
    timing.subsets = ((), ("depth",), ("depth", "edges"))
    timing.validation_step(noise_batch(), 0)
    clip_ms = 1000 * 1.5**2 / 2  # the second of three turns after the one that warms up
    expected = {(): clip_ms, ("depth",): 3 * clip_ms, ("depth", "edges"): 6 * clip_ms}
    assert timing.milliseconds == pytest.approx(expected)
    # Turns of 1.5, 1.5**2 and 1.5**3: quartiles halfway to the median.
    spread = (1.5**3 - 1.5) / 2 / 1.5**2
    assert min(timing.unsteadiness.values()) >= spread - 1e-9


def test_a_module_runs_once_and_is_itself_again() -> None:
    calls: list[float] = []

    class Counted(nn.Module):
        def forward(self, number: Tensor) -> Tensor:
            calls.append(float(number))
            return number + 1

    counted = Counted()
    with run_once([counted]):
        assert [float(counted(torch.tensor(number))) for number in (1.0, 5.0)] == [2.0, 2.0]
    assert float(counted(torch.tensor(5.0))) == 6.0
    assert calls == [1.0, 5.0]


def test_a_score_that_the_data_does_not_give_is_named(tmp_path: Path) -> None:
    model = trained()
    work = ExpertDetachment(keep=1, score="vqa/acuracy", **QUICK)
    with pytest.raises(ConfigError, match=r"gives no 'vqa/acuracy'; it gives .*vqa/accuracy"):
        work.apply(model, scenes(), tmp_path, CPU)
    assert model.hub.attached == NAMES


def test_a_model_without_experts_has_nothing_to_detach(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no expert to detach"):
        ExpertDetachment(keep=0, **QUICK).apply(trained(use=[]), scenes(), tmp_path, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one criterion, got none"),
        ({"keep": 1, "latency_budget": 2.0}, "one criterion, got keep=1, latency_budget=2.0"),
        ({"keep": 1, "images": 0}, "images=0 must be at least 1"),
        ({"keep": 1, "retune_steps": -1}, "retune_steps=-1 must be at least 0"),
        ({"keep": 1, "retune_lr": 0.1, "retune_steps": 0}, "retune_lr=0.1 with retune_steps=0 trains nothing"),
        ({"keep": 1, "name": "a/b"}, "name='a/b' must be a plain folder name"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    make: Callable[..., ExpertDetachment] = ExpertDetachment
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_the_outcome_tells_the_scores_that_the_data_has(tmp_path: Path) -> None:
    phase, out = ExpertDetachment(keep=1), tmp_path / "detached"
    write_json(out / "detachment.json", {"kept": ["a"], "detached": ["b"]})
    write_json(tmp_path / "metrics.json", {"test/caption/cider": 0.5, "test/nll/nll": 1.5})
    write_json(out / "metrics.json", {"test/caption/cider": 0.25, "test/nll/nll": 1.75})
    told = phase._outcome(tmp_path, out)
    assert "test/caption/cider 0.5 before, 0.25 after" in told and "test/nll/nll 1.5 before, 1.75 after" in told
    assert "accuracy" not in told and "unknown" not in told


@pytest.mark.parametrize("kept", [["a"], []])
def test_a_run_without_experts_is_not_offered_for_merging(tmp_path: Path, kept: list[str]) -> None:
    out = tmp_path / "detached"
    write_json(out / "detachment.json", {"kept": kept, "detached": ["b"]})
    for folder in (tmp_path, out):
        write_json(folder / "metrics.json", {"test/nll/nll": 1.5})
    then = ExpertDetachment(min_contribution=0.1).next_commands(tmp_path, out)
    assert (("merge", out) in then) == bool(kept)
    assert then[-1][:3] == ("compare", tmp_path, out)
