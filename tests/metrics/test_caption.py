"""Caption scores against hand-computed values and pycocoevalcap's own classes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from tests.metrics.ptb_cases import captions
from visexpert.errors import ConfigError, DataError, WeightsError
from visexpert.metrics import CaptionScores
from visexpert.metrics.java import has_java

needs_java = pytest.mark.skipif(not has_java(), reason="needs a java program on the PATH")

PREDICTIONS = ["A red cube left of a blue sphere.", "a small dog", "nothing here"]
REFERENCES = [
    ["a red cube left of a blue sphere", "a blue sphere right of a red cube"],
    ["A small dog's tail", "the dog is small"],
    ["a large cat", "the cat", "two cats"],
]


def test_by_hand() -> None:
    metric = CaptionScores(meteor=False)
    metric.update(["the cat the cat"], [["the cat sat"]])
    scores = metric.compute()
    # 1-grams: "the" and "cat" clipped to 1 each of 4; 2-grams: "the cat" clipped to 1 of 3. No brevity penalty.
    assert scores["bleu-1"] == pytest.approx(2 / 4, rel=1e-4)
    assert scores["bleu-2"] == pytest.approx(math.sqrt(2 / 4 * 1 / 3), rel=1e-4)
    # Longest common subsequence 2: precision 2/4, recall 2/3, beta 1.2.
    assert scores["rouge-l"] == pytest.approx((1 + 1.44) * (1 / 2) * (2 / 3) / (2 / 3 + 1.44 * 1 / 2))
    # With one image every n-gram is in every document: no weight at all.
    assert scores["cider"] == 0


def test_perfect_captions() -> None:
    metric = CaptionScores(meteor=False)
    texts = ["a red cube left of a sphere", "two dogs run over green grass", "one man rides the tall horse"]
    metric.update([text.capitalize() + "." for text in texts], [[text] for text in texts])
    scores = metric.compute()
    assert set(scores) == {"bleu-1", "bleu-2", "bleu-3", "bleu-4", "rouge-l", "cider"}
    assert all(scores[f"bleu-{n}"] == pytest.approx(1, abs=1e-6) for n in range(1, 5))
    assert scores["rouge-l"] == pytest.approx(1)
    assert scores["cider"] == pytest.approx(10)


def test_equals_pycocoevalcap_on_its_own_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    metric = CaptionScores(meteor=False)
    metric.update(PREDICTIONS[:1], REFERENCES[:1])
    metric.update(PREDICTIONS[1:], REFERENCES[1:])
    scores = metric.compute()
    assert capsys.readouterr().out == ""
    said = {0: ["a red cube left of a blue sphere"], 1: ["a small dog"], 2: ["nothing here"]}
    true = {0: REFERENCES[0], 1: ["a small dog 's tail", "the dog is small"], 2: REFERENCES[2]}
    bleu, _ = Bleu(4).compute_score(true, said, verbose=0)
    assert [scores[f"bleu-{n}"] for n in range(1, 5)] == pytest.approx(bleu)
    assert scores["rouge-l"] == pytest.approx(Rouge().compute_score(true, said)[0])
    assert scores["cider"] == pytest.approx(Cider().compute_score(true, said)[0])


def test_each_family_is_a_corpus_of_its_own() -> None:
    together, alone = CaptionScores(meteor=False), CaptionScores(meteor=False)
    together.update(PREDICTIONS, REFERENCES, ["in-domain", "out-domain", "in-domain"])
    alone.update([PREDICTIONS[0], PREDICTIONS[2]], [REFERENCES[0], REFERENCES[2]])
    scores, expected = together.compute(), alone.compute()
    assert {name: scores[f"family/in-domain/{name}"] for name in expected} == pytest.approx(expected)
    assert scores["family/out-domain/cider"] == 0  # one image alone
    plain = CaptionScores(meteor=False)
    plain.update(PREDICTIONS, REFERENCES)
    assert {name: scores[name] for name in expected} == pytest.approx(plain.compute())


def test_empty_prediction_scores_nothing_but_does_not_fail() -> None:
    metric = CaptionScores(meteor=False)
    metric.update(["", "..."], [["a cat"], ["two dogs"]])
    assert all(value == pytest.approx(0, abs=1e-6) for value in metric.compute().values())


def test_references_without_a_word_are_named() -> None:
    metric = CaptionScores(meteor=False)
    metric.update(["a cat"], [["..."]])
    with pytest.raises(DataError, match="none of the reference captions of 1 images has a word"):
        metric.compute()


@pytest.mark.parametrize("references", [[[]], ["a cat"]])
def test_references_are_lists(references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="list of at least one reference"):
        CaptionScores(meteor=False).update(["a cat"], references)


def test_unknown_tokenizer() -> None:
    with pytest.raises(ConfigError, match="'ptb' is unknown.* python, java"):
        CaptionScores(tokenizer="ptb")  # type: ignore[arg-type]


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for bad in ({"tokenizer": "java"}, {"meteor": True}, {"spice": True}):
        with pytest.raises(ConfigError, match="needs Java"):
            CaptionScores(**bad)
    metric = CaptionScores(tokenizer="auto")
    metric.update(PREDICTIONS, REFERENCES)
    assert "meteor" not in metric.compute()


def test_spice_without_models_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pycocoevalcap.spice import get_stanford_models as stanford

    monkeypatch.setattr(stanford, "__file__", str(tmp_path / "get_stanford_models.py"))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(WeightsError, match=r"SPICE needs stanford-corenlp-3\.6\.0\.jar and .*-models\.jar in .*lib"):
        CaptionScores(spice=True, meteor=False)


@needs_java
def test_java_tokenizer_gives_the_same_scores() -> None:
    texts = captions(120, seed=3)
    rows = (texts[:40], [list(pair) for pair in zip(texts[40:80], texts[80:], strict=True)])
    scores = []
    for tokenizer in ("python", "java"):
        metric = CaptionScores(tokenizer=tokenizer, meteor=False)
        metric.update(*rows)
        scores.append(metric.compute())
    assert scores[0] == scores[1]


@needs_java
def test_meteor_joins_in_where_there_is_java() -> None:
    metric = CaptionScores()
    metric.update(["a red cube left of a sphere", "x ||| y", ""], [["a red cube left of a sphere"], ["x ||| y"], ["z"]])
    # METEOR 1.5 of a caption against itself is 1, and an empty one has no match; the corpus score lies between.
    assert 0.7 < metric.compute()["meteor"] < 1
