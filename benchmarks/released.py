"""MoVE-KD's step as its released code (hey-cjj/MoVE-KD at c822da0) takes it, to measure against.

The student and the CLIP teacher run with eager attention and keep every attention map. MoLE runs one expert after the
other on the tokens that chose it, each with a dropout mask of its own, in all blocks. The CLIP teacher runs in every
step. The loss keeps the error of every channel to every teacher.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip import modeling_clip

LAYER, ANCHOR_WEIGHT, BALANCE_WEIGHT, KD_WEIGHT = -2, 0.8, 0.01, 0.5
MOLE_FILE = Path("llava", "model", "multimodal_encoder", "moe_lora.py")

MakeMoLE = Callable[[nn.Module], nn.Module]
"""Makes MoLE of an MLP; it returns tokens, and the router's probabilities and choice."""


class ReleasedLoRA(nn.Module):
    """One low-rank expert, a scaled pair of linear layers."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(in_dim, rank), nn.Linear(rank, out_dim)
        self.scale, self.dropout = 1 / rank, nn.Dropout(dropout)
        for linear in (self.lora_A, self.lora_B):
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.lora_B(self.lora_A(self.dropout(x))) * self.scale  # type: ignore[no-any-return]


class ReleasedMoLE(nn.Module):
    """Top-1 MoLE: tokens are looked up by expert, and written into zeros by index."""

    def __init__(self, mlp: nn.Module, *, num_experts: int = 3, rank: int = 32, dropout: float = 0.05) -> None:
        super().__init__()
        assert isinstance(mlp, modeling_clip.CLIPMLP)
        self.original_module, width, hidden = mlp, mlp.fc1.in_features, mlp.fc1.out_features
        self.moe_down = nn.ModuleList([ReleasedLoRA(width, hidden, rank, dropout) for _ in range(num_experts)])
        self.moe_up = nn.ModuleList([ReleasedLoRA(hidden, width, rank, dropout) for _ in range(num_experts)])
        self.router = nn.Linear(width, num_experts)

    def forward(self, x_BND: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return tokens, and the router's probabilities and straight-through choice."""
        logits = self.router(x_BND)
        probs = F.softmax(logits, dim=-1)
        index = probs.max(-1, keepdim=True)[1]
        hard = torch.zeros_like(logits).scatter_(-1, index, 1.0)
        inner = self._beside(x_BND, self.original_module.fc1, index, self.moe_down)
        inner = self.original_module.activation_fn(inner)
        return self._beside(inner, self.original_module.fc2, index, self.moe_up), (probs, hard - probs.detach() + probs)

    def _beside(self, x: Tensor, linear: nn.Module, index: Tensor, experts: nn.ModuleList) -> Tensor:
        base: Tensor = linear(x)
        update = torch.zeros_like(base)
        for number, expert in enumerate(experts):
            images, tokens, _ = torch.where(index == number)
            update[images, tokens] = expert(x[images, tokens])
        return base + update


def mole_of(checkout: Path) -> MakeMoLE:
    """Return what makes MoLE with the class in a checkout of the released code.

    Args:
        checkout: Folder of the checkout, which is executed: name one that you trust.
    """
    path = checkout / MOLE_FILE
    spec = importlib.util.spec_from_file_location("released_moe_lora", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path} does not exist; name a checkout of hey-cjj/MoVE-KD by --baseline.")
    module = importlib.util.module_from_spec(spec)
    # Gone from today's transformers, and imported by the file for parts that are not used here.
    if not hasattr(modeling_clip, "CLIPVisionTransformer"):
        setattr(modeling_clip, "CLIPVisionTransformer", CLIPVisionModel)  # noqa: B010
    spec.loader.exec_module(module)

    def make(mlp: nn.Module) -> nn.Module:
        made: nn.Module = module.MoE_LoRA_CLIP(SimpleNamespace(), 32, 1, 3, False, mlp)
        return made

    return make


