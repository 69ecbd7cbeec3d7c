"""Choosing tokens: settings, beam search against brute force, draws against their distribution, cache against none."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.language.helpers import KINDS, NEVER, VOCAB, item, language_model, vision
from visexpert.data import pack
from visexpert.errors import ConfigError, DataError
from visexpert.language import CrossAttentionDecoder, Decoding, LanguageModel, PrefixLM
from visexpert.language.generation import Strategy, likely_tokens, write
from visexpert.types import VisionTokens

EOS = 0
SMALL = 4
LENGTH = 4


class Chain:
    """Writes by a table: the next token depends on all before it, by their sum and their number."""

    def __init__(self, num_rows: int, *, vocabulary: int = SMALL, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(num_rows, 64, vocabulary, generator=generator) * 2
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.owner = list(range(num_rows))

    def logits_of(self, owner: int, tokens: list[int]) -> Tensor:
        """Logits after ``tokens`` in the row that began as ``owner``."""
        return self.table[owner, (7 * len(tokens) + sum(3 * t * t for t in tokens)) % 64]

    def start(self) -> Tensor:
        return torch.stack([self.logits_of(o, row) for o, row in zip(self.owner, self.rows, strict=True)])

    def append(self, tokens_R: Tensor) -> Tensor:
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens_R.tolist(), strict=True)]
        return self.start()

    def reorder(self, rows_R: Tensor) -> None:
        self.rows = [list(self.rows[row]) for row in rows_R.tolist()]
        self.owner = [self.owner[row] for row in rows_R.tolist()]


def texts(vocabulary: int, length: int) -> list[list[int]]:
    """All texts of up to ``length`` tokens, <eos> counted: it ends the shorter ones."""
    others = [token for token in range(vocabulary) if token != EOS]
    ended = [[*words, EOS] for n in range(length) for words in itertools.product(others, repeat=n)]
    return ended + [list(words) for words in itertools.product(others, repeat=length)]


def words(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_text_of_all(penalty: float, seed: int) -> None:
    decoding = Decoding(strategy="beam", num_beams=SMALL**LENGTH, length_penalty=penalty, max_new_tokens=LENGTH)
    chain = Chain(3, seed=seed)

    def score(owner: int, tokens: list[int]) -> float:
        gains = [float(chain.logits_of(owner, tokens[:n]).log_softmax(-1)[token]) for n, token in enumerate(tokens)]
        return sum(gains) / math.pow(len(tokens), penalty)

    limits = [LENGTH, 2, LENGTH + 3]  # the last is limited by max_new_tokens
    best = [
        words(max(texts(SMALL, min(limit, LENGTH)), key=lambda tokens: score(owner, tokens)))
        for owner, limit in enumerate(limits)
    ]
    assert write(chain, decoding, eos_id=EOS, room=limits) == best


def test_beams_find_what_greedy_misses() -> None:
    """Token 1 is likelier at first, but everything after it is unlikely; 2 then 3 is the likelier text."""
    chain = Chain(1)
    chain.table = torch.full((1, 64, SMALL), -9.0)
    after_none, after_1, after_2 = 0, (7 + 3) % 64, (7 + 12) % 64
    chain.table[0, after_none] = torch.tensor([0.001, 0.55, 0.44, 0.009]).log()
    chain.table[0, after_1] = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    chain.table[0, after_2] = torch.tensor([0.01, 0.01, 0.01, 0.97]).log()
    greedy = write(chain, Decoding(max_new_tokens=2), eos_id=EOS, room=[9])
    chain.rows = [[]]
    beams = write(chain, Decoding(strategy="beam", num_beams=2, max_new_tokens=2), eos_id=EOS, room=[9])
    assert greedy[0][0] == 1 and beams == [[2, 3]]


def log_likelihood(side: LanguageModel, images: VisionTokens, prompt: list[int], answers: list[list[int]]) -> Tensor:
    """Sum over each answer's tokens, by one teacher-forced forward, hence without any cache."""
    logits_MV = side(images, pack([[([*prompt, *answer], len(prompt)) for answer in answers]], 1)).logits_MV
    flat = torch.tensor([token for answer in answers for token in answer])
    gains_M = logits_MV.log_softmax(-1)[torch.arange(len(flat)), flat]
    return torch.stack([part.sum() for part in gains_M.split([len(answer) for answer in answers])])


