"""Convert decoding settings to those of transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from visexpert.language.generation import Decoding


def strategy(decoding: Decoding) -> dict[str, Any]:
    """Return the arguments of transformers' ``generate``; everything they do not name is off."""
    if decoding.strategy == "beam":
        # "never" stops once nothing better is possible, as our own search does; the default is a heuristic.
        return {
            "do_sample": False,
            "num_beams": decoding.num_beams,
            "length_penalty": decoding.length_penalty,
            "early_stopping": "never",
        }
    if decoding.strategy == "sample":
        top_k = 0 if decoding.top_k is None else decoding.top_k  # 0 is transformers' "all"
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": decoding.temperature,
            "top_k": top_k,
            "top_p": decoding.top_p,
        }
    return {"do_sample": False, "num_beams": 1}


@contextmanager
def seeded(decoding: Decoding) -> Iterator[None]:
    """Seed torch for a sampling strategy, and restore the random state afterwards."""
    if decoding.strategy != "sample":
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(decoding.seed)
        yield


def until(row: list[int], eos_id: int) -> list[int]:
    """Return the tokens before the first ``eos_id``."""
    return row[: row.index(eos_id)] if eos_id in row else row
