"""The Python PTB tokenizer against the official one."""

from __future__ import annotations

import json

import pytest

from tests.metrics.ptb_cases import GOLDEN, GOLDEN_COUNT, STRANGE_COUNT, captions, strange
from visexpert.metrics.java import has_java, tokenize_with_java
from visexpert.metrics.ptb import one_line, tokenize

needs_java = pytest.mark.skipif(not has_java(), reason="needs a java program on the PATH")


def test_equals_recorded_output_of_the_official_tokenizer() -> None:
    recorded = json.loads(GOLDEN.read_text(encoding="ascii"))
    assert [text for text, _ in recorded] == captions(GOLDEN_COUNT) + strange(STRANGE_COUNT), (
        "run tests/metrics/ptb_cases.py to renew the file"
    )
    for text, tokens in recorded:
        assert " ".join(tokenize(text)) == tokens, text


@needs_java
def test_equals_official_tokenizer_on_thousands_of_captions() -> None:
    texts = captions(6000, seed=1) + strange(3000, seed=1)
    for text, tokens in zip(texts, tokenize_with_java(texts), strict=True):
        assert tokenize(text) == tokens, text


@needs_java
def test_equals_pycocoevalcap_itself() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [text for text in captions(300, seed=2) if text.isascii()]
    # Its lexer looks across the line's end: a lower-case caption in between keeps the others apart.
    data = {index: [{"caption": text}, {"caption": "x"}] for index, text in enumerate(texts)}
    official = PTBTokenizer().tokenize(data)
    # Like every user of it we then split at white space, which also drops the space that it leaves at an end.
    assert [tokenize(text) for text in texts] == [
        [token for token in official[index][0].split(" ") if token] for index in range(len(texts))
    ]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man doesn't ride.", "a man does n't ride"),
        ("the dog's (brown) tail", "the dog 's -lrb- brown -rrb- tail"),
        ("Mr. Smith, U.S. citizen", "mr. smith u.s. citizen"),
        ("black-and-white, 1,000 cannot", "black-and-white 1,000 can not"),
        ("http://a.b/c{d} x.com/a{b", "http://a.b/c -lcb- d -rcb- x.com/a{b"),
        ("J'uvx J'Mcy l'a", "j'uvx j'mcy l' a"),
        ("li'l nat'l cont'd. nor'easter", "li'l nat'l cont'd. nor'easter"),
        ("\ua7b1 \u08c2a \u0978", "a"),  # letters that came after Unicode 6.0
        ("one\ntwo\r\nthree\u2028four\x0bfive", "one two three four five"),
    ],
)
def test_known_captions(text: str, tokens: str) -> None:
    assert " ".join(tokenize(text)) == tokens


def test_plain_captions_equal_split() -> None:
    text = "A man in a red shirt, with a dog, rides a bike down the street"
    assert tokenize(text + ".") == text.lower().replace(",", "").split()


def test_nothing_from_nothing() -> None:
    assert tokenize("") == tokenize(" \n\t ") == tokenize("\U0001f600") == tokenize("...") == []


def test_one_line_keeps_words_apart() -> None:
    assert one_line("a\nb\x85c") == "a b c"


@pytest.mark.parametrize("unit", ["it's 5-10 a.b ", "a", "a-", "1.", "<a ", "a@", "''", "1 ", "a'", "a/", "www.", "&"])
def test_long_captions_come_back(unit: str) -> None:
    """No rule tries exponentially many ways to match (the test would not end)."""
    assert len(tokenize(unit * 1500)) <= 1500 * len(unit)
