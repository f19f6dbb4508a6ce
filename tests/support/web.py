"""Requests to ASGI applications, without a server."""

import asyncio
import json
from typing import Any

HOST = "127.0.0.1:7860"


class Response:
    """The response to a request: its status, headers and body."""

    def __init__(self, messages: list[Any]):
        self.status = messages[0]["status"]
        self.headers = {
            name.decode(): value.decode("latin-1") for name, value in messages[0]["headers"]
        }
        self.body = b"".join(message.get("body", b"") for message in messages[1:])

    def json(self) -> Any:
        """Return the body as a value; JSON has no NaN."""
        return json.loads(self.body, parse_constant=_reject)


def _reject(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


async def request(
    app: Any,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    chunks: list[bytes] | None = None,
    query: bytes = b"",
) -> Response:
    """Send one request, its body in chunks, without a Content-Length unless it is given.

    Args:
        app: the application.
        method: GET, POST, …
        path: the path, without its escapes.
        headers: headers; the one of the host replaces `HOST`, or removes it if it is empty.
        chunks: the body.
        query: what follows the question mark, with its escapes.
    """
    sent: list[Any] = []
    parts = chunks or [b""]
    waiting = [
        {"type": "http.request", "body": part, "more_body": k + 1 < len(parts)}
        for k, part in enumerate(parts)
    ]
    pairs = {"host": HOST, **(headers or {})}

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": query,
        "root_path": "",
        "scheme": "http",
        "headers": [
            (name.encode(), value.encode("latin-1")) for name, value in pairs.items() if value
        ],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 7860),
    }
    await app(scope, receive, send)
    return Response(sent)


def send(
    app: Any,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    chunks: list[bytes] | None = None,
    query: bytes = b"",
) -> Response:
    """Send one request in the current event loop, as `request` does."""
    sending = request(app, method, path, headers, chunks, query)
    return asyncio.get_event_loop().run_until_complete(sending)
