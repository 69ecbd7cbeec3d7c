"""The page's layout, and which changes ask again."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from visexpert.app.session import Session, example_prompts
from visexpert.errors import UserError

HEADER = ("model", "answer", "GFLOP")
FONT = ("system-ui", "sans-serif")
KEEP_UPLOADS_S = 3600
"""Uploads and drawings are deleted after an hour."""


def build_page(session: Session, *, uploads: Path, examples: Sequence[Path] = ()) -> gr.Blocks:
    """Lay out the page.

    Args:
        session: Answers.
        uploads: Where gradio keeps uploads; no image from elsewhere is read.
        examples: Images to click.
    """
    with gr.Blocks(title="visexpert", analytics_enabled=False, delete_cache=(KEEP_UPLOADS_S, KEEP_UPLOADS_S)) as page:
        gr.Markdown("## visexpert\nAsk about an image, and see how much each patch of it listens to each expert.")
        if session.warning:
            gr.Markdown(f"**{session.warning}**", elem_id="warning", elem_classes=["warning"])
        with gr.Row():
            with gr.Column(scale=2):
                button, asked = _question_column(session, examples)
            with gr.Column(scale=3):
                answers = _answer_column(session)
        _connect(session, uploads, button, asked, answers)
    assert isinstance(page, gr.Blocks)
    return page


def _question_column(session: Session, examples: Sequence[Path]) -> tuple[gr.Button, list[Any]]:
    """Lay out the left column; return its button and the inputs: image, prompt, experts."""
    prompts = example_prompts(session.main.captioner)
    image = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="image",
        elem_id="image",
        buttons=[],
        height=300,
    )
    if examples:
        gr.Examples([[str(path)] for path in examples], inputs=[image], label="or take a scene")
    prompt = gr.Dropdown(
        list(prompts),
        value=prompts[0] if prompts else "",
        allow_custom_value=True,
        elem_id="prompt",
        label="prompt",
        info="words that ask for a caption, or a question",
    )
    experts = gr.CheckboxGroup(
        list(session.experts),
        value=list(session.experts),
        label="experts to listen to",
        elem_id="experts",
        visible=bool(session.experts),
    )
    button = gr.Button("ask", variant="primary", elem_id="ask")
    return button, [image, prompt, experts]


def _answer_column(session: Session) -> list[Any]:
    """Lay out the right column; return the outputs: answer, note, table, overlay."""
    answer = gr.Textbox(label="answer", elem_id="answer", interactive=False)
    note = gr.Textbox(label="note", elem_id="note", interactive=False, visible=False)
    table = gr.Dataframe(
        headers=list(HEADER),
        label="side by side; GFLOP of the vision side per image",
        elem_id="table",
        interactive=False,
        wrap=True,
        column_widths=["36%", "44%", "20%"],
        buttons=[],
    )
    overlay = gr.Image(
        label="gate of each expert per patch",
        show_label=False,
        elem_id="overlay",
        format="png",
        interactive=False,
        visible=bool(session.experts),
        buttons=["fullscreen"],
    )
    return [answer, note, table, overlay]


def _connect(session: Session, uploads: Path, button: gr.Button, inputs: list[Any], outputs: list[Any]) -> None:
    def show(image: Any, prompt: Any, experts: Any) -> list[Any]:
        if image is None:
            return ["", gr.update(value="", visible=False), [], None]
        return respond(session, uploaded(image, uploads), str(prompt or ""), [str(name) for name in experts or ()])

    def ask(image: Any, prompt: Any, experts: Any) -> list[Any]:
        if image is None:
            raise gr.Error("There is no image yet; drop one, or take a scene.", print_exception=False)
        return show(image, prompt, experts)

    # Without gradio's preprocessing, which would decode images before our limits and fetch addresses.
    settings: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "preprocess": False, "api_visibility": "private"}
    button.click(ask, **settings)
    for part in inputs:
        part.change(show, trigger_mode="always_last", show_progress="minimal", **settings)


def uploaded(image: Any, uploads: Path) -> Path:
    """The file that a request names, which must be an upload.

    Args:
        image: What the browser sent: a record with the file's path.
        uploads: Folder of the uploads.

    Raises:
        gradio.Error: The request is forged: it names an address, or a file of the server.
    """
    named = image.get("path") if isinstance(image, dict) else None
    path = Path(str(named)).resolve()
    if not path.is_relative_to(uploads.resolve()):
        raise gr.Error("This is not an upload; drop an image file.", print_exception=False)
    return path


def respond(session: Session, path: Path, prompt: str, experts: Sequence[str]) -> list[Any]:
    """Values of answer, note, table and overlay.

    Raises:
        gradio.Error: With the sentence of a user's error.
    """
    try:
        reply = session.ask(path, prompt, experts)
    except UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
    note = gr.update(value=reply.note, visible=bool(reply.note))
    return [reply.text, note, [list(row) for row in reply.rows], reply.overlay]


def theme() -> gr.themes.Base:
    """Gradio's default with the system's fonts: the page loads nothing from elsewhere."""
    return gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace"))
