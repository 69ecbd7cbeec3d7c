"""Parameter groups, the schedule, and starting from an earlier run's file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.methods.start import start_from
from visexpert.optim import ParameterGroup, cosine_factor, make_groups, scheduled


class Net(nn.Module):
    """One of each kind of parameter; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(3, 4, 2)
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))


def test_decay_is_for_matrices_only_and_each_parameter_comes_once() -> None:
    net, other = Net(), nn.Linear(2, 2)
    groups = make_groups([ParameterGroup("net", (net,), 0.1), ParameterGroup("other", (other,), 0.2)], weight_decay=0.5)
    members = {group["name"]: {id(parameter) for parameter in group["params"]} for group in groups}
    plain = [net.embed.weight, net.norm.weight, net.norm.bias, net.conv.bias, net.linear.bias, net.scale]
    assert members == {
        "net": {id(net.conv.weight), id(net.linear.weight)},
        "net (no decay)": {id(parameter) for parameter in plain},
        "other": {id(other.weight)},
        "other (no decay)": {id(other.bias)},
    }
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.1, 0.5),
        (0.1, 0.0),
        (0.2, 0.5),
        (0.2, 0.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters())) + 2
    torch.optim.AdamW(groups)  # which refuses a parameter that comes twice


def test_a_matrix_that_a_strategy_has_flattened_decays() -> None:
    linear = nn.Linear(3, 2)
    axes = {parameter: parameter.ndim for parameter in linear.parameters()}
    linear.weight.data = linear.weight.data.flatten()[:4]  # as FSDP leaves a process's share of it
    whole = [ParameterGroup("linear", (linear,), 0.1)]
    assert [group["weight_decay"] for group in make_groups(whole, weight_decay=0.5, axes=axes)] == [0.5, 0.0]


def test_an_empty_group_is_left_out_and_no_group_is_refused() -> None:
    made = make_groups(
        [ParameterGroup("none", (nn.GELU(),), 0.1), ParameterGroup("norm", (nn.LayerNorm(2),), 0.1)], weight_decay=0.1
    )
    assert [group["name"] for group in made] == ["norm (no decay)"]
    with pytest.raises(ConfigError, match="Nothing trains: every part is frozen; set language_lr above 0 or attach"):
        make_groups([ParameterGroup("none", (nn.GELU(),), 0.1)], weight_decay=0.1)


def rates(*, warmup_steps: int, total_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = cosine_factor(warmup_steps=warmup_steps, total_steps=total_steps)
    schedule: Any = scheduled(optimizer, factor)
    schedule = schedule["lr_scheduler"]["scheduler"]
    seen = []
    for _ in range(total_steps + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_schedule_by_hand() -> None:
    half = math.sqrt(0.5)
    assert rates(warmup_steps=4, total_steps=8) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    )


def test_warm_up_takes_at_most_half_of_a_short_run() -> None:
    seen = rates(warmup_steps=100, total_steps=6)
    assert seen[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and seen[-1] == 0.0
    assert max(seen) == 1.0


def test_starting_from_a_file_copies_what_is_shared(tmp_path: Path) -> None:
    donor, net = Net(), Net()
    state = {key: value.clone() for key, value in donor.state_dict().items() if not key.startswith("linear")}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        net = Net()
        fresh = net.linear.weight.clone()
        start_from(net, str(tmp_path / name))
        assert torch.equal(net.conv.weight, donor.conv.weight)
        assert torch.equal(net.linear.weight, fresh)


class Malicious:
    """Would run code where a pickle is trusted."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


def test_files_that_cannot_be_a_start_are_refused(tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(
        WeightsError, match=r"there is no checkpoint .*absent.ckpt; let the run that it belongs to finish"
    ):
        start_from(net, str(tmp_path / "absent.ckpt"))
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        start_from(net, str(tmp_path))
    torch.save({"state_dict": {"a": Malicious()}}, tmp_path / "evil.ckpt")
    with pytest.raises(WeightsError, match="cannot be read: it is damaged"):
        start_from(net, str(tmp_path / "evil.ckpt"))
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "evil.ckpt").read_bytes()[:50])
    with pytest.raises(WeightsError, match="cannot be read: it is damaged"):
        start_from(net, str(tmp_path / "cut.ckpt"))
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(WeightsError, match="holds no state_dict"):
        start_from(net, str(tmp_path / "other.ckpt"))
    torch.save({"state_dict": {"unknown": torch.zeros(1)}}, tmp_path / "stranger.ckpt")
    with pytest.raises(WeightsError, match="shares no tensor"):
        start_from(net, str(tmp_path / "stranger.ckpt"))
    torch.save({"state_dict": {"linear.weight": torch.zeros(1)}}, tmp_path / "shape.ckpt")
    with pytest.raises(WeightsError, match=r"of other shapes, such as .*linear\.weight \(1,\) instead of \(4, 4\)"):
        start_from(net, str(tmp_path / "shape.ckpt"))