def small_side(kind: str) -> LanguageModel:
    """A random language model of a vocabulary small enough to try every text."""
    side: LanguageModel
    if kind == "cross":
        side = CrossAttentionDecoder(vocab_size=SMALL, width=16, depth=2, heads=2, max_tokens=24)
    else:
        side = PrefixLM(
            config={
                "model_type": "llama",
                "vocab_size": SMALL,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "bos_token_id": 1,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
                "eos_token_id": EOS,
                "pad_token_id": EOS,
            }
        )
    for name, parameter in side.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return side.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beam_search_of_a_model_finds_the_best_text(kind: str, penalty: float) -> None:
    side, images = small_side(kind), vision(3)
    prompts = [[1], [2, 3, 1, 2], [3, 1]]
    decoding = Decoding(strategy="beam", num_beams=SMALL**3, length_penalty=penalty, max_new_tokens=3)
    found = side.generate(images, prompts, eos_id=EOS, decoding=decoding)
    answers = texts(SMALL, 3)
    for index, prompt in enumerate(prompts):
        image = VisionTokens(images.tokens_BTD[index : index + 1], images.grid_hw)
        scores = log_likelihood(side, image, prompt, answers) / torch.tensor([len(a) for a in answers]) ** penalty
        assert found[index] == words(answers[int(scores.argmax())])


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_greedy_and_so_are_the_limits_of_sampling(kind: str) -> None:
    side, images = language_model(kind), vision(3)
    prompts = [item(length, length)[0] for length in (2, 6, 4)]
    greedy = side.generate(images, prompts, eos_id=NEVER, max_new_tokens=6)
    assert side.generate(images, prompts, eos_id=NEVER, decoding=Decoding(max_new_tokens=6)) == greedy
    for same in (
        Decoding(strategy="beam", num_beams=1, max_new_tokens=6),
        Decoding(strategy="sample", temperature=1e-3, max_new_tokens=6),
        Decoding(strategy="sample", top_k=1, max_new_tokens=6),
        Decoding(strategy="sample", top_p=1e-6, max_new_tokens=6),
    ):
        assert side.generate(images, prompts, eos_id=NEVER, decoding=same) == greedy, same


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_repeated_by_its_seed_and_leaves_other_numbers_alone(kind: str) -> None:
    side, images = language_model(kind), vision(2)
    prompts = [item(length, length)[0] for length in (2, 5)]

    def drawn(seed: int) -> list[list[int]]:
        decoding = Decoding(strategy="sample", temperature=3.0, max_new_tokens=8, seed=seed)
        return side.generate(images, prompts, eos_id=NEVER, decoding=decoding)

    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    first = drawn(1)
    assert torch.equal(torch.rand(3), undisturbed)
    assert drawn(1) == first != drawn(2)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=9),
        Decoding(strategy="beam", num_beams=3, max_new_tokens=9),
        Decoding(strategy="beam", num_beams=3, length_penalty=0.0, max_new_tokens=9),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_together_equals_one_by_one_for_every_strategy(kind: str, decoding: Decoding) -> None:
    side, images = language_model(kind), vision(4)
    prompts = [item(length, length)[0] for length in (1, 7, 3, 5)]
    eos = side.generate(images, prompts, eos_id=NEVER, max_new_tokens=9)[1][4]
    together = side.generate(images, prompts, eos_id=eos, decoding=decoding)
    for index, prompt in enumerate(prompts):
        alone = VisionTokens(images.tokens_BTD[index : index + 1], images.grid_hw)
        assert side.generate(alone, [prompt], eos_id=eos, decoding=decoding) == [together[index]]


def test_a_drawn_row_does_not_depend_on_its_neighbors() -> None:
    side, images = language_model("cross"), vision(3)
    prompts = [item(length, length)[0] for length in (2, 6, 4)]
    decoding = Decoding(strategy="sample", temperature=2.0, max_new_tokens=8, seed=10)
    together = side.generate(images, prompts, eos_id=NEVER, decoding=decoding)
    alone = VisionTokens(images.tokens_BTD[2:], images.grid_hw)
    shifted = Decoding(strategy="sample", temperature=2.0, max_new_tokens=8, seed=12)  # row 0 draws as row 2 did
    assert side.generate(alone, prompts[2:], eos_id=NEVER, decoding=shifted) == together[2:]


