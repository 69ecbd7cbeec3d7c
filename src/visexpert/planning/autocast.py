"""Mixed precision on ``meta``, where torch has no autocast: dtypes as autocast on CUDA makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

IN_16_BITS: frozenset[Any] = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose2d,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.baddbmm,
        torch.addmm,
        torch.einsum,
        torch.chain_matmul,
        Tensor.matmul,
        Tensor.mm,
        Tensor.bmm,
        Tensor.baddbmm,
        Tensor.addmm,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
    }
)
IN_32_BITS: frozenset[Any] = frozenset(
    {
        F.layer_norm,
        F.group_norm,
        F.softmax,
        F.log_softmax,
        F.softplus,
        F.cosine_similarity,
        F.cosine_embedding_loss,
        F.cross_entropy,
        F.nll_loss,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.kl_div,
        F.binary_cross_entropy_with_logits,
        *(
            getattr(home, name)
            for home in (torch, Tensor)
            for name in ("softmax", "log_softmax", "exp", "log", "pow", "rsqrt", "reciprocal", "norm", "sum", "prod")
        ),
        Tensor.__pow__,
        Tensor.cumsum,
        torch.cumsum,
    }
)
"""Operations of CUDA's lists (https://docs.pytorch.org/docs/stable/amp.html) that encoders and losses have."""


class MixedPrecision(TorchFunctionMode):
    """Casts the inputs of operations as autocast does; all others promote their inputs' dtypes.

    Args:
        cached: Weights of which autocast keeps one 16-bit copy a step; others are cast each time they are used.
        uncounted: Context in which those copies are made, since they are counted elsewhere.
    """

    def __init__(
        self,
        cached: Iterable[Tensor],
        *,
        uncounted: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self._cached = {id(weight) for weight in cached}
        self._copies: dict[int, Tensor] = {}
        self._uncounted = uncounted

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        cast = self._lowered if func in IN_16_BITS else _raised if func in IN_32_BITS else None
        if cast is None:
            return func(*args, **(kwargs or {}))
        given, named = tree_map_only(Tensor, cast, (tuple(args), dict(kwargs or {})))
        return func(*given, **named)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if id(tensor) not in self._cached:
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._copies:
            with self._uncounted():
                self._copies[id(tensor)] = tensor.to(torch.bfloat16)
        return self._copies[id(tensor)]


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
