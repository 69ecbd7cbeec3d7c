"""How far times can be trusted: by hand-made repeats and a hand-written ``/proc/stat``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from visexpert.timing import Meanwhile, is_unsteady, spread_of


@pytest.mark.parametrize(
    ("seconds", "spread"), [([], 0), ([3.0], 0), ([2.0] * 5, 0), ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 3), ([0.0, 0.0], 0)]
)
def test_spread_is_the_interquartile_range_over_the_median(seconds: list[float], spread: float) -> None:
    assert spread_of(seconds) == pytest.approx(spread)


def test_others_share_is_what_is_busy_beside_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 ticks on all cores 300 are busy (user 200, system 100); 1 s of them, 100 ticks, is this process's own."""
    stat, own = tmp_path / "stat", [5.0]
    monkeypatch.setattr("visexpert.timing.time.process_time", lambda: own[0])
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    stat.write_text("cpu  1000 0 500 7000 10 0 0 0 0 0\ncpu0 1 2 3\n")
    meanwhile = Meanwhile(stat)
    assert meanwhile.others_share() is None  # no tick has passed
    stat.write_text("cpu  1200 0 600 7090 20 0 0 0 0 0\ncpu0 1 2 3\n")
    own[0] += 1
    assert meanwhile.others_share() == pytest.approx((300 - 100) / 400)
    assert Meanwhile(tmp_path / "absent").others_share() is None


def test_times_are_marked_for_either_reason_and_not_where_nothing_is_known() -> None:
    assert is_unsteady({"cost/images_per_s_spread": 0.3, "cost/others_cpu_share": 0.0})
    assert is_unsteady({"cost/images_per_s_spread": 0.0, "cost/others_cpu_share": 0.5})
    assert not is_unsteady({"cost/images_per_s_spread": 0.1, "cost/others_cpu_share": 0.1})
    assert not is_unsteady({})
