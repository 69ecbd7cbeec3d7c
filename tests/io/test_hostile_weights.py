"""Weights that are made to harm: headers that lie, zips that unpack to gigabytes, code that comes with a model."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from visexpert.data.needs import load_tokenizer
from visexpert.errors import UserError, WeightsError
from visexpert.experts import TransformersExpert
from visexpert.io.checkpoints import checked_checkpoint, load_checkpoint
from visexpert.io.reading import check_unpacked
from visexpert.io.source import ZOO, ModelSource
from visexpert.io.weights import load_state, state_keys
from visexpert.language import BertDecoder, PrefixLM
from visexpert.tabletop.tiny import HEADER_KEY, TinyExpert, read_header
from visexpert.vision import ClipEncoder, vision_encoder
from visexpert.vision.text_towers import TransformersTextTower

SOURCE = Path(__file__).parents[2] / "src"


def lying(header: Any, *, content: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    """A safetensors file whose header states whatever it likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def tensor(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


LYING: dict[str, bytes] = {
    "offsets beyond the file": lying({"a": tensor([32], 0, 128)}),
    "offsets that overlap": lying({"a": tensor([16], 0, 64), "b": tensor([8], 32, 64)}),
    "offsets with a hole": lying({"a": tensor([4], 0, 16), "b": tensor([4], 48, 64)}),
    "offsets that run backwards": lying({"a": tensor([16], 64, 0)}),
    "offsets below 0": lying({"a": tensor([16], -64, 0)}),
    "a huge shape": lying({"a": tensor([2**40, 2**20], 0, 64)}),
    "a shape whose product overflows": lying({"a": tensor([2**63, 2], 0, 64)}),
    "a shape below 0": lying({"a": tensor([-16], 0, 64)}),
    "a type that is none": lying({"a": tensor([16], 0, 64, dtype="F31")}),
    "fewer bytes than its type needs": lying({"a": tensor([16], 0, 64, dtype="F64")}),
    "a header longer than the file": lying({"a": tensor([16], 0, 64)}, length=2**40),
    "a header of all bytes there are": lying({"a": tensor([16], 0, 64)}, length=2**64 - 1),
    "a header that is deep": lying(b"[" * 100_000),
    "a header that is a list": lying([1, 2]),
    "metadata that is deep": lying({"__metadata__": {"a": {"b": 1}}, "a": tensor([16], 0, 64)}),
    "no header": b"\0" * 7,
    "more than its tensors": lying({"a": tensor([4], 0, 16)}),
}


@pytest.mark.parametrize("kind", LYING)
def test_a_safetensors_header_that_lies_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LYING[kind])
    with pytest.raises(WeightsError, match=r"Test: .*model\.safetensors") as told:
        load_state(path, owner="Test")
    assert "\n" not in str(told.value) and len(str(told.value)) < 600
    assert state_keys(path) is None
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "null", "1" * 5000])
def test_a_header_of_a_tiny_expert_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "depth.safetensors"
    path.write_bytes(save({"a": torch.zeros(4)}, {HEADER_KEY: text}))
    with pytest.raises(WeightsError, match=r"depth\.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    "said",
    [
        {"kind": []},
        {"kind": "../dense"},
        {"image_size": "large"},
        {"image_size": -8},
        {"image_size": 1e400},
        {"image_size": None},
        {"network": [1]},
        {"network": {"width": -1}},
        {"network": {"width": "x"}},
        {"network": {"width": 2**62}},
        {"network": {"__class__": 1}},
        {"mean": ["a", 0, 0]},
        {"std": [0, 0, 0]},
    ],
)
def test_a_tiny_expert_whose_header_lies_is_one_sentence(tmp_path: Path, said: dict[str, Any]) -> None:
    path = tmp_path / "depth.safetensors"
    header = {**read_header(ZOO / "depth.safetensors"), **said}
    path.write_bytes(save({"a": torch.zeros(4)}, {HEADER_KEY: json.dumps(header)}))
    with pytest.raises(UserError) as told:
        TinyExpert(source=str(path)).load_weights()
    assert "\n" not in str(told.value)


