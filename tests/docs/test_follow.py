"""The section of the quickstart that CI follows: what is run of it, and what fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.docs.follow import PAGE, SECTION, check_captions, follow, section_of, write_photos
from visexpert.data import ImageTable

TEXT = """## First

```bash
false
```

## Second

```yaml
# a.yaml
b: 1
```

```bash
cp a.yaml c.yaml  # a comment
test -s c.yaml
```

```python
open("d", "w").write("d")
```

```text
what is told
```

## Third

```bash
false
```
"""


def test_the_blocks_of_one_section_run_in_a_folder(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(TEXT, encoding="utf-8")
    took = [entry for block in section_of(page, "Second") for entry in follow(block, tmp_path, os.environ)]
    assert [name for name, _ in took] == ["cp a.yaml c.yaml", "test -s c.yaml", "Python of line 20"]
    assert (tmp_path / "c.yaml").read_text(encoding="utf-8") == "# a.yaml\nb: 1\n" and (tmp_path / "d").is_file()
    with pytest.raises(subprocess.CalledProcessError, match="false"):
        follow(section_of(page, "Third")[0], tmp_path, os.environ)


@pytest.mark.parametrize(("title", "text"), [("Fourth", TEXT), ("Empty", "## Empty\n")])
def test_a_section_that_is_not_there_or_empty_is_refused(title: str, text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=title):
        section_of(page, title)


def test_the_quickstart_goes_from_images_to_an_encoder() -> None:
    commands = [words[1] for block in section_of(PAGE, SECTION) if block.kind == "bash" for words in block.commands]
    assert commands == ["data", "fit", "caption", "merge", "export"]


def test_the_photos_are_as_the_page_says(tmp_path: Path) -> None:
    write_photos(tmp_path)
    data = ImageTable(root=str(tmp_path), train="train", val="val")
    assert (len(data.table("train")), len(data.table("val"))) == (24, 8)
    assert (tmp_path / "val" / "00.txt").read_text(encoding="utf-8").startswith("a ")


def test_wrong_captions_are_found(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    truths = {
        f"photos/val/{path.stem}.jpg": path.read_text("utf-8") for path in (tmp_path / "photos/val").glob("*.txt")
    }
    told = "".join(f"{image}: {truth}" for image, truth in truths.items())
    check_captions(f"{told}Done: 8 of 8 images answered\n", tmp_path)
    image, truth = next(iter(truths.items()))
    for wrong in (told.replace(f"{image}: {truth}", f"{image}: a pink wall\n"), "Done: 0 of 8 images answered\n"):
        with pytest.raises(ValueError, match="wrong captions"):
            check_captions(wrong, tmp_path)
