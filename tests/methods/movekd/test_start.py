"""MoVE-KD from another run: its stages, ToVE's gate, and checkpoints that are of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.helpers import (
    bare_trainer,
    noise_batch,
    shake,
    tiny_tove,
    trained_names,
)
from tests.methods.movekd.helpers import (
    MOLE,
    STAGE_1,
    MakeData,
    as_teacher,
    saved,
    shaken,
    tiny_movekd,
    unit,
)
from visexpert.errors import ConfigError, WeightsError
from visexpert.transfer import GateSettings


def test_the_gate_of_a_tove_run_weighs_the_teachers_is_frozen_and_saved(tmp_path: Path, data: MakeData) -> None:
    tove = shake(tiny_tove(noise="learned"))
    start = saved(tmp_path, tove, data)
    model = tiny_movekd(depth=2, teachers="gate", init_from=start, clip_teacher_weight=0.3)
    seen: list[Tensor] = []
    model.distillation.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["gates_BTK"]), with_kwargs=True
    )
    model.setup("fit")
    batch = noise_batch()
    output = model.train().step(batch)
    expected_BTK = tove.eval().encode(batch).gates_BTK
    assert expected_BTK is not None and expected_BTK.std() > 0.01
    torch.testing.assert_close(seen[0], expected_BTK)
    share_BTK = torch.cat([torch.full_like(expected_BTK[..., :1], 0.3), 0.7 * expected_BTK], dim=-1)
    assert model.anchor is not None
    images_BCHW = unit(batch)
    teachers = {"clip": as_teacher(model.anchor, images_BCHW)} | model.hub(batch)
    fresh = tiny_movekd(depth=2, teachers="gate", init_from=start)
    fresh.setup("fit")
    fresh.train()
    errors = []
    for name, head in fresh.distillation.heads.items():
        pair = head(model.clip(images_BCHW).tokens_BTD, teachers[name])
        errors.append((pair.prediction_BTX - pair.target_BTX).square().mean(-1))
    kd = (torch.stack(errors, dim=-1) * share_BTK).sum(-1).mean()
    torch.testing.assert_close(output.parts["kd_loss"], kd, rtol=1e-4, atol=1e-6)

    trained = tiny_movekd(depth=2, teachers="gate", init_from=start)
    path = saved(tmp_path, trained, data, "hybrid.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    for key, value in tove.state_dict().items():
        if key.startswith("gate.") and not key.startswith("gate.noise_width."):
            assert torch.equal(state[key], value), key
    assert not any(name.startswith("gate.") for name in trained_names(trained))


def test_a_gate_that_does_not_fit_is_refused(tmp_path: Path, data: MakeData) -> None:
    with pytest.raises(ConfigError, match="reads the gate of a ToVE run; name its checkpoint by init_from"):
        tiny_movekd(teachers="gate").setup("fit")
    tiny_movekd(teachers="gate").setup("test")  # a finished run has it in its own checkpoint
    start = saved(tmp_path, tiny_tove(use=["semantic", "edges"]), data)
    with pytest.raises(ConfigError, match=r"weighs \['semantic', 'edges'\], not \['depth'\], which are experts here"):
        tiny_movekd(depth=2, teachers="gate", init_from=start).setup("fit")
    others: dict[str, dict[str, Any]] = {"two": {"hidden": 4}, "even": {"gate": GateSettings(kind="uniform")}}
    for name, options in others.items():
        start = saved(tmp_path, tiny_tove(**options), data, f"{name}.ckpt")
        with pytest.raises(WeightsError, match=r"lacks .*'gate.logits.weight'.*, which must come from there"):
            tiny_movekd(depth=2, teachers="gate", init_from=start).setup("fit")


def test_the_second_stage_starts_from_all_of_the_first(tmp_path: Path, data: MakeData) -> None:
    first = tiny_movekd(**STAGE_1)
    start = saved(tmp_path, first, data)
    second = tiny_movekd(seed=0, init_from=start, init_complete=True)
    shaken(second, seed=9).setup("fit")
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not second.distillation.get_buffer("variance_start_student").isnan()
    with pytest.raises(WeightsError, match="there is no checkpoint .*absent.ckpt"):
        tiny_movekd(init_from=str(tmp_path / "absent.ckpt"), init_complete=True).setup("fit")
    with pytest.raises(ConfigError, match="init_complete needs .* init_from"):
        tiny_movekd(init_complete=True).setup("fit")
    with pytest.raises(WeightsError) as caught:
        tiny_movekd(plain=True, init_from=start, init_complete=True).setup("fit")
    extra = {key for key in first.state_dict() if MOLE.match(key)}
    assert extra and all(f"'{key}'" in str(caught.value) for key in extra)


def test_a_start_from_another_method_takes_its_own_variance_as_start(tmp_path: Path, data: MakeData) -> None:
    start = saved(tmp_path, tiny_movekd(use=["semantic"], alignment="to_student"), data)
    model = tiny_movekd(init_from=start)  # other teachers, another alignment
    model.setup("fit")
    assert all(value.isnan() for key, value in model.state_dict().items() if "variance_start" in key)


def test_a_run_goes_on_without_the_run_that_it_started_from(tmp_path: Path, data: MakeData) -> None:
    start = saved(tmp_path, tiny_movekd(**STAGE_1), data)
    path = saved(tmp_path, tiny_movekd(init_from=start, init_complete=True), data, "own.ckpt")
    Path(start).unlink()
    with pytest.raises(WeightsError, match="there is no checkpoint .*start.ckpt; let the run"):
        tiny_movekd(init_from=start, init_complete=True).check_start()
    second = shaken(tiny_movekd(init_from=start, init_complete=True))
    second.continue_run()
    bare_trainer(tmp_path, steps=1).fit(second, datamodule=data(), ckpt_path=path, weights_only=True)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in state.items())


OTHERS: list[tuple[dict[str, Any], str]] = [
    (
        {"plain": True},
        r"is of another model: missing none, unexpected \['clip.model.encoder.layers.0.mlp.fc1_experts.*more",
    ),
    ({"mole": {"rank": 3}}, r"another model: .*of another shape \['.* \(3, 2, 16\) instead of \(3, 3, 16\)'.* more"),
    ({"use": ["edges"]}, r"another model: missing none, unexpected \['distillation.heads.depth"),
    (
        STAGE_1,
        r"another training: that one trained fusion \(\d+\), .*clip \(\d+\), .* this one would train .*init_from",
    ),
]


@pytest.mark.parametrize(("options", "message"), OTHERS, ids=["no MoLE", "other rank", "fewer teachers", "stage 1"])
def test_a_checkpoint_of_another_student_or_stage_is_not_continued(
    tmp_path: Path, data: MakeData, options: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path, tiny_movekd(), data)
    with pytest.raises(WeightsError, match=message) as caught:
        bare_trainer(tmp_path, steps=2).fit(
            tiny_movekd(**options), datamodule=data(), ckpt_path=path, weights_only=True
        )
    assert str(caught.value).startswith(f"The checkpoint {path} ") and "init_from" in str(caught.value)


def test_a_start_from_another_student_is_named(tmp_path: Path, data: MakeData) -> None:
    path = saved(tmp_path, tiny_movekd(mole={"rank": 3}), data)
    with pytest.raises(WeightsError, match=r"other shapes, such as \['.*; give a run of the same sizes"):
        tiny_movekd(init_from=path).setup("fit")
