"""Serve the board to browsers of this machine: one page, its data, and reports below its folder."""

import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from leanstep.recipes.report.board import PAGE_TYPE, Board, page

_HOST = "127.0.0.1"
# names under which a browser of this machine may ask; a site that points its own name here gets nothing
_NAMES = {_HOST, "localhost"}
# a page from elsewhere runs nothing and loads nothing
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


class BoardServer(ThreadingHTTPServer):
    """Answers on the loopback address alone; ``port`` 0 takes a free one.

    Raises:
        ValueError: ``root`` is not a folder, or the port cannot be used.
    """

    def __init__(self, root: Path, port: int) -> None:
        self.board, self.page = Board(root), page(root, None).encode()
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"port {port} of {_HOST} cannot be used ({error.strerror}); choose another by --port, or --port 0 for "
                "a free one"
            ) from None

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{_HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that left before its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: BoardServer

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in _NAMES:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        try:
            content, kind, policy = self._find(unquote(urlsplit(self.path).path))
        except (OSError, ValueError):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._answer(content, kind, policy)

    def _find(self, path: str) -> tuple[bytes, str, str | None]:
        """Content, type and content policy of an address. Raises OSError or ValueError where there is none."""
        board, name = self.server.board, path.removeprefix("/files/")
        if path == "/":
            return self.server.page, PAGE_TYPE, None
        if path == "/data.json":
            return json.dumps(board.content(), allow_nan=False).encode(), "application/json", None
        if name == path:
            raise FileNotFoundError(path)
        return board.file(name), PAGE_TYPE, _POLICY

    def _answer(self, content: bytes, kind: str, policy: str | None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if policy:
            self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print no line for each request."""
