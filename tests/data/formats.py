"""Writes small data sets in exactly the formats of the real ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

WORDS = (
    "a an the picture of is there what colour how many this true image red green blue dog cat on left right yes no "
    "mat sits two birds fly in sky describe it and then ? . , 2 3 4 man hat USER: ASSISTANT:"
)
COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 210), "gray": (128, 128, 128)}


def tokenizer_folder(folder: Path) -> str:
    """A word-level tokenizer in ``save_pretrained`` form."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS.split())]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def jpeg_bytes(color: str, size: tuple[int, int] = (12, 8)) -> bytes:
    """A JPEG of one color; ``size`` is width and height."""
    buffer = io.BytesIO()
    Image.new("RGB", size, COLORS[color]).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_jpeg(path: Path, color: str, size: tuple[int, int] = (12, 8)) -> Path:
    """A JPEG file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg_bytes(color, size))
    return path


def write_json(path: Path, content: Any) -> Path:
    """A JSON file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_json_lines(path: Path, records: Sequence[Any]) -> Path:
    """A file of one JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_karpathy(root: Path, images: Sequence[tuple[str, str, str, Sequence[str]]]) -> Path:
    """``dataset_coco.json`` and its JPEGs.

    Args:
        root: Folder.
        images: Split, folder, color and captions of each.
    """
    entries = []
    for number, (split, folder, color, captions) in enumerate(images):
        name = f"COCO_{folder}_{number:012d}.jpg"
        write_jpeg(root / folder / name, color)
        sentences = [
            {"tokens": text.lower().rstrip(".").split(), "raw": text, "imgid": number, "sentid": 10 * number + place}
            for place, text in enumerate(captions)
        ]
        entries.append(
            {
                "filepath": folder,
                "sentids": [sentence["sentid"] for sentence in sentences],
                "filename": name,
                "imgid": number,
                "split": split,
                "sentences": sentences,
                "cocoid": number,
            }
        )
    return write_json(root / "dataset_coco.json", {"images": entries, "dataset": "coco"})


def write_coco(path: Path, images: Sequence[Mapping[str, Any]], captions: Sequence[tuple[int, str]]) -> Path:
    """A caption file of COCO's own form (NoCaps has the same)."""
    annotations = [{"image_id": image, "id": number, "caption": text} for number, (image, text) in enumerate(captions)]
    return write_json(path, {"info": {}, "licenses": [], "images": list(images), "annotations": annotations})


def write_shard(path: Path, samples: Sequence[tuple[str, bytes | None, str | None]]) -> Path:
    """A tar shard as img2dataset writes it: KEY.jpg, KEY.json, KEY.txt.

    Args:
        path: The tar.
        samples: Key, image and caption of each; None leaves a file out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image, caption in samples:
            facts = {"caption": caption, "url": f"https://example.org/{key}.jpg", "key": key, "status": "success"}
            files = {"jpg": image, "json": json.dumps(facts).encode()}
            files["txt"] = None if caption is None else caption.encode()
            for suffix, content in files.items():
                if content is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(root: Path, counts: Sequence[int], *, stats: bool = True) -> list[str]:
    """Shards 00000.tar and on; the caption of record k of shard s is ``record s k``, and its image a gray that tells k.

    Returns:
        All captions.
    """
    captions = []
    for shard, count in enumerate(counts):
        samples = []
        for place in range(count):
            gray = Image.fromarray(np.full((8, 8, 3), 10 * place, dtype=np.uint8))
            buffer = io.BytesIO()
            gray.save(buffer, "JPEG", quality=95)
            caption = f"record {shard} {place}"
            samples.append((f"{shard:05d}{place:04d}", buffer.getvalue(), caption))
            captions.append(caption)
        write_shard(root / f"{shard:05d}.tar", samples)
        if stats:
            facts = {"count": count + 1, "successes": count, "failed_to_download": 1, "failed_to_resize": 0}
            write_json(root / f"{shard:05d}_stats.json", facts)
    return captions


def write_vqa(
    root: Path, part: str, questions: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]
) -> None:
    """VQA v2's two files of a part."""
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    head["data_subtype"] = f"{part}2014"
    write_json(root / f"v2_OpenEnded_mscoco_{part}2014_questions.json", {**head, "questions": list(questions)})
    write_json(root / f"v2_mscoco_{part}2014_annotations.json", {**head, "annotations": list(annotations)})


def annotation(question: int, image: int, answers: list[str], kind: str) -> dict[str, Any]:
    """The answers to a question, as in VQA v2's file."""
    return {
        "question_type": "what",
        "multiple_choice_answer": max(answers, key=answers.count),
        "image_id": image,
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(answers, 1)],
        "answer_type": kind,
        "question_id": question,
    }


def statement(image: str, link: str, caption: str, label: int, relation: str) -> dict[str, Any]:
    """A line of VSR's files."""
    return {
        "image": image,
        "image_link": f"http://images.cocodataset.org/{link}/{image}",
        "caption": caption,
        "label": label,
        "relation": relation,
        "annotator_id": 31,
        "vote_true_validator_id": [2, 6],
        "vote_false_validator_id": [],
    }


def close_to(pixels_HW3: Any, color: str) -> bool:
    """Whether all pixels are of a color, but for what JPEG changes."""
    return bool((np.abs(np.asarray(pixels_HW3, dtype=float) - np.array(COLORS[color])) < 6).all())
