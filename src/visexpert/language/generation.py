"""Decode text from the next-token logits of any model: greedily, by beam search or by sampling.

Shapes in addition to those of :mod:`visexpert.types`: R rows being generated, G beams of one text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from visexpert.errors import ConfigError

Strategy = Literal["greedy", "beam", "sample"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to choose the tokens of an answer.

    Args:
        strategy: ``greedy`` - the most likely token each time; ``beam`` - the likeliest of ``num_beams`` texts searched
            in parallel; ``sample`` - drawn from the model's distribution.
        num_beams: Number of texts searched in parallel (beam).
        length_penalty: A finished text scores its log-likelihood divided by its length (<eos> included) to this power
            (beam): 0 selects the likeliest text, which favors short ones; 1 the likeliest per token.
        temperature: The logits are divided by it (sample): values below 1 sharpen the distribution.
        top_k: Draw only from the k likeliest tokens (sample); null for all.
        top_p: Draw only from the smallest set of likeliest tokens with this total probability (sample; Holtzman et al.,
            arXiv 1904.09751).
        seed: Seed of the draws (sample).
        max_new_tokens: Longest answer.

    Raises:
        ConfigError: A value is out of range or unknown.
    """

    strategy: Strategy = "greedy"
    num_beams: int = 4
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"Decoding.strategy is {self.strategy!r}; use one of {', '.join(get_args(Strategy))}.")
        limits: dict[str, tuple[float, float]] = {
            "num_beams": (1, 1024),
            "length_penalty": (-10, 10),
            "temperature": (1e-3, 1e3),
            "top_k": (1, math.inf),
            "top_p": (1e-6, 1),
            "seed": (0, 2**62),
            "max_new_tokens": (1, math.inf),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                hint = "; for the limit 0, use strategy greedy" if name == "temperature" and value <= low else ""
                raise ConfigError(f"Decoding.{name} is {value}, but must lie in [{low:g}, {high:g}]{hint}; change it.")


class Writing(Protocol):
    """A model generating R rows: it keeps their tokens and returns the logits of the next ones."""

    def start(self) -> Tensor:
        """Return logits (R, V) of the token after each prompt."""

    def append(self, tokens_R: Tensor) -> Tensor:
        """Append a token to each row; return logits (R, V) of the next one."""

    def reorder(self, rows_R: Tensor) -> None:
        """Make row i continue row ``rows_R[i]``; the number of rows may change."""


def write(writing: Writing, decoding: Decoding, *, eos_id: int, room: Sequence[int]) -> list[list[int]]:
    """Generate one answer per row; return token ids up to, but not including, ``eos_id``.

    Args:
        writing: The model, holding its prompts.
        decoding: How to choose tokens.
        eos_id: Token that ends a row.
        room: Largest number of tokens of each row, in addition to the limit ``decoding.max_new_tokens``.
    """
    limits = [min(places, decoding.max_new_tokens) for places in room]
    if decoding.strategy == "beam":
        return _search(writing, decoding, eos_id, limits)
    chooser = _Sampler(decoding, len(limits)) if decoding.strategy == "sample" else _most_likely
    rows: list[list[int]] = [[] for _ in limits]
    done = [limit <= 0 for limit in limits]
    logits_RV = None if all(done) else writing.start()
    while logits_RV is not None:
        tokens_R = chooser(logits_RV)
        for index, token in enumerate(tokens_R.tolist()):
            done[index] = done[index] or token == eos_id
            if not done[index]:
                rows[index].append(token)
                done[index] = len(rows[index]) >= limits[index]
        logits_RV = None if all(done) else writing.append(tokens_R)
    return rows


def likely_tokens(logits_RV: Tensor, decoding: Decoding) -> Tensor:
    """Return probabilities (R, V) after temperature, top-k and top-p, in this order; excluded tokens get 0."""
    logits_RV = logits_RV.float()
    # Relative to the largest, so that a low temperature does not overflow.
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / decoding.temperature
    ordered_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    if decoding.top_k is not None:
        ordered_RV[:, decoding.top_k :] = -math.inf
    probabilities_RV = ordered_RV.softmax(-1)
    if decoding.top_p < 1:
        before_RV = probabilities_RV.cumsum(-1) - probabilities_RV
        before_RV[:, 0] = 0.0  # exactly 0, so that at least one token remains
        probabilities_RV = ordered_RV.masked_fill(before_RV >= decoding.top_p, -math.inf).softmax(-1)
    return torch.zeros_like(logits_RV).scatter(1, order_RV, probabilities_RV)


class _Sampler:
    """Draws one token per row, each row from its own random stream, so that rows do not depend on their neighbors."""

    def __init__(self, decoding: Decoding, num_rows: int) -> None:
        self._decoding = decoding
        self._streams = [torch.Generator().manual_seed(decoding.seed + row) for row in range(num_rows)]

    def __call__(self, logits_RV: Tensor) -> Tensor:
        probabilities_RV = likely_tokens(logits_RV, self._decoding).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=stream)
            for row, stream in zip(probabilities_RV, self._streams, strict=True)
        ]
        return torch.cat(drawn).to(logits_RV.device)


def _most_likely(logits_RV: Tensor) -> Tensor:
    return logits_RV.argmax(-1)


