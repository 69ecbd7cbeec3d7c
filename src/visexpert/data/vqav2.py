"""VQA v2 from its official files, optionally with Visual Genome's questions for training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from visexpert.data.annotations import (
    BrokenRecordError,
    Once,
    an_object,
    checked,
    collect,
    each_usable,
    id_of,
    kind_of,
    list_of,
    read_json_list,
    text_of,
    value_of,
    whole_of,
)
from visexpert.data.coco import coco_images
from visexpert.data.needs import Need
from visexpert.data.rows import RowData, check_template
from visexpert.data.samples import Sample
from visexpert.typed import typed
from visexpert.types import TextItem

log = logging.getLogger(__name__)

_URL = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_{kind}_{part}_mscoco.zip"
_SIZES = {"train": ("7 MB", "22 MB"), "val": ("3 MB", "11 MB")}
_VG_URL = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset/question_answers.json.zip"
_VG_IMAGES = "https://cs.stanford.edu/people/rak248/VG_100K_2"


@typed
class VQAv2(RowData):
    """VQA v2 (arXiv 1612.00837): one row per image with all its questions, each scored against ten human answers.

    ``root`` holds ``v2_OpenEnded_mscoco_{train,val}2014_questions.json``,
    ``v2_mscoco_{train,val}2014_annotations.json`` and, unless ``images`` names another folder, ``train2014/`` and
    ``val2014/``. Answers to the test images are not public, so ``test`` is the validation part.

    Args:
        images: Folder that holds ``train2014/`` and ``val2014/``; null for ``root``.
        prompt: Prompt for the model; ``{question}`` stands for the question.
        visual_genome: Folder of Visual Genome's ``question_answers.json``, ``VG_100K/`` and ``VG_100K_2/``, to train on
            its questions as well; null for none. Half of its images are COCO's: if ``image_data.json``, which names
            them, is in the folder too, images of VQA v2's validation questions are left out.
        draw_answers: Train on an answer drawn from the ten; otherwise on the most frequent one.
        texts_per_image: See :class:`~visexpert.data.rows.RowData`.
        kwargs: See :class:`~visexpert.data.rows.RowData`.
    """

    def __init__(
        self,
        *,
        images: str | None = None,
        prompt: str = "{question}",
        visual_genome: str | None = None,
        draw_answers: bool = False,
        texts_per_image: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(draw_answers=draw_answers, texts_per_image=texts_per_image, **kwargs)
        self.images = self.root if images is None else Path(images).expanduser()
        self.prompt = check_template(prompt, "question")
        self.visual_genome = None if visual_genome is None else Path(visual_genome).expanduser()

    def needs(self, part: str) -> list[Need]:
        """List the questions, answers and images."""
        name = _official(part)
        questions, answers = _SIZES[name]
        needs = [
            Need(self._questions(part), "VQA v2's questions", _url("Questions", name), questions),
            Need(self._answers(part), "VQA v2's answers", _url("Annotations", name), answers),
            coco_images(self.images, f"{name}2014"),
        ]
        if part == "train" and self.visual_genome is not None:
            folder = self.visual_genome
            needs += [
                Need(folder / "question_answers.json", "Visual Genome's questions", _VG_URL, "about 100 MB zipped"),
                Need(folder / "VG_100K", "Visual Genome's images", f"{_VG_IMAGES}/images.zip", "9.7 GB"),
                Need(folder / "VG_100K_2", "Visual Genome's images", f"{_VG_IMAGES}/images2.zip", "5.5 GB"),
            ]
        return needs

    def read(self, part: str) -> Iterator[Sample]:
        """Yield one sample per image; VQA v2's first."""
        yield from self._read_official(part)
        if part == "train" and self.visual_genome is not None:
            yield from self._read_visual_genome(self.visual_genome)

    def _read_official(self, part: str) -> Iterable[Sample]:
        questions = read_json_list(self._questions(part), "questions")
        annotations = read_json_list(self._answers(part), "annotations")
        faults = self.faults(part, total=len(questions) + len(annotations), shared=False)
        texts: dict[Any, str] = {}
        by_image: dict[int, list[TextItem]] = {}
        once = Once("question")

        def parse_question(record: Any) -> None:
            texts[id_of(record, "question_id")] = text_of(record, "question")

        def parse_answers(record: Any) -> Sample:
            question = id_of(record, "question_id")
            if question not in texts:
                raise BrokenRecordError(f"question {question} is not among the questions")
            once.check(question)
            lost: list[str] = []
            item = self._item(texts[question], record, lost)
            by_image.setdefault(whole_of(record, "image_id"), []).append(item)
            return Sample("", "", (item,), tuple(lost))

        list(collect(questions, parse_question, path=self._questions(part), faults=faults))
        list(collect(annotations, parse_answers, path=self._answers(part), faults=faults))
        folder = f"{_official(part)}2014"
        files = {image: str(self.images / folder / f"COCO_{folder}_{image:012d}.jpg") for image in by_image}
        return (Sample(files[image], files[image], tuple(items)) for image, items in by_image.items())

    def _item(self, question: str, record: Any, lost: list[str]) -> TextItem:
        answers = tuple(each_usable(list_of(record, "answers"), _human_answer, lost))
        if not answers:
            raise BrokenRecordError("it has no answers")
        family = str(record.get("answer_type") or "").replace("/", "-")  # a slash would look like a separator in a key
        prompt = self.prompt.format(question=question)
        return TextItem("vqa", prompt, text_of(record, "multiple_choice_answer"), family, answers, generate=True)

    def _read_visual_genome(self, folder: Path) -> Iterable[Sample]:
        path = folder / "question_answers.json"
        images = read_json_list(path)
        held_out = self._images_of_validation(folder)
        second = set(os.listdir(folder / "VG_100K_2")) if (folder / "VG_100K_2").is_dir() else set()

        def parse(record: Any) -> Sample | None:
            number = whole_of(record, "id" if "id" in record else "image_id")
            if number in held_out:
                return None
            lost: list[str] = []
            items = each_usable(list_of(record, "qas"), self._vg_item, lost)
            name = f"{number}.jpg"
            file = str(folder / ("VG_100K_2" if name in second else "VG_100K") / name)
            return Sample(file, file, tuple(items), tuple(lost))

        faults = self.faults("train (Visual Genome)", total=len(images), shared=False)
        samples = collect(images, parse, path=path, faults=faults)
        return (sample for sample in samples if sample is not None and sample.items)

    def _images_of_validation(self, folder: Path) -> frozenset[int]:
        """Return Visual Genome's numbers of VQA v2's validation images, if the files that tell are there."""
        listed, questions = folder / "image_data.json", self._questions("val")
        if not listed.is_file() or not questions.is_file():
            log.warning(
                "%s: half of Visual Genome's images are COCO's, and some of them are VQA v2's validation images; to "
                "leave those out of training, put image_data.json into %s and keep %s.",
                self.called,
                folder,
                questions,
            )
            return frozenset()
        known = [record for record in read_json_list(questions, "questions") if isinstance(record, dict)]
        asked = {str(record["image_id"]) for record in known if "image_id" in record}
        held_out = (
            record
            for record in read_json_list(listed)
            if isinstance(record, dict) and str(record.get("coco_id")) in asked
        )
        return frozenset(whole_of(record, "image_id" if "image_id" in record else "id") for record in held_out)

    def _vg_item(self, entry: Any) -> TextItem:
        # VQA v2's answers are lower case without a period, Visual Genome's are sentences.
        answer = text_of(an_object(entry, name="a question"), "answer").rstrip(".").lower()
        if not answer:
            raise BrokenRecordError("an answer is only a period")
        return TextItem("vqa", self.prompt.format(question=text_of(entry, "question")), answer, "visual-genome")

    def _questions(self, part: str) -> Path:
        return self.root / f"v2_OpenEnded_mscoco_{_official(part)}2014_questions.json"

    def _answers(self, part: str) -> Path:
        return self.root / f"v2_mscoco_{_official(part)}2014_annotations.json"


def _human_answer(entry: Any) -> str:
    """Return one of the ten answers; an empty one counts, as in the official code."""
    answer = value_of(entry, "answer", name="a human answer")
    if not isinstance(answer, str):
        raise BrokenRecordError(f"a human answer is {kind_of(answer)}, but must be text")
    return checked(answer, name="a human answer")


def _official(part: str) -> str:
    return "train" if part == "train" else "val"


def _url(kind: str, part: str) -> str:
    return _URL.format(kind=kind, part=part.capitalize())
