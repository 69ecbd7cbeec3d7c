"""Measure what MoLE costs compared with the plain MLP: one layer of CLIP's width, forward only and with backward.

    python benchmarks/mole_speed.py --width 1024 --hidden 4096 --tokens 577

The base is frozen and the input has a gradient, as in MoVE-KD's first stage. Variants take turns in one process, so
that a busy machine slows them all equally; the ratio is the median over rounds of a variant's time divided by the plain
MLP's in the same round. ``per expert`` runs one expert after another: top-1 on the tokens routed to it, dense on all.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from visexpert.report.machine import describe_machine
from visexpert.vision import MoLEFeedForward

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
PLAIN = "plain MLP"
VARIANTS = ("top-1, per expert", "top-1", "top-1, merged (inference)", "dense, per expert", "dense")
"""What is compared with the plain MLP."""


class PerExpert(nn.Module):
    """Compute the same function as a MoLE without stacking its experts.

    Args:
        mole: MoLE whose weights are used.
    """

    def __init__(self, mole: MoLEFeedForward) -> None:
        super().__init__()
        self.mole = mole

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        mole, x_ND = self.mole, x_BND.flatten(0, -2)
        choice = mole.router(x_ND)
        gates_NE = choice.probs_BNE if mole.routing == "dense" else None
        hidden = mole.activation_fn(self._layer(mole.fc1, mole.fc1_experts, x_ND, choice.choice_BN, gates_NE))
        return self._layer(mole.fc2, mole.fc2_experts, hidden, choice.choice_BN, gates_NE).view_as(x_BND)

    def _layer(
        self, linear: nn.Module, experts: Any, x_NI: Tensor, choice_N: Tensor, gates_NE: Tensor | None
    ) -> Tensor:
        base_NO: Tensor = linear(x_NI)
        update_NO = torch.zeros_like(base_NO)
        for e in range(experts.num_experts):
            rows = torch.where(choice_N == e)[0] if gates_NE is None else None
            value = experts.dropout(x_NI if rows is None else x_NI[rows])
            down = F.linear(value, experts.A_weight[e], experts.A_bias.view(experts.num_experts, -1)[e])
            bias = experts.B_bias.view(experts.num_experts, -1)[e]
            up = experts.scale * torch.addmm(bias, down, experts.B_weight[e])
            if rows is None:
                assert gates_NE is not None
                update_NO = update_NO + gates_NE[:, e : e + 1] * up
            else:
                update_NO[rows] = up
        return base_NO + update_NO


def make_variants(width: int, hidden: int, dropout: float) -> dict[str, nn.Module]:
    """Return the plain MLP and every form of MoLE, on the same frozen base."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=hidden, num_attention_heads=width // 64)
    plain = CLIPMLP(config).requires_grad_(False)
    top1 = MoLEFeedForward(plain, routing="top1", init="released", dropout=dropout)
    dense = MoLEFeedForward(plain, routing="dense", init="released", dropout=dropout)
    return {
        PLAIN: plain,
        "top-1, per expert": PerExpert(top1),
        "top-1": top1,
        "top-1, merged (inference)": top1.for_inference(),
        "dense, per expert": PerExpert(dense),
        "dense": dense,
    }


def measure(
    variants: dict[str, nn.Module], x_BND: Tensor, *, rounds: int, clock: Callable[[], float], backward: bool
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, module in variants.items():
            taken = _once(module.train(backward), x_BND, clock, backward)
            if turn:
                seconds[name].append(taken)
    return seconds


def _once(module: nn.Module, x_BND: Tensor, clock: Callable[[], float], backward: bool) -> float:
    x_BND = x_BND.detach().requires_grad_(backward)
    start = clock()
    with torch.set_grad_enabled(backward):
        out = module(x_BND)
        if backward:
            out.sum().backward()
    taken = clock() - start
    module.zero_grad(set_to_none=True)
    return taken


def ratios(seconds: dict[str, list[float]], name: str) -> str:
    """Return the median and quartiles, over rounds, of a variant's time divided by the plain MLP's."""
    found = [own / plain for own, plain in zip(seconds[name], seconds[PLAIN], strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure and print the table."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    made = make_variants(options.width, options.hidden, options.dropout)
    variants = {name: made[name] for name in made if name in (PLAIN, *options.variants)}
    x_BND = torch.randn(options.batch, options.tokens, options.width)
    clock = CLOCKS[options.clock]
    forward = measure(variants, x_BND, rounds=options.rounds, clock=clock, backward=False)
    trained = {name: module for name, module in variants.items() if "inference" not in name}
    both = measure(trained, x_BND, rounds=options.rounds, clock=clock, backward=True)
    print(f"{describe_machine()}; {datetime.date.today()}, {options.rounds} rounds, {options.clock} time.")
    print(f"{options.batch} x {options.tokens} tokens, width {options.width}, float32, dropout {options.dropout}.\n")
    print("| variant | forward, ms | ratio (quartiles) | forward + backward, ms | ratio (quartiles) |")
    print("|---|---:|---:|---:|---:|")
    for name in variants:
        row = [name]
        for seconds in (forward, both):
            there = name in seconds
            row += [f"{1000 * statistics.median(seconds[name]):.1f}", ratios(seconds, name)] if there else ["", ""]
        print(f"| {' | '.join(row)} |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="token width (default: CLIP-L's 1024)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden width of the MLP (default: 4096)")
    parser.add_argument("--tokens", type=int, default=577, help="tokens per image, with [CLS] (default: 577)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each variant, at least 2 (default: 15)")
    parser.add_argument("--dropout", type=float, default=0.05, help="dropout in training (default: 0.05)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default), or cpu for a busy machine")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="variants (default: all)")
    return parser


if __name__ == "__main__":
    main()
