"""Write the table of encoders that can be taught into docs/encoders.md: ``python -m benchmarks.encoder_families``.

Every row is a tiny random model in its library's own format, held against that library with the code of
``visexpert try``, then equipped with MoLE.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.family_encoders import Encoder, encoders, of_timm
from visexpert.commands.trial import Attempt, attempts
from visexpert.commands.trial.roles import silenced
from visexpert.vision import MoLESettings, VisionEncoder

PAGE = Path("docs/encoders.md")
BEGIN, END = "<!-- encoders: begin -->", "<!-- encoders: end -->"
LIBRARIES = ("transformers", "timm", "open_clip")
LARGER = (("SigLIP", "vit_base_patch16_siglip_224"), ("BEiT", "beit_base_patch16_224"))
"""Families of timm without a small model."""
HEAD = ("family", "library", "class", "difference from its library", "MoLE", "saliency", "exports to")


def row(encoder: Encoder) -> tuple[str, ...] | None:
    """Return the cells of a family; None if it cannot be taught."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with silenced():
                request = encoder.write(Path(name))
        except Exception:  # families.md says why its recipe fails
            return None
        (found,) = attempts(request, ("encoder",))
        if not found.works:
            return None
        difference = found.comparisons[0].difference if found.comparisons else None
        told = "not compared" if difference is None else f"{difference:.0e}" if difference else "0"
        saliency = f"`{found.facts['saliency']}`"
        return encoder.title, encoder.library, f"`{found.name}`", told, mole(found), saliency, exports(found)


def _made(found: Attempt, **changes: Any) -> VisionEncoder:
    """Return the encoder of an attempt, weights in place."""
    module, _, name = str(found.settings["class_path"]).rpartition(".")
    arguments: Mapping[str, Any] = found.settings["init_args"]
    encoder: VisionEncoder = getattr(import_module(module), name)(**{**arguments, **changes}).eval()
    encoder.load_weights()
    return encoder


def exports(found: Attempt) -> str:
    """Return the formats that an encoder can be written in, the default first.

    ``native`` is among them only if it was written, loaded again and gave the same tokens to the bit.
    """
    with silenced(), tempfile.TemporaryDirectory() as name, torch.no_grad():
        encoder = _made(found)
        able = [form for form, reason in encoder.formats().items() if reason is None]
        if "native" in able:
            encoder.save(Path(name))
            other = {"model", "architecture", "config", "processor"} & found.settings["init_args"].keys()
            again = _made(found, source=name, **dict.fromkeys(other))
            images_BCHW = torch.rand(1, 3, encoder.image_size, encoder.image_size)
            if not torch.equal(encoder(images_BCHW).tokens_BTD, again(images_BCHW).tokens_BTD):
                able.remove("native")
    return ", ".join(f"`{form}`" for form in able if form != "visexpert")


def mole(found: Attempt) -> str:
    """Return whether MoLE goes into the MLPs and changes nothing at first, or why not."""
    module, _, name = str(found.settings["class_path"]).rpartition(".")
    kind: Any = getattr(import_module(module), name)
    arguments: Mapping[str, Any] = found.settings["init_args"]
    try:
        with silenced(), torch.no_grad():
            plain, student = kind(**arguments).eval(), kind(**arguments, mole=MoLESettings(rank=2)).eval()
            if plain.source is None:
                student.model.load_state_dict(plain.model.state_dict(), strict=False)
                student.mark_weights_in_place()
            images_BCHW = torch.rand(1, 3, plain.image_size, plain.image_size)
            same = torch.equal(plain(images_BCHW).tokens_BTD, student(images_BCHW).tokens_BTD)
    except Exception as error:
        return f"no ({type(error).__name__})"
    return "yes" if same else "differs"


def table(lines: Iterable[Sequence[str]]) -> str:
    """Return the table in Markdown."""
    written = [HEAD, ("---",) * len(HEAD), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in written)


def main() -> None:
    """Try every family, and write the table between its marks."""
    tried = sorted([*encoders(), *map(of_timm, LARGER)], key=lambda encoder: LIBRARIES.index(encoder.library))
    rows = [found for encoder in tqdm(tried, unit="family") if (found := row(encoder)) is not None]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    print(f"{PAGE}: {len(rows)} families")


if __name__ == "__main__":
    main()
