"""The gate in front of the viewer: lets through what its own pages send, and answers everything
else with a 4xx.

A viewer on loopback is still reachable for every page that the browser has open: by a host name
that an attacker points at this machine (DNS rebinding), or by requests to 127.0.0.1 from another
origin. Gradio itself checks neither, accepts uploads and has many routes that these pages never
use. For every request the gate therefore

1. compares the Host header with the names that this viewer has (403),
2. rejects another origin, by the headers Origin and Sec-Fetch-Site (403),
3. knows the paths and methods that the pages use, and no others (404, 405; websockets are closed),
4. reads at most 1 MB of body, however it is sent (413), and
5. rebuilds the two kinds of question that the pages ask, so that nothing else reaches Gradio (400,
   415).

Every answer carries headers that forbid framing, guessing of content types and, by a content
security policy, anything from another host. The gate does not log in users: whoever can open a
connection under a right name may look.
"""

import base64
import hashlib
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from spd_lightning.json_files import check_levels

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BYTES = 2**20
"""Of a request's body; the longest question of a page has a few hundred."""

MOST_LEVELS = 20
"""Of lists and objects inside each other; the pages use two."""

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
EVERYWHERE = frozenset({"0.0.0.0", "::"})
EVENT, SERVER_FUNCTION = "/gradio_api/run/predict", "/gradio_api/component_server/"
FOLDERS = r"(?:assets|static)(?:/[\w-][\w.-]{0,199}){1,9}"
FILES = re.compile(rf"/(?:favicon\.ico|theme\.css|manifest\.json|{FOLDERS})", re.ASCII)
NAME_AND_PORT = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
SESSION = re.compile("[a-z0-9]{1,40}")
INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)

HEADERS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Rejected(Exception):
    """A request that is not answered: its status and one line that says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Questions:
    """The questions that the pages of one viewer can ask.

    Args:
        config: What Gradio tells the browser about the pages: their components and events.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._inputs = {
            one["id"]: len(one["inputs"]) for one in config["dependencies"] if one["backend_fn"]
        }
        self._functions = {
            (component["id"], name)
            for component in config["components"]
            for name in component["props"].get("server_fns") or ()
        }

    def event(self, body: bytes) -> bytes:
        """Rebuild the body of an event: which one, and the values of its inputs.

        Raises:
            Rejected: there is no such event, or the body is not of this form.
        """
        asked = _json_object(body)
        index = asked.get("fn_index")
        data = asked.get("data")
        if not _is_integer(index) or index not in self._inputs:
            raise Rejected(400, "fn_index: not an event of these pages")
        if not isinstance(data, list) or len(data) != self._inputs[index]:
            raise Rejected(400, f"data: expected a list of {self._inputs[index]} values")
        return _json({"fn_index": index, "data": data, "session_hash": _session(asked)})

    def server_function(self, body: bytes) -> bytes:
        """Rebuild the body of a call of a server function: which one, and its argument.

        Raises:
            Rejected: there is no such function, or the body is not of this form.
        """
        asked = _json_object(body)
        component = asked.get("component_id")
        name = asked.get("fn_name")
        known = (
            _is_integer(component)
            and isinstance(name, str)
            and (component, name) in self._functions
        )
        if not known:
            raise Rejected(400, "component_id, fn_name: not a function of these pages")
        session = _session(asked)
        called = {
            "component_id": component,
            "fn_name": name,
            "data": asked.get("data"),
            "session_hash": session,
        }
        return _json(called)


