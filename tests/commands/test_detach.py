"""``visexpert detach RUN``: from the command line to a run that scores itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from visexpert.callbacks.phase import write_checkpoint
from visexpert.cli import main
from visexpert.runs import build, load_run

QUICK = ["--timing_seconds", "0", "--timing_images", "2"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and a run seed of this file's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(folder))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        yield folder


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two shipped experts, untrained."""
    model = {
        "clip": {"class_path": "visexpert.vision.ClipEncoder", "init_args": {"source": "zoo:clip"}},
        "experts": {
            name: {"class_path": "visexpert.tabletop.TinyExpert", "init_args": {"source": f"zoo:{name}"}}
            for name in ("depth", "edges")
        },
        "language": {
            "class_path": "visexpert.language.CrossAttentionDecoder",
            "init_args": {"vocab_size": 96, "width": 8, "depth": 1, "heads": 2},
        },
        "evaluation": {"caption_images": 0},
    }
    data = {
        "num_train": 8,
        "num_val": 4,
        "num_test": 2,
        "batch_size": 4,
        "rendering": {"workers": 0, "progress": False},
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": "visexpert.methods.ToVE", "init_args": model},
        "data": {"class_path": "visexpert.tabletop.TabletopData", "init_args": data},
        "trainer": {"accelerator": "cpu"},
    }
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    built, _ = build(config, folder / "config.yaml")
    write_checkpoint(built, folder, steps=5)  # type: ignore[arg-type]
    return folder


def test_a_run_is_detached_by_the_command_and_scored_by_another(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["detach", str(run), "--keep", "1", "--retune_steps", "2", "--name", "one", *QUICK])
    out = run / "one"
    captured = capsys.readouterr()
    assert f"Done: {out}" in captured.out
    facts = json.loads((out / "detachment.json").read_text(encoding="utf-8"))
    told, scored = captured.out + captured.err, json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert f"Kept: {facts['kept'][0]}; dropped: {facts['detached'][0]}; re-tuned for 2 steps" in told
    assert f"test/vqa/accuracy unknown before, {scored['test/vqa/accuracy']:.4g} after" in told
    done, then = captured.out.splitlines()[-2:]
    assert done.startswith(f"Done: {out} ")
    assert then == f"Next: visexpert merge {out}, or visexpert compare {run} {out} --out {run}/compare"
    saved = load_run(out)
    assert saved.steps == 7
    assert list(saved.config["model"]["init_args"]["experts"]) == facts["kept"]
    assert len(facts["kept"]) == len(facts["detached"]) == 1
    before = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    main(["test", str(out), "--trainer.accelerator", "cpu"])
    after = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert after["test/nll/nll"] == pytest.approx(before["test/nll/nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one criterion, got none; set one of min_contribution, keep, latency_budget"),
        (["--keep", "3"], "keep is 3, but the model has 2 experts: depth, edges"),
        (["--latency_budget", "0.5"], "latency_budget must be a finite multiple of the encoder's own cost"),
        (["--kep", "1"], "There is no setting 'kep'; did you mean 'keep'"),
    ],
)
def test_what_cannot_be_ends_with_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["detach", str(run), "--name", "never", *QUICK, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (run / "never").exists()
