"""Masked image modeling: an expert that learns from pixels only, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.io.weights import write_weights
from visexpert.tabletop.tiny import TinyExpert, ViTNetwork, half_state, header_metadata
from visexpert.tabletop.zoo.base import ZooModule, images_of
from visexpert.tabletop.zoo.dense import expert_facts
from visexpert.types import Batch


class MaskedExpert(ZooModule):
    """A ViT that fills in masked patches (SimMIM, arXiv 2111.09886: masked tokens, linear head, L1).

    Departs from SimMIM in the target, which is each patch's pixels normalized by its own mean and deviation, mixed
    with the raw ones: the raw part keeps colour, the normalized part keeps shape.

    Args:
        arch: Architecture of kind ``vit`` for :class:`TinyExpert`.
        mask_ratio: Share of the patches that are masked.
        visible_weight: Weight of reconstructing the visible patches, which keeps detail in the tokens.
        lr: Highest learning rate.
        weight_decay: AdamW weight decay.
        warmup: Share of the steps in which the rate rises.
    """

    headline = "masked_r2"
    score_definition = (
        "share of the variance (%) of masked patches' pixels, around the mean image patch, that the reconstruction "
        "explains on held-out scenes; higher is better, and the probe table is the fairer judge of the tokens"
    )

    def __init__(
        self,
        *,
        arch: dict[str, Any],
        mask_ratio: float = 0.5,
        visible_weight: float = 0.1,
        lr: float = 1.5e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup=warmup)
        if not 0 < mask_ratio < 1:
            raise ConfigError(f"MaskedExpert: mask_ratio={mask_ratio} must be in (0, 1).")
        self.expert = TinyExpert(arch=arch)
        network = self.expert.network
        if not isinstance(network, ViTNetwork):
            raise ConfigError("MaskedExpert masks tokens, so the architecture must be of kind vit.")
        self.network = network
        self.mask_ratio = mask_ratio
        self.visible_weight = visible_weight
        self.patch = self.expert.image_size // network.grid_hw[0]
        self.mask_token = nn.Parameter(torch.zeros(network.token_dim))
        self.decoder = nn.Linear(network.token_dim, 2 * 3 * self.patch**2)
        self._error = torch.zeros(2, dtype=torch.float64)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mask patches and reconstruct them."""
        pixels_BCHW = self.expert.preprocess(images_of(batch))
        patches_BSP = self._patches(pixels_BCHW)
        mask_BS = torch.rand(patches_BSP.shape[:2]) < self.mask_ratio
        raw_BSP, normalized_BSP = self._rebuild(pixels_BCHW, mask_BS)
        error_BS = (raw_BSP - patches_BSP).abs().mean(-1)
        error_BS = error_BS + F.smooth_l1_loss(normalized_BSP, _normalized(patches_BSP), reduction="none").mean(-1)
        weight_BS = torch.where(mask_BS, 1.0, self.visible_weight)
        loss = (error_BS * weight_BS).sum() / weight_BS.sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add squared error and variance of masked patches; the mask depends only on the rows."""
        pixels_BCHW = self.expert.preprocess(images_of(batch))
        patches_BSP = self._patches(pixels_BCHW)
        random = torch.Generator().manual_seed(int(batch.index_B.sum()))
        mask_BS = torch.rand(patches_BSP.shape[:2], generator=random) < self.mask_ratio
        raw_BSP, _ = self._rebuild(pixels_BCHW, mask_BS)
        truth_NP = patches_BSP[mask_BS]
        error = (raw_BSP[mask_BS] - truth_NP).double().square().sum()
        spread = (truth_NP - truth_NP.mean(0)).double().square().sum()
        self._error += torch.stack([error, spread])

    def on_validation_epoch_end(self) -> None:
        """Log the explained share of the variance."""
        self.log(f"val/{self.headline}", float(100 * (1 - self._error[0] / self._error[1])), prog_bar=True)
        self._error = torch.zeros(2, dtype=torch.float64)

    def ship(self, folder: Path, name: str) -> list[Path]:
        """Write ``NAME.safetensors``: the encoder with its header, without mask token and decoder."""
        path = folder / f"{name}.safetensors"
        write_weights(half_state(self.network), path, metadata=header_metadata(self.expert.header))
        return [path]

    def facts(self) -> dict[str, Any]:
        """Return kind, sizes and training target for the card."""
        return expert_facts(self.expert) | {"trained_on": "images alone: masked patches are rebuilt"}

    def _rebuild(self, pixels_BCHW: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw and normalized patches (B, S, 3 * patch**2) from an image whose masked patches are hidden."""
        vit = self.network.vit
        assert vit.pos_embed is not None  # ViTNetwork builds it with learned positions
        tokens_BSE = torch.where(mask_BS[..., None], self.mask_token, vit.patch_embed(pixels_BCHW)) + vit.pos_embed
        rebuilt: Tensor = self.decoder(vit.norm(vit.blocks(tokens_BSE)))
        raw_BSP, normalized_BSP = rebuilt.chunk(2, dim=-1)
        return raw_BSP, normalized_BSP

    def _patches(self, pixels_BCHW: Tensor) -> Tensor:
        return F.unfold(pixels_BCHW, self.patch, stride=self.patch).transpose(1, 2)


def _normalized(patches_BSP: Tensor) -> Tensor:
    mean_BS1, std_BS1 = patches_BSP.mean(-1, keepdim=True), patches_BSP.std(-1, keepdim=True)
    return (patches_BSP - mean_BS1) / (std_BS1 + 0.1)
