"""Extras: whatever needs one says so in a sentence, and nothing else imports them."""

from __future__ import annotations

import ast
import re
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from tests.data.formats import tokenizer_folder
from visexpert import errors
from visexpert.data import HuggingFaceData
from visexpert.data.needs import load_tokenizer
from visexpert.errors import ConfigError, WeightsError, require_package
from visexpert.language.lora import quantized

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_TOOLS = {"dev", "test", "browser-test", "docs"}
EXTRAS: dict[str, list[str]] = {
    name: needs for name, needs in PROJECT["optional-dependencies"].items() if name not in FOR_TOOLS
}
SOURCE = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}


def name_of(requirement: str) -> str:
    """How a requirement is imported, as far as the names agree."""
    return re.split(r"[\[<>=~! ]", requirement)[0].replace("-", "_").lower()


def test_every_extra_is_named_where_it_is_missed_and_no_other() -> None:
    texts = [
        *SOURCE.values(),
        *(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *ROOT.rglob("docs/*.md")]),
    ]
    named = set(re.findall(r"visexpert\[([\w-]+)\]|extra=\"([\w-]+)\"", "\n".join(texts)))
    assert {one or other for one, other in named} == set(EXTRAS)


def test_the_quickstart_lists_every_extra() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert set(
        re.findall(r"^\| `([\w-]+)` \|", text.partition("| extra |")[2].partition("\n\n")[0], re.MULTILINE)
    ) == set(EXTRAS)


def test_only_functions_import_packages_of_extras() -> None:
    """Or modules that nothing imports without them."""
    optional = {name_of(need) for needs in EXTRAS.values() for need in needs}
    found = {
        (path.relative_to(ROOT / "src" / "visexpert").as_posix(), module.partition(".")[0])
        for path, text in SOURCE.items()
        for node in ast.parse(text).body
        for module in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if module.partition(".")[0] in optional
    }
    assert found <= {
        ("app/page.py", "gradio"),
        ("app/server.py", "gradio"),
        ("export/onnx.py", "onnxruntime"),
        ("integrations/lmms_eval.py", "lmms_eval"),
        ("integrations/lmms_manifest.py", "lmms_eval"),
        ("report/compare/statistics.py", "scipy"),
    }


@pytest.fixture
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the packages is there."""

    def find(name: str) -> Any:
        return (
            None if name in {"scipy", "gradio", "bitsandbytes", "sentencepiece", "datasets"} else util.find_spec(name)
        )

    monkeypatch.setattr(errors, "find_spec", find)
    monkeypatch.setattr("visexpert.language.lora.find_spec", find)


@pytest.mark.usefixtures("_bare")
def test_what_is_missing_is_one_sentence_with_the_extra(tmp_path: Path) -> None:
    from visexpert.commands import compare, serve

    for call, package, extra in (
        (lambda: compare.run([str(tmp_path), "--out", str(tmp_path)]), "scipy", "compare"),
        (lambda: serve.run([str(tmp_path)]), "gradio", "app"),
        (lambda: quantized("nf4", None), "bitsandbytes", "quantization"),  # type: ignore[arg-type]
        (lambda: HuggingFaceData(root=str(tmp_path)), "datasets", "datasets"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert package in str(caught.value) and f"'visexpert[{extra}]'" in str(caught.value)
    require_package("json", extra="compare", what="This")


@pytest.mark.usefixtures("_bare")
def test_a_sentencepiece_tokenizer_names_its_extra_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "vicuna"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    with pytest.raises(ConfigError, match=r"sentencepiece.*visexpert\[vicuna\]"):
        load_tokenizer(str(folder))
    damaged = Path(tokenizer_folder(tmp_path / "words"))
    (damaged / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_tokenizer(str(damaged))
