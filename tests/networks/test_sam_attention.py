"""SAM's attention in chunks: the library's numbers, without its bias in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import SamVisionConfig, SamVisionModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

from tests.experts.tiny_models import SAM, randomized
from visexpert.experts import TransformersExpert
from visexpert.experts.probe import LogitsWatch
from visexpert.networks import huggingface
from visexpert.networks.huggingface import ChunkedSamAttention, chunk_attention

FIELDS = {key: value for key, value in SAM.items() if key != "model_type"}


@pytest.mark.parametrize("queries", [1, 24, 10_000])
@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_chunks_equal_the_librarys_eager_attention(
    monkeypatch: pytest.MonkeyPatch, queries: int, use_rel_pos: bool
) -> None:
    """One row at a time, three rows, of which the last chunk is shorter, and all at once; a map that is no square."""
    monkeypatch.setattr(huggingface, "SAM_QUERIES", queries)
    config = SamVisionConfig(**{**FIELDS, "use_rel_pos": use_rel_pos})
    reference: Any = randomized(SamVisionAttention(config, window_size=0))
    chunked: Any = randomized(SamVisionSdpaAttention(config, window_size=0))
    chunked.__class__ = ChunkedSamAttention
    chunked.load_state_dict(reference.state_dict(), strict=True)
    hidden = torch.randn(2, 7, 8, 16)
    with torch.no_grad():
        torch.testing.assert_close(chunked(hidden)[0], reference(hidden)[0], atol=1e-5, rtol=1e-5)


def test_only_global_blocks_are_chunked_and_names_stay() -> None:
    model: Any = SamVisionModel(SamVisionConfig(**FIELDS))
    names = list(model.state_dict())
    chunk_attention(model)
    assert [isinstance(layer.attn, ChunkedSamAttention) for layer in model.vision_encoder.layers] == [False, True]
    assert list(model.state_dict()) == names


def test_at_1024_px_nothing_of_the_size_of_logits_is_held() -> None:
    """4096 tokens, as in SAM itself; the library's own class makes (1, 2, 4096, 4096)."""
    wide = {**SAM, "image_size": 1024, "patch_size": 16, "window_size": 14}
    expert = TransformersExpert(config=wide)
    assert expert.grid_hw == (64, 64)
    pixels_BCHW = torch.rand(1, 3, 1024, 1024)
    with torch.no_grad(), LogitsWatch(1024) as watch:
        expert.eval().encode(pixels_BCHW)
    assert watch.largest == ()
    plain: nn.Module = SamVisionModel(SamVisionConfig(**{k: v for k, v in wide.items() if k != "model_type"}))
    with torch.device("meta"):
        plain = plain.to("meta")
        with torch.no_grad(), LogitsWatch(1024) as watch:
            plain(pixels_BCHW.to("meta"))
    assert watch.largest[-3:] == (2, 4096, 4096)