def _search(writing: Writing, decoding: Decoding, eos_id: int, limits: Sequence[int]) -> list[list[int]]:
    if max(limits, default=0) <= 0:
        return [[] for _ in limits]
    search = BeamSearch(limits, num_beams=decoding.num_beams, length_penalty=decoding.length_penalty, eos_id=eos_id)
    logits_RV = writing.start()
    writing.reorder(torch.arange(len(limits), device=logits_RV.device).repeat_interleave(decoding.num_beams))
    step = search.advance(logits_RV.repeat_interleave(decoding.num_beams, dim=0))
    while not search.finished:
        writing.reorder(step.parents_R)
        step = search.advance(writing.append(step.tokens_R))
    return search.best()


@dataclass(frozen=True)
class BeamStep:
    """Next step of the beams.

    Args:
        parents_R: int64 row that each row continues; rows of one prompt stay together.
        tokens_R: int64 token added to each row.
    """

    parents_R: Tensor
    tokens_R: Tensor


@dataclass(frozen=True)
class _Finished:
    score: float
    tokens: list[int]


class BeamSearch:
    """Finds the likeliest texts, G in parallel for each of B prompts (rows b G to b G + G - 1 belong to prompt b).

    A finished text scores log-likelihood / length ** ``length_penalty``, <eos> counted in both; one that reaches its
    limit is finished without <eos>. A prompt is done when no open beam can still beat its best finished text, so with
    enough beams the best text is found.

    Args:
        limits: Largest number of tokens for each prompt.
        num_beams: G.
        length_penalty: See above.
        eos_id: Token that finishes a text.
    """

    def __init__(self, limits: Sequence[int], *, num_beams: int, length_penalty: float, eos_id: int) -> None:
        self._limits, self._num_beams = list(limits), num_beams
        self._penalty, self._eos_id = length_penalty, eos_id
        # Only one beam starts: the others would be copies of it.
        start_G = [0.0] + [-math.inf] * (num_beams - 1)
        self._scores = [start_G if limit > 0 else [-math.inf] * num_beams for limit in limits]
        self._open: list[list[list[int]]] = [[[] for _ in range(num_beams)] for _ in limits]
        self._best = [_Finished(-math.inf, []) for _ in limits]

    @property
    def finished(self) -> bool:
        """Whether no prompt has an open beam."""
        return all(score == -math.inf for scores in self._scores for score in scores)

    def best(self) -> list[list[int]]:
        """Return the best finished text of each prompt, without <eos>."""
        return [found.tokens for found in self._best]

    def advance(self, logits_RV: Tensor) -> BeamStep:
        """Choose the next token of all beams from their logits (B G, V)."""
        gains_RV = logits_RV.float().log_softmax(-1)
        scores_BG = torch.tensor(self._scores, device=logits_RV.device)
        total_BC = (scores_BG.unsqueeze(2) + gains_RV.unflatten(0, scores_BG.shape)).flatten(1)
        # Each beam has at most one <eos>, so among 2 G candidates there are always G that continue, if there are that
        # many.
        count = min(2 * self._num_beams, total_BC.shape[1])
        chosen = total_BC.topk(count, dim=1)
        vocabulary = logits_RV.shape[1]
        parents, tokens = [], []
        for prompt, (scores, places) in enumerate(zip(chosen.values.tolist(), chosen.indices.tolist(), strict=True)):
            beams = [divmod(place, vocabulary) for place in places]
            kept = self._extend(prompt, scores, beams)
            parents += [prompt * self._num_beams + beam for beam, _ in kept]
            tokens += [token for _, token in kept]
        device = logits_RV.device
        return BeamStep(torch.tensor(parents, device=device), torch.tensor(tokens, device=device))

    def _extend(self, prompt: int, scores: list[float], beams: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Finish or continue the candidates of one prompt; return (beam, token) of the G that continue."""
        opened = self._open[prompt]
        kept: list[tuple[float, int, int]] = []
        for score, (beam, token) in zip(scores, beams, strict=True):
            if score == -math.inf or len(kept) == self._num_beams:
                break
            if token == self._eos_id:
                self._finish(prompt, score, opened[beam], length=len(opened[beam]) + 1)
            elif len(opened[beam]) + 1 == self._limits[prompt]:
                self._finish(prompt, score, [*opened[beam], token], length=len(opened[beam]) + 1)
            else:
                kept.append((score, beam, token))
        kept = [entry for entry in kept if self._may_win(prompt, entry[0], len(opened[entry[1]]) + 1)]
        padding = [(-math.inf, 0, 0)] * (self._num_beams - len(kept))
        rows = kept + padding
        self._open[prompt] = [[*opened[beam], token] for _, beam, token in rows]
        self._scores[prompt] = [score for score, _, _ in rows]
        return [(beam, token) for _, beam, token in rows]

    def _finish(self, prompt: int, score: float, tokens: list[int], *, length: int) -> None:
        found = _Finished(score / math.pow(length, self._penalty), tokens)
        if found.score > self._best[prompt].score:
            self._best[prompt] = found

    def _may_win(self, prompt: int, score: float, length: int) -> bool:
        """Return whether a text with this score can still become the best: its likelihood can only fall."""
        longest = self._limits[prompt] if self._penalty > 0 else length + 1
        return score / math.pow(longest, self._penalty) > self._best[prompt].score