@pytest.mark.parametrize("depth", [1, 3])
def test_cached_greedy_is_the_uncached_argmax(depth: int) -> None:
    torch.manual_seed(depth)
    side = CrossAttentionDecoder(vocab_size=VOCAB, width=16, depth=depth, heads=2, max_tokens=24)
    for name, parameter in side.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    side.eval()
    images, prompts = vision(3), [item(length, length)[0] for length in (1, 9, 4)]
    cached = side.generate(images, prompts, eos_id=NEVER, max_new_tokens=12)
    for index, prompt in enumerate(prompts):
        image = VisionTokens(images.tokens_BTD[index : index + 1], images.grid_hw)
        row = list(prompt)
        for _ in range(12):  # the next token by a forward over all tokens, a dummy standing where it is to be
            row.append(int(side(image, pack([[([*row, 5], len(row))]], 0)).logits_MV.argmax(-1)))
        assert cached[index] == row[len(prompt) :]


def test_each_token_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    side, images = language_model("cross"), vision(2)
    assert isinstance(side, CrossAttentionDecoder)
    seen: list[int] = []
    side.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    side.generate(images, [[1, 4, 5], [1, 7]], eos_id=NEVER, max_new_tokens=5)
    assert seen == [3, 1, 1, 1, 1]


def test_draws_follow_the_distribution() -> None:
    num = 4000
    chain = Chain(1, vocabulary=6, seed=3)
    chain.table = chain.table.expand(num, -1, -1)
    chain.rows, chain.owner = [[] for _ in range(num)], list(range(num))
    decoding = Decoding(strategy="sample", temperature=1.7, max_new_tokens=1, seed=11)
    drawn = write(chain, decoding, eos_id=99, room=[1] * num)
    counts_V = torch.bincount(torch.tensor(drawn).flatten(), minlength=6)
    expected_V = (chain.table[0, 0] / 1.7).softmax(-1) * num
    chi_square = float(((counts_V - expected_V) ** 2 / expected_V).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded by chance once in 1000 times


def test_top_k_and_top_p_by_hand() -> None:
    logits_RV = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()

    def left(**options: Any) -> list[list[float]]:
        return [
            [round(p, 4) for p in row]
            for row in likely_tokens(logits_RV, Decoding(strategy="sample", **options)).tolist()
        ]

    assert left() == [[0.15, 0.5, 0.05, 0.3], [0.97, 0.01, 0.01, 0.01]]
    assert left(top_k=2)[0] == [0.0, 0.625, 0.0, 0.375]
    assert left(top_p=0.75) == [[0.0, 0.625, 0.0, 0.375], [1.0, 0.0, 0.0, 0.0]]
    assert left(top_p=0.85)[0] == [round(0.15 / 0.95, 4), round(0.5 / 0.95, 4), 0.0, round(0.3 / 0.95, 4)]
    squared = [0.15**2, 0.5**2, 0.05**2, 0.3**2]
    assert left(temperature=0.5)[0] == pytest.approx([p / sum(squared) for p in squared], abs=1e-4)
    assert left(top_k=99) == left()


def test_a_row_without_room_writes_nothing_by_any_strategy() -> None:
    side, images = language_model("cross"), vision(2)
    prompts = [item(24, 24)[0], item(20, 20)[0]]
    strategies: tuple[Strategy, ...] = ("beam", "sample")
    for strategy in strategies:
        decoding = Decoding(strategy=strategy, max_new_tokens=9)
        rows = side.generate(images, prompts, eos_id=VOCAB, decoding=decoding)  # outside: it never ends
        assert [len(row) for row in rows] == [0, 4]
    assert side.generate(vision(0), [], eos_id=NEVER) == []


def test_the_prefix_lm_stops_at_its_last_position() -> None:
    side, images = language_model("prefix"), vision(1)  # 64 positions, 6 of them the image's
    written = side.generate(images, [item(50, 50)[0]], eos_id=NEVER, max_new_tokens=32)
    assert len(written[0]) == 8
    with pytest.raises(DataError, match="an image with its prompt takes 64 tokens and leaves no room"):
        side.generate(images, [item(58, 58)[0]], eos_id=NEVER)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strategy": "best"}, "strategy is 'best'; use one of greedy, beam, sample"),
        ({"num_beams": 0}, "num_beams is 0, but must lie in"),
        ({"temperature": 0.0}, "temperature is 0.0, .* the limit 0, use strategy greedy"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5, but must lie in"),
        ({"top_k": 0}, "top_k is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Decoding(**options)
