"""Beam search over next-token logits, independent of any model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