def torch_file(**state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "global_step": 3}, buffer)
    return buffer.getvalue()


def packed(content: bytes, *, times: int = 1) -> bytes:
    """The same zip compressed; ``times`` entries of its largest file lie over one another, as in a zip bomb."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
        largest = max(archive.filelist, key=lambda entry: entry.file_size)
        archive.filelist += [largest] * (times - 1)
    return target.getvalue()


ZIPS: dict[str, Callable[[], bytes]] = {
    "packed": lambda: packed(torch_file(w=torch.zeros(2**20))),
    "overlapping": lambda: packed(torch_file(w=torch.rand(2**10)), times=50),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_a_zip_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(ZIPS[kind]())
    with pytest.raises(WeightsError, match=r"Test: .*pytorch_model\.bin.*unpacks to"):
        load_state(path, owner="Test")
    assert state_keys(path) is None
    for read in (load_checkpoint, checked_checkpoint):
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
            read(path, owner="Test")
    with pytest.raises(WeightsError, match=r"Test: .*pytorch_model\.bin.*unpacks to"):  # what transformers would read
        ModelSource.parse(str(tmp_path)).fetch_weights(owner="Test")


def test_what_torch_wrote_unpacks_to_itself(tmp_path: Path) -> None:
    for number, content in enumerate(
        (torch_file(w=torch.zeros(2**20), v=torch.rand(3)), b"", b"text", LYING["no header"])
    ):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        check_unpacked(path)


def test_no_call_of_transformers_may_run_what_comes_with_a_model() -> None:
    """None asks the user at the terminal, so each call says no."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("from_pretrained", "from_config"):
                given = {word.arg: word.value for word in node.keywords}
                said = given.get("trust_remote_code")
                found.append((path.name, node.lineno, isinstance(said, ast.Constant) and said.value is False))
    assert len(found) > 10 and [place for place in found if not place[2]] == []


@pytest.fixture
def carrying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose every part names code that lies in it; nobody may be asked whether to run it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n", encoding="utf-8")
    own = {f"Auto{part}": "own.Own" for part in ("Config", "Model", "ModelForCausalLM", "ImageProcessor", "Processor")}
    content: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": "own", "auto_map": own},
        "preprocessor_config.json": {"image_processor_type": "Own", "auto_map": own},
        "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        "tokenizer.json": {},
    }
    for name, fields in content.items():
        (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save({"a": torch.zeros(1)}))

    def asked(*_: object) -> str:
        raise AssertionError("a user is asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    return folder


SIZES: dict[str, int] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 16,
    "image_size": 32,
    "patch_size": 16,
}
SMALL = {**SIZES, "vision_config": SIZES, "text_config": SIZES}

READERS: dict[str, Callable[[str], Any]] = {
    "language model": lambda source: PrefixLM(source=source),
    "decoder": lambda source: BertDecoder(source=source),
    "expert": lambda source: TransformersExpert(source=source).load_weights(),
    "encoder": lambda source: vision_encoder(source).load_weights(),
    "CLIP": lambda source: ClipEncoder(source=source).load_weights(),
    "tokenizer": load_tokenizer,
    "text tower": lambda source: TransformersTextTower(Path(source)),
}


@pytest.mark.parametrize("known", [None, "clip", "llama"])
@pytest.mark.parametrize("reader", READERS)
def test_code_that_comes_with_a_model_never_runs(
    carrying: Path, tmp_path: Path, reader: str, known: str | None
) -> None:
    """Also where the model says that it is of a known type."""
    if known is not None:
        fields = json.loads((carrying / "config.json").read_text(encoding="utf-8"))
        (carrying / "config.json").write_text(json.dumps({**fields, **SMALL, "model_type": known}), encoding="utf-8")
    with contextlib.suppress(UserError):  # some read what they know of it
        READERS[reader](str(carrying))
    assert not (tmp_path / "ran").exists() and "own" not in sys.modules
