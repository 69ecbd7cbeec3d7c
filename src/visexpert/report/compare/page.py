"""The report as one HTML page that needs nothing else: pictures inside, no request to anywhere."""

from __future__ import annotations

import base64
import io

from jinja2 import Environment
from PIL import Image, UnidentifiedImageError

from visexpert.report.compare.document import Document, Picture
from visexpert.report.compare.template import SCRIPT, STYLE, TEMPLATE

WIDEST = 960
"""Pixels to which pictures of runs are made smaller, so that a page of many runs stays light."""

QUALITY = 76


def page(document: Document) -> str:
    """The page; text from runs is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = data_uri
    return environment.from_string(TEMPLATE).render(document=document, style=STYLE, script=SCRIPT)


def data_uri(picture: Picture) -> str:
    """A picture as a data URI: a plot as it is, a photograph as JPEG of moderate size; empty where it is damaged."""
    try:
        content = picture.path.read_bytes()
        if picture.is_plot:
            return _uri(content, "png")
        return _uri(_as_jpeg(content), "jpeg")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return ""


def _as_jpeg(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        smaller = image.convert("RGB")
    smaller.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    smaller.save(out, "jpeg", quality=QUALITY, optimize=True)
    return out.getvalue()


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
