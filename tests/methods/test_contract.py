"""What every command asks of a method: the example of docs/method.md walks through all of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from inspect import isabstract
from pathlib import Path

import pytest
from PIL import Image

from visexpert import trust
from visexpert.app.session import open_session
from visexpert.callbacks.meant_for import llava_problems
from visexpert.cli import main
from visexpert.methods import FusingMethod, Method

PAGE = Path(__file__).parents[2] / "docs" / "method.md"
SOURCE = Path(__file__).parents[2] / "src" / "visexpert"

NETWORKS = ("experts", "language", "networks", "vision", "commands/trial")
"""Where a model is a network of another library, which may lack what another one has."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's files and a finished run of its method."""
    folder = tmp_path_factory.mktemp("house")
    for block in re.findall(r"```(?:python|yaml)\n(# (\S+)\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        (folder / block[1]).write_text(block[0], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        main(["fit", "--config", "adapter_tuning.yaml"])
        yield folder


def test_the_page_names_the_contract() -> None:
    page = PAGE.read_text(encoding="utf-8")
    required = {"view_tokens", "frozen_modules", "trained_groups"}
    assert Method.__abstractmethods__ == required
    assert [name for name in FusingMethod.__abstractmethods__ if f"`{name}(" not in page] == []
    for name in re.findall(r"^\| `(\w+)(?:\(.*?\))?` \|", page, re.MULTILINE):
        assert hasattr(FusingMethod, name) or name in {"clip", "projector", "language", "hub", "fusion_space"}, name


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_third_method_trains(house: Path) -> None:
    metrics = json.loads((house / "runs/adapter/metrics.json").read_text(encoding="utf-8"))
    assert metrics["cost/steps"] == 2 and "test/vqa/accuracy" in metrics


def test_a_third_method_is_planned(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", "adapter_tuning.yaml", "--json"])
    plan = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in plan["parts"]}
    assert {name: row["role"] for name, row in rows.items()} == {
        "encoder": "student",
        "projector": "transfer",
        "adapter": "transfer",
        "language model": "language",
    }
    assert rows["encoder"]["trained"] == 0
    assert rows["adapter"]["trained"] == 2 * 32 * 16 + 16 + 32
    assert rows["adapter"]["forward"] == pytest.approx(16 * 2 * 2 * 32 * 16 / 1e9)


def test_a_third_method_writes(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(house / "photo.png")
    main(["caption", "runs/adapter", "photo.png", "--json", "--trust", "adapter_tuning"])
    record = json.loads(capsys.readouterr().out)[0]
    assert record["error"] is None and record["text"] is not None and not record["experts"]


def test_a_third_method_is_exported_and_what_stays_behind_is_named(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", "runs/adapter", "--format", "hf", "--out", "hf", "--trust", "adapter_tuning"])
    facts = json.loads((house / "hf/fidelity.json").read_text(encoding="utf-8"))
    assert facts["licenses"].keys() == {"clip"}
    assert facts["origin"]["not exported"] == "adapter"


def test_a_third_method_answers_on_the_page(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_granted", trust.Granted(("adapter_tuning",)))
    session = open_session(house / "runs/adapter", device="cpu")
    Image.new("RGB", (20, 20), (10, 200, 30)).save(house / "asked.png")
    reply = session.ask(house / "asked.png", "a photo of", [])
    assert session.experts == () and reply.overlay is None and len(reply.rows) == 1
    assert "adapter" in llava_problems(session.main.captioner.run.model)


def test_a_third_method_is_compared(house: Path) -> None:
    main(["compare", "runs/adapter", "--out", "report"])
    assert "adapter" in (house / "report/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["merge", "detach"])
def test_phases_refuse_a_method_without_fusion(command: str, house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "runs/adapter", "--trust", "adapter_tuning", *(["--keep=1"] if command == "detach" else [])])
    assert end.value.code == 2
    said = last_line(capsys)
    assert "AdapterTuning" in said and "FusingMethod" in said


@cache
def concrete(method: type[Method] = Method) -> set[str]:
    """Names of the package's methods that can be built."""
    below = {name for child in method.__subclasses__() for name in concrete(child)}
    own = not isabstract(method) and method.__module__.startswith("visexpert.")
    return below | ({method.__name__} if own else set())


def unlawful(source: str, *, of_networks: bool = False) -> list[str]:
    """What a file outside ``methods`` asks of a method beside the contract.

    Args:
        source: Its code.
        of_networks: Its models are other libraries'.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            first, second = ast.unparse(node.args[0]), ast.unparse(node.args[1])
            if node.func.id in ("isinstance", "issubclass") and concrete() & set(re.findall(r"\w+", second)):
                found.append(ast.unparse(node))
            is_method = re.search(r"(^|\.)_?(model|method|pl_module)$", first) is not None
            if node.func.id in ("getattr", "hasattr") and is_method and not of_networks:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            is_any = not of_networks and ast.unparse(node.annotation) == "Any"
            if is_any and name in ("model", "method", "pl_module"):
                found.append(ast.unparse(node))
    return found


def test_nothing_outside_methods_asks_which_method_it_has() -> None:
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    found = [
        f"{name}: {part}"
        for name, path in files.items()
        if not name.startswith("methods/")
        for part in unlawful(path.read_text(encoding="utf-8"), of_networks=name.startswith(NETWORKS))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(saved.model, ToVE)",
        "isinstance(model, methods.MoVEKD | int)",
        "issubclass(kind, (Merging, ToVE))",
        "getattr(self._model, 'hub', None)",
        "hasattr(pl_module, 'clip')",
        "def f(model: Any) -> None: ...",
        "def f(*, method: Any = None) -> None: ...",
        "model: Any = saved.model",
    ],
)
def test_each_way_to_ask_is_seen(source: str) -> None:
    assert len(unlawful(source)) == 1


def test_the_contract_may_be_asked() -> None:
    assert unlawful("isinstance(model, FusingMethod)\nmodel.hub\ndef f(model: Method, part: Any) -> None: ...") == []