class Gate:
    """ASGI middleware that does what the top of this file says.

    Args:
        app: The application behind the gate.
        questions: What the pages may ask.
        host: The name or address that the viewer was told to listen on. If that is every interface,
            any IP address and this machine's own names are right names too: an attacker's page
            always has a name of its own.
    """

    def __init__(self, app: App, questions: Questions, host: str):
        self._app = app
        self._readers = {EVENT: questions.event, SERVER_FUNCTION: questions.server_function}
        self._any_address = host in EVERYWHERE
        own = (
            {socket.gethostname().lower(), socket.getfqdn().lower()}
            if self._any_address
            else {host.lower()}
        )
        self._names = LOOPBACK | own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise Rejected(403, "the viewer has no websockets")
            await self._pass_on(scope, receive, send)
        except Rejected as rejected:
            await _answer(scope, send, rejected)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and hand it to the application, without what the application has no use
        for.
        """
        headers = _Headers(scope)
        self._check_host(headers)
        self._check_origin(scope, headers)
        read = self._check_path(scope)
        body = await _body(headers, receive)
        if read is None:
            body = b""
        elif headers.one("content-type").partition(";")[0].strip().lower() != "application/json":
            raise Rejected(415, "content-type: expected application/json")
        else:
            body = read(body)
        kept = headers.without_forwarding(
            ("content-length", "transfer-encoding", "content-encoding")
        )
        if scope["path"] == "/":
            kept = [
                (name, value) for name, value in kept if name != b"accept-encoding"
            ]  # its scripts are hashed below
        kept.append((b"content-length", str(len(body)).encode()))
        inner = {**scope, "headers": kept, "query_string": b""}
        await self._app(inner, _replay(body, receive), _Guarded(send, page=scope["path"] == "/"))

    def _check_host(self, headers: "_Headers") -> None:
        """The port is not compared: an ssh tunnel may have another one at its near end."""
        found = NAME_AND_PORT.fullmatch(headers.one("host").lower())
        name = found[1].strip("[]") if found else ""
        if name in self._names or (self._any_address and _is_address(name)):
            return
        raise Rejected(
            403, "Host: not a name of this viewer; open it by the address that it printed"
        )

    def _check_origin(self, scope: Scope, headers: "_Headers") -> None:
        """A page's own requests have its origin, which is its Host; a followed link has none, and
        opens the page.
        """
        origin = headers.one("origin").lower()
        if origin and origin not in (
            f"{scheme}://{headers.one('host').lower()}" for scheme in ("http", "https")
        ):
            raise Rejected(403, "Origin: not this viewer's own pages")
        link = scope["path"] == "/" and headers.one("sec-fetch-mode") == "navigate"
        if headers.one("sec-fetch-site") in ("cross-site", "same-site") and not link:
            raise Rejected(403, "Sec-Fetch-Site: not this viewer's own pages")

    def _check_path(self, scope: Scope) -> Callable[[bytes], bytes] | None:
        """The reader of a question; None for the page and its files."""
        path = scope["path"]
        read = self._readers.get(path)
        if read is None and path != "/" and not FILES.fullmatch(path):
            raise Rejected(404, "not found")
        if scope["method"] not in (("GET", "HEAD") if read is None else ("POST",)):
            raise Rejected(405, "the pages do not use this method here")
        return read


# ---- requests ------------------------------------------------------------------------------------


class _Headers:
    """The headers of a request."""

    def __init__(self, scope: Scope):
        self._pairs: list[tuple[bytes, bytes]] = list(scope["headers"])

    def one(self, name: str) -> str:
        """Return the value of a header, or an empty string if it is missing.

        Raises:
            Rejected: the header is there twice.
        """
        values = [value for key, value in self._pairs if key == name.encode()]
        if len(values) > 1:
            raise Rejected(400, f"{name}: there twice")
        return values[0].decode("latin-1") if values else ""

    def without_forwarding(self, names: tuple[str, ...]) -> list[tuple[bytes, bytes]]:
        """Return all headers but these and those of proxies, from which Gradio would make
        addresses.
        """
        dropped = {name.encode() for name in names}
        return [
            (k, v) for k, v in self._pairs if k not in dropped and not k.startswith(b"x-forwarded-")
        ]


async def _body(headers: _Headers, receive: Receive) -> bytes:
    """The whole body of a request.

    Raises:
        Rejected: it has more than `MOST_BYTES`, or does not arrive.
    """
    too_long = Rejected(413, f"body: more than {MOST_BYTES} bytes")
    declared = headers.one("content-length")
    if declared.isdecimal() and int(declared[:20]) > MOST_BYTES:
        raise too_long
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Rejected(400, "body: not sent to its end")
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise too_long
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body first, and then whatever happens to the connection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _json_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object of modest depth, with finite numbers and whole characters only."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        check_levels(value, MOST_LEVELS)
        json.dumps(
            value, allow_nan=False, ensure_ascii=False
        ).encode()  # fails at 1e999 and at half a character
    except (ValueError, RecursionError):
        raise Rejected(400, "body: not JSON that these pages send") from None
    if not isinstance(value, dict):
        raise Rejected(400, "body: expected an object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _session(asked: Mapping[str, Any]) -> str:
    session = asked.get("session_hash")
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise Rejected(400, "session_hash: expected lower-case letters and digits")
    return session


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# ---- answers -------------------------------------------------------------------------------------


class _Guarded:
    """A `send` that adds the headers of protection; a page is held back until its scripts are
    known.

    Args:
        send: Where answers go.
        page: Whether the answer is the page itself, whose policy names its inline scripts by their
            hashes.
    """

    def __init__(self, send: Send, page: bool):
        self._send = send
        self._page = page
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if not self._page:
            await self._send(
                _guarded(message, policy()) if message["type"] == "http.response.start" else message
            )
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        await self._send(_guarded(self._start, policy(bytes(self._body))))
        await self._send({"type": "http.response.body", "body": bytes(self._body)})


def _guarded(start: Message, content_policy: str) -> Message:
    added = {**HEADERS, "content-security-policy": content_policy}
    kept = [
        (name, value)
        for name, value in start.get("headers", [])
        if name.decode("latin-1") not in added
    ]
    own = [(name.encode(), value.encode()) for name, value in added.items()]
    return {**start, "headers": [*kept, *own]}


def policy(page: bytes = b"") -> str:
    """The content security policy of an answer; of a page, with the hashes of its inline scripts.

    Inline event handlers and scripts that a hostile name or text might bring do not run. Gradio's
    components make their functions from text (`unsafe-eval`), and Gradio and plotly set styles
    where they draw.
    """
    scripts = [_script_hash(script) for script in INLINE_SCRIPT.findall(page)]
    allowed = {
        "default-src": ["'none'"],
        "script-src": ["'self'", "'unsafe-eval'", *scripts],
        "style-src": ["'self'", "'unsafe-inline'"],
        "img-src": ["'self'", "data:", "blob:"],
        "font-src": ["'self'", "data:"],
        "connect-src": ["'self'"],
        "manifest-src": ["'self'"],
        "base-uri": ["'self'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    return "; ".join(" ".join([name, *sources]) for name, sources in allowed.items())


def _script_hash(script: bytes) -> str:
    text = script.replace(b"\r\n", b"\n")  # as browsers read it
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


async def _answer(scope: Scope, send: Send, rejected: Rejected) -> None:
    """Send the status and the line of a rejection."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = f"{rejected}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    start = {"type": "http.response.start", "status": rejected.status, "headers": headers}
    await send(_guarded(start, policy()))
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
