"""Arguments of the public API: what is not of the annotated type is refused, what is passes unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import visexpert as vx
from visexpert import losses
from visexpert.typed import is_typed, typed

RECORDS = {"Answer", "Batch", "SavedRun", "VisionTokens"}
"""What visexpert fills and users read."""

IN_STEPS = {*losses.__all__, "collect_routing"}
"""What training steps call, where looking at arguments would take time."""

WITHOUT = {"NoLanguage", "tabletop_tokenizer"}
"""What takes no argument."""


def test_public_classes_and_functions_look_at_their_arguments_outside_of_steps() -> None:
    named = {name: getattr(vx, name) for name in vx.__all__ if name != "__version__"}
    unlooked = {
        name
        for name, value in named.items()
        if not is_typed(value) and not (isinstance(value, type) and issubclass(value, Exception))
    }
    assert unlooked == RECORDS | IN_STEPS & named.keys() | WITHOUT
    assert not any(inspect.signature(named[name]).parameters for name in WITHOUT)


def parts(**changed: Any) -> dict[str, Any]:
    good = {
        "clip": vx.ClipEncoder(source="zoo:clip"),
        "experts": {"edges": vx.TinyExpert(source="zoo:edges")},
        "language": vx.NoLanguage(),
    }
    return good | changed


WRONG: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no language": (lambda: vx.ToVE(**parts(language=None)), ("ToVE: language", "None", "LanguageModel")),
    "a source for an encoder": (lambda: vx.ToVE(**parts(clip="zoo:clip")), ("clip", "'zoo:clip'", "VisionEncoder")),
    "a list of experts": (lambda: vx.MoVEKD(**parts(experts=[1])), ("experts", "a list", "dict[str, VisionExpert]")),
    "one wrong expert": (
        lambda: vx.MoVEKD(**parts(experts={"depth": None})),
        ("experts", "'depth'", "VisionExpert"),
    ),
    "a dict for settings": (lambda: vx.ToVE(**parts(gate={"top_k": 1})), ("gate", "dict", "GateSettings")),
    "one name for several": (lambda: vx.ToVE(**parts(use="edges")), ("use", "'edges'", "str", "None")),
    "a part of settings": (lambda: vx.ToVEOptimizer(betas=(0.9, "x")), ("betas", "item 1", "float")),  # type: ignore[arg-type]
    "too few": (lambda: vx.ToVEOptimizer(betas=(0.9,)), ("betas", "tuple", "float, float")),  # type: ignore[arg-type]
    "a truth for a number": (lambda: vx.ToVEOptimizer(lr=True), ("lr", "True", "float")),
    "an unknown word": (lambda: vx.ToVE(**parts(transfer="sum")), ("transfer='sum'", "residual, replacement")),
    "a hub of nothing": (lambda: vx.ExpertHub(None), ("ExpertHub: experts", "None")),  # type: ignore[arg-type]
    "a captioner's run": (lambda: vx.Captioner("runs/tove"), ("run", "'runs/tove'", "SavedRun")),  # type: ignore[arg-type]
    "data": (lambda: vx.TabletopData(num_train="many"), ("num_train", "'many'", "int")),  # type: ignore[arg-type]
    "data of a file": (lambda: vx.ImageTable(root=3), ("ImageTable: root", "3", "str")),
    "a metric": (lambda: vx.CaptionScores(meteor="yes"), ("CaptionScores: meteor", "'yes'", "bool")),  # type: ignore[arg-type]
    "a function": (lambda: vx.add_mole(None), ("add_mole: encoder", "None", "Module")),  # type: ignore[arg-type]
    "a folder": (lambda: vx.load_run(None), ("load_run: folder", "None", "Path")),  # type: ignore[arg-type]
    "an export": (lambda: vx.export_encoder("clip", "out"), ("export_encoder: clip", "VisionEncoder")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_type_is_refused_by_name_value_and_what_is_taken(kind: str) -> None:
    make, words = WRONG[kind]
    with pytest.raises(vx.ConfigError if words else TypeError) as told:
        make()
    assert not [word for word in words if word not in str(told.value)], told.value
    assert "\n" not in str(told.value)


def test_an_expert_of_ones_own_is_looked_at_where_it_calls_the_base() -> None:
    class Own(vx.VisionExpert):
        def __init__(self) -> None:
            super().__init__(image_size="big", token_dim=4, grid_hw=(2, 2), license="MIT")  # type: ignore[arg-type]

        def load_weights(self) -> None: ...

        def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            return pixels_BCHW

    with pytest.raises(vx.ConfigError, match="Own: image_size is 'big'"):
        Own()


def test_a_path_stands_for_the_text_that_names_it() -> None:
    clip = Path(vx.__file__).parent / "tabletop/zoo/weights/clip"
    assert vx.ClipEncoder(source=clip).source == str(clip)  # type: ignore[arg-type]


FITS: list[tuple[Any, Any, Any]] = [
    (3, float, 3),
    (np.float32(3), float, 3.0),
    (np.int64(3), int, 3),
    ([1, 2], tuple[int, int], (1, 2)),
    ((1, 2), list[int], [1, 2]),
    ((), tuple[int, ...], ()),
    (None, int | None, None),
    ({"a": 1}, Mapping[str, int], {"a": 1}),
    (("a",), Sequence[str], ("a",)),
    ({"a"}, Iterable[str], {"a"}),
    (len, Callable[[str], int], len),
    ("all", list[int] | Literal["all"] | None, "all"),
    (True, bool | float, True),
    (Path("a"), str | None, "a"),
    (Path("a"), str | Path, Path("a")),
    (vx.TinyExpert, type[vx.VisionExpert], vx.TinyExpert),
]


def taking(hint: Any) -> Callable[[Any], Any]:
    def take(x: Any) -> Any:
        return x

    take.__annotations__["x"] = hint
    return typed(take)


@pytest.mark.parametrize(("value", "hint", "taken"), FITS)
def test_what_fits_passes(value: Any, hint: Any, taken: Any) -> None:
    got = taking(hint)(value)
    assert got == taken and type(got) is type(taken)


def test_elements_of_iterators_are_not_used_up() -> None:
    assert list(taking(Iterable[str])(each for each in "ab")) == ["a", "b"]


DIFFERS: list[tuple[Any, Any, tuple[str, ...]]] = [
    (True, int, ("True", "int")),
    (1, bool, ("1", "bool")),
    (1.5, int, ("1.5", "int")),
    ("ab", Sequence[str], ("'ab'", "Sequence[str]")),
    ("ab", list[str] | None, ("'ab'", "list[str] or None")),
    ([1, None], list[int], ("item 1", "list[int]")),
    ({1: 1}, dict[str, int], ("key 1", "dict[str, int]")),
    ({"a": {"b": "c"}}, dict[str, dict[str, int]], ("'a'", "'b'", "int")),
    ((1, 2, 3), tuple[int, int], ("tuple", "tuple[int, int]")),
    (["a"], list[int] | Literal["all"] | None, ("item 0", "list[int]", "'all'")),
    ("some", list[int] | Literal["all"] | None, ("'some'", "all")),
    (2, Literal[1], ("2", "Literal[1]")),
]


@pytest.mark.parametrize(("value", "hint", "words"), DIFFERS)
def test_what_differs_is_named_where_it_differs(value: Any, hint: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(vx.ConfigError) as told:
        taking(hint)(value)
    message = str(told.value)
    assert message.startswith("take: x") and "\n" not in message
    assert not [word for word in words if word not in message], message


def test_a_decorated_function_stays_itself() -> None:
    @typed
    def add(left: int, right: int = 1, *more: int) -> int:
        """Add."""
        return left + right + sum(more)

    @typed
    @dataclass(frozen=True)
    class Point:
        x: int
        y: int = 2

    assert add(1, 2, 3, 4) == 10 and add.__doc__ == "Add." and list(inspect.signature(add).parameters)[0] == "left"
    assert Point(1) == Point(1, 2) and repr(Point(1)).endswith("Point(x=1, y=2)")
    for made in (add, Point):
        call: Callable[..., Any] = made
        with pytest.raises(vx.ConfigError, match="'a'"):
            call(1, "a")
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            call()
