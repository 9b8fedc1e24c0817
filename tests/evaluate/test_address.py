"""A picture at an address is fetched; whatever else an address gives is one clear error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image

from finedetr.errors import DataError, RunError
from finedetr.evaluate import address
from finedetr.evaluate.sources import find_pictures, read_source


class Handler(BaseHTTPRequestHandler):
    """One address for each thing that can happen."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if name == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
        elif name == "/elsewhere.png":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/a.png")
            self.end_headers()
        elif name == "/secret.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif name in ("/a.png", "/page.png", "/short.png"):
            stream = BytesIO()
            Image.new("RGB", (30, 20), (200, 10, 10)).save(stream, "PNG")
            data = b"<html>" if name == "/page.png" else stream.getvalue()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + 100 * (name == "/short.png")))
            self.end_headers()
            self.wfile.write(data)
        else:
            self.send_error(404)

    def log_message(self, *words: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("name", ["a.png", "moved.png", "a.png?size=large&x=%20"])
def test_an_address_is_a_picture(host: str, name: str) -> None:
    found = find_pictures(f"{host}/{name}")
    assert found.single
    pixels = read_source(found.items[0])  # type: ignore[arg-type]
    assert pixels.shape == (20, 30, 3)
    assert pixels[0, 0].tolist() == [200, 10, 10]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.png", "the server answers 404"),
        ("elsewhere.png", "the server answers 302"),
        ("secret.png", "Redirection to url 'file:"),
        ("short.png", "100 bytes of it are missing"),
    ],
)
def test_what_cannot_be_fetched_is_told(host: str, name: str, words: str) -> None:
    with pytest.raises(RunError, match=words) as caught:
        read_source(f"{host}/{name}")
    assert caught.value.code == "run.download"
    assert name in caught.value.message


def test_what_is_no_picture_is_told(host: str) -> None:
    with pytest.raises(DataError, match=r"page\.png: cannot be decoded"):
        read_source(f"{host}/page.png")


def test_nobody_there_too_much_and_nonsense(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="cannot be fetched"):
        read_source("http://127.0.0.1:9/a.png")
    with pytest.raises(RunError, match="cannot be fetched"):
        read_source("http://[::1/a.png")
    with pytest.raises(RunError, match="cannot be fetched"):
        read_source("http://a b/ü.png")
    monkeypatch.setattr(address, "LIMIT", 10)
    with pytest.raises(RunError, match="more than 0 MiB"):
        read_source(f"{host}/a.png")