class _Kept(nn.Module):
    """MoLE whose router's decisions go into a list, as the encoder of transformers expects tokens alone."""

    def __init__(self, mole: nn.Module, routings: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.mole, self._routings = mole, (routings,)

    def forward(self, x_BND: Tensor) -> Tensor:
        tokens: Tensor
        tokens, routing = self.mole(x_BND)
        self._routings[0].append(routing)
        return tokens


class ReleasedStep(nn.Module):
    """Loss of a step without the text: distillation and balance.

    Args:
        config: Configuration of CLIP.
        grids: Number and width of each teacher's tokens, besides CLIP's.
        make: Makes MoLE of an MLP.
    """

    def __init__(
        self, config: CLIPVisionConfig, grids: Mapping[str, tuple[int, int]], make: MakeMoLE = ReleasedMoLE
    ) -> None:
        super().__init__()
        config._attn_implementation = "eager"
        self.student, self.anchor = CLIPVisionModel(config), CLIPVisionModel(config)
        self.student.requires_grad_(False)
        self.anchor.requires_grad_(False)
        self.routings: list[tuple[Tensor, Tensor]] = []
        for layer in self.blocks():
            layer.mlp = _Kept(make(layer.mlp), self.routings)
        width, tokens = config.hidden_size, (_number(config.image_size) // _number(config.patch_size)) ** 2
        self.first = nn.ModuleDict({name: nn.Linear(own, width) for name, (_, own) in grids.items()})
        self.second = nn.ModuleDict({name: nn.Linear(count, tokens) for name, (count, _) in grids.items()})

    def blocks(self) -> list[Any]:
        """Return the student's blocks."""
        student: Any = self.student
        return [*getattr(student, "vision_model", student).encoder.layers]

    def forward(self, pixels_BCHW: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return the loss.

        Args:
            pixels_BCHW: Normalized images of CLIP's size.
            tokens: Tokens (B, S, E) of each teacher besides CLIP.
        """
        self.routings.clear()
        seen = self.student(pixels_BCHW, output_attentions=True, output_hidden_states=True)
        balance = self._balance()
        student_BTD = seen.hidden_states[LAYER][:, 1:]
        with torch.no_grad():
            given = self.anchor(pixels_BCHW, output_attentions=True, output_hidden_states=True)
            token_weights_BT = given.attentions[LAYER].mean(1)[:, 0, 1:].softmax(-1)
            cls_BD, clip_BTD = given.hidden_states[LAYER][:, 0], given.hidden_states[LAYER][:, 1:]
        errors, scores = [F.mse_loss(student_BTD, clip_BTD, reduction="none")], []
        for name, given_BSE in tokens.items():
            adapted_BTD = self.second[name](F.gelu(self.first[name](given_BSE).permute(0, 2, 1))).permute(0, 2, 1)
            errors.append(F.mse_loss(student_BTD, adapted_BTD, reduction="none"))
            scores.append((cls_BD[:, None] @ adapted_BTD.transpose(1, 2)).mean(dim=(1, 2)))
        others_BU = torch.stack(scores, dim=-1).softmax(-1)
        if others_BU.mean(0).max() > 0.8:
            others_BU = (others_BU + 0.2).softmax(-1)
        anchor_B1 = torch.full((len(others_BU), 1), ANCHOR_WEIGHT).to(others_BU)
        weights_BK = torch.cat([anchor_B1, others_BU * (1 - ANCHOR_WEIGHT)], dim=1)
        errors_BTK = torch.stack(errors, dim=-1).mean(dim=2)
        errors_BK = errors_BTK.mean(1) + (errors_BTK * token_weights_BT[..., None]).sum(1)
        loss: Tensor = KD_WEIGHT * (weights_BK * errors_BK).sum(-1).mean() + BALANCE_WEIGHT * balance
        return loss

    def _balance(self) -> Tensor:
        probs_LBNE = torch.stack([probs for probs, _ in self.routings])
        choice_LBNE = torch.stack([choice for _, choice in self.routings]).detach()
        total = probs_LBNE.new_zeros(())
        for image in range(probs_LBNE.shape[1]):
            probs_ME, choice_ME = (values[:, image].flatten(0, 1) for values in (probs_LBNE, choice_LBNE))
            total = total + (probs_ME.mean(0) * choice_ME.mean(0)).sum()
        balance: Tensor = total / probs_LBNE.shape[1]
        return balance

    def trained(self) -> list[nn.Parameter]:
        """Return what trains: MoLE and the adapters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def _number(size: object) -> int:
    assert isinstance(size, int)
    return size
