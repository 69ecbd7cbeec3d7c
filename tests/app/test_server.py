"""The page's server over HTTP, without a browser: what it serves, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.captioners import captioner, lively
from tests.methods.helpers import tiny_experts, tiny_tove
from visexpert.app.session import Model, Session
from visexpert.commands.serve import run as main_of_serve
from visexpert.errors import ConfigError

gradio = pytest.importorskip("gradio", reason="the page needs the extra app")
httpx = pytest.importorskip("httpx")
page, server = (pytest.importorskip(f"visexpert.app.{name}") for name in ("page", "server"))


@pytest.fixture
def client(session: Session, port: int) -> Iterator[Any]:
    """A client of a running page; uploads up to 1 MB."""
    with (
        server.serving(session, port=port, max_upload_mb=1) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        yield client


def ask(client: Any, image: dict[str, Any]) -> dict[str, Any]:
    """What the page gets when it asks about an image."""
    config = client.get("/config").json()
    number = next(item["id"] for item in config["dependencies"] if len(item["inputs"]) == 3)
    data = [{"meta": {"_type": "gradio.FileData"}, **image}, "list objects", ["depth"]]
    client.post("/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": "s"})
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "s"}) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                assert isinstance(message, dict)
                return message
    raise AssertionError("no answer")


def upload(client: Any, path: Path) -> str:
    response = client.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())})
    assert response.status_code == 200
    return str(response.json()[0])


def test_an_uploaded_image_is_answered(client: Any, session: Session, picture: Path) -> None:
    stored = upload(client, picture)
    message = ask(client, {"path": stored, "orig_name": "picture.png"})
    assert message["success"], message
    answer, note, table, overlay = message["output"]["data"]
    expected = session.ask(picture, "list objects", ["depth"])
    assert answer == expected.text and note["visible"] is False
    assert table["data"] == [list(row) for row in expected.rows]
    drawn = client.get(f"/gradio_api/file={overlay['path']}")
    assert drawn.status_code == 200 and drawn.content.startswith(b"\x89PNG")


def test_the_page_says_which_images_the_model_knows_before_any_is_shown(client: Any, session: Session) -> None:
    parts = client.get("/config").json()["components"]
    shown = [str(part["props"].get("value")) for part in parts if part["type"] == "markdown"]
    assert f"**{session.warning}**" in shown and "only Tabletop's rendered scenes" in session.warning
    kinds = [part["props"].get("elem_id") for part in parts]
    assert kinds.index("warning") < kinds.index("image")


def test_no_other_file_is_served_or_read(client: Any, picture: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture.read_bytes())
    for path in ("/etc/passwd", str(secret), str(Path("pyproject.toml").resolve()), "pyproject.toml"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path
    stored = Path(upload(client, picture))
    for path in (f"{stored.parent}/../../../../etc/passwd", f"{stored.parent.parent.parent}/examples/../../secret.png"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path
    for forged in ({"path": str(secret)}, {"path": str(secret), "meta": None}):  # gradio itself looks at the first only
        message = ask(client, forged)
        assert not message["success"] and "data" not in message["output"]


@pytest.mark.parametrize("route", ["queue/join", "run/predict"])
def test_no_address_is_fetched(client: Any, route: str) -> None:
    assert client.get("/gradio_api/file=http://127.0.0.1:9/a.png").status_code == 403
    record = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
    forged: list[list[Any]] = [
        [record, "list objects", []],
        [None, record, []],
        [None, "list objects", [{"deeper": [record]}]],
    ]
    for data in forged:
        response = client.post(f"/gradio_api/{route}", json={"data": data, "fn_index": 0, "session_hash": "s"})
        assert response.status_code == 403 and "names an address" in response.text
    assert client.post(f"/gradio_api/{route}", content=b" " * 1_000_001).status_code == 403
    assert client.post(f"/gradio_api/{route}", content=b"no json").status_code == 422


def test_uploads_beyond_the_limit_are_refused(client: Any) -> None:
    response = client.post("/gradio_api/upload", files={"files": ("large.png", b"\x89PNG" + b"0" * 1_100_000)})
    assert response.status_code == 413


def test_what_is_no_image_is_one_sentence(client: Any, tmp_path: Path) -> None:
    broken = tmp_path / "<b>broken.png"
    broken.write_text("no image", encoding="utf-8")
    message = ask(client, {"path": upload(client, broken), "orig_name": broken.name})
    error = message["output"]["error"]
    assert error.startswith("The image ") and "cannot be read" in error and "<b>" not in error
    assert "/" not in error.split(" cannot")[0]


def test_the_browser_is_told_to_load_from_here_only(client: Any) -> None:
    start = client.get("/")
    assert start.status_code == 200 and "default-src 'self'" in start.headers["content-security-policy"]
    assert client.get("/", headers={"host": "example.org"}).status_code == 400  # a name rebound to this machine
    for path in (
        "proxy=http://127.0.0.1:9",
        "vibe-code/",
        "process_recording",
        "openapi.json",
        "call/show",
        "run/show",
    ):
        assert client.get(f"/gradio_api/{path}").status_code == 403, path


def test_it_leaves_nothing_behind(session: Session, picture: Path, port: int) -> None:
    before = os.environ.get("GRADIO_TEMP_DIR")
    with server.serving(session, port=port) as url, httpx.Client(base_url=url, trust_env=False) as client:
        stored = Path(upload(client, picture))
        assert stored.is_file()
    assert not stored.exists() and os.environ.get("GRADIO_TEMP_DIR") == before
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_a_taken_address_is_refused_before_a_model_is_read(session: Session, port: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError) as refused:
        main_of_serve([str(tmp_path / "no run"), "--port", str(port)])
    said = str(refused.value)
    assert f"127.0.0.1:{port}" in said and "in use" in said and "--port" in said and "GRADIO" not in said
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=str(port)):
        with server.serving(session, port=port):
            pass


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 7860), ("no such host", 7860)])
def test_an_address_that_cannot_be_bound_is_named(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"{host}:{port}"):
        server.check_address(host, port)


def test_the_sentence_of_an_error_reaches_the_page(session: Session, picture: Path) -> None:
    with pytest.raises(gradio.Error, match="longer than max_tokens=48"):
        page.respond(session, picture, "red " * 60, ["depth"])
    with pytest.raises(gradio.Error, match="uses no expert &#x27;smell&#x27;"):
        page.respond(session, picture, "list objects", ["smell"])
    values = page.respond(session, picture, "a zebra", ["depth"])
    assert values[1]["visible"] and "zebra" in values[1]["value"]


def test_only_uploads_are_read(tmp_path: Path, picture: Path) -> None:
    uploads = tmp_path / "uploads"
    inside = uploads / "a" / "b.png"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(picture.read_bytes())
    assert page.uploaded({"path": str(inside)}, uploads) == inside.resolve()
    (uploads / "link.png").symlink_to(picture)
    forged = [
        str(picture),
        f"{uploads}/../{picture.name}",
        f"{uploads}/link.png",
        f"{uploads}x/b.png",
        None,
        "http://a/b",
    ]
    for image in [*({"path": path} for path in forged), "text", 3, []]:
        with pytest.raises(gradio.Error, match="This is not an upload"):
            page.uploaded(image, uploads)


def test_what_the_page_calls() -> None:
    assert (
        server.is_called("/") and server.is_called("/assets/a.js") and server.is_called("/gradio_api/file=/tmp/a.png")
    )
    assert not server.is_called("/gradio_api/file=https://a.org/b.png") and not server.is_called("/gradio_api/anything")
    assert not server.is_called("/monitoring/summary")


def test_requests_that_name_an_address() -> None:
    assert server.names_an_address(b'{"a": [{"path": "https://a.org/b.png"}]}')
    assert not server.names_an_address(b'{"path": "/tmp/a.png", "url": "http://127.0.0.1/a.png", "prompt": "a://b"}')
    assert not server.names_an_address(b"no json") and server.names_an_address(b"[" * 200_000)


def test_names_are_no_code_on_the_page(tmp_path: Path) -> None:
    """Of what comes from a run, only texts, choices and cells hold names; none of these is Markdown or HTML."""
    evil = "<img src=x onerror=alert(1)>"
    model = lively(tiny_tove(experts={evil: tiny_experts()["edges"]}))
    session = Session([Model("ToVE", captioner(tmp_path, model=model), None)])
    parts = page.build_page(session, uploads=tmp_path).get_config_file()["components"]
    holding = {part["type"] for part in parts if evil in json.dumps(part["props"], default=str)}
    assert holding == {"checkboxgroup"}
    tables = [part["props"]["datatype"] for part in parts if part["type"] == "dataframe"]
    assert tables == ["str"]
    assert all(part["props"]["sanitize_html"] for part in parts if part["type"] == "markdown")
