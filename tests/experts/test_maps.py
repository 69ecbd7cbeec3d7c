"""Tokens and maps of any layout become maps."""

from __future__ import annotations

import pytest
import torch

from visexpert.experts.maps import map_of, resize_map


@pytest.mark.parametrize("prefix", [None, 3])
def test_tokens_without_a_place_are_dropped_and_rows_stay_rows(prefix: int | None) -> None:
    tokens = torch.arange(3 + 16).float()[None, :, None].expand(2, 19, 5)
    found = map_of(tokens, prefix=prefix)
    assert found.shape == (2, 5, 4, 4)
    assert found[0, 0].tolist() == torch.arange(3, 19).view(4, 4).tolist()


def test_maps_keep_their_places_whichever_side_the_channels_are_on() -> None:
    map_BEHW = torch.rand(2, 5, 4, 4)
    last = map_BEHW.permute(0, 2, 3, 1)
    for found in (map_of(map_BEHW), map_of(last), map_of(last, channels_last=True)):
        assert torch.equal(found, map_BEHW)
    assert torch.equal(map_of(torch.rand(1, 4, 4, 4)[:, [0, 1, 2, 3]] * 0 + 1), torch.ones(1, 4, 4, 4))


@pytest.mark.parametrize(("shape", "prefix"), [((1, 18, 2), 1), ((1, 5, 2), 5), ((1, 7), None)])
def test_what_is_no_square_is_refused(shape: tuple[int, ...], prefix: int | None) -> None:
    with pytest.raises(ValueError, match=r"^(18|5) tokens .*grid|\(1, 7\)"):
        map_of(torch.zeros(shape), prefix=prefix)


def test_resize__means_when_shrinking_and_nothing_where_nothing_is_asked() -> None:
    map_B1HW = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_map(map_B1HW, None) is map_B1HW and resize_map(map_B1HW, 4) is map_B1HW
    assert resize_map(map_B1HW, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert resize_map(map_B1HW, 8).shape == (1, 1, 8, 8)
