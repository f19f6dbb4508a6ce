"""The gate in front of the viewer: passes the requests of its own pages and rejects all others.

Every page that is open in the browser can reach a viewer on loopback: by a host name that an
attacker points at this machine (DNS rebinding), or by requests to 127.0.0.1 from another origin.
Gradio itself checks neither, accepts uploads, and has many routes that these pages never use.
Therefore the gate does the following with each request:

1. It compares the Host header with the names of this viewer (403).
2. It rejects other origins, by the headers Origin and Sec-Fetch-Site (403).
3. It accepts only the paths and methods that the pages and the web endpoints use (404, 405), and
   closes websockets.
4. It reads at most 1 MB of body, however it is sent (413). Only endpoints get the query of an
   address, of limited length (414).
5. It rebuilds the two kinds of request that the pages send, so that nothing else reaches Gradio
   (400, 415).

Every response carries headers that forbid framing, guessing of content types and, by a content
security policy, anything from another host. The gate does not log in users: anyone who can connect
under one of the viewer's names can see the pages.
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
"""The largest request body; the longest request of a page has a few hundred bytes."""

MOST_LEVELS = 20
"""The largest depth of nested lists and objects; the pages use two."""

LONGEST_PATH, LONGEST_QUERY = 1000, 2**14
"""The largest numbers of bytes in the address of a web endpoint."""

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
EVERYWHERE = frozenset({"0.0.0.0", "::"})
EVENT, SERVER_FUNCTION = "/gradio_api/run/predict", "/gradio_api/component_server/"
PAGES, API = frozenset({"/", "/docs"}), "/api/"
FOLDERS = r"(?:assets|static)(?:/[\w-][\w.-]{0,199}){1,9}"
FILES = re.compile(
    rf"/(?:favicon\.ico|theme\.css|manifest\.json|openapi\.json|{FOLDERS})", re.ASCII
)
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
    """A rejected request: the status of the response, and one line with the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class KnownRequests:
    """The requests that the pages of one viewer can send.

    Args:
        config: Gradio's description of the pages for the browser: their components and events.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._inputs: dict[int, int] = {}  # the number of inputs, by event
        for event in config["dependencies"]:
            if event["backend_fn"]:
                self._inputs[event["id"]] = len(event["inputs"])
        self._functions: set[tuple[int, str]] = set()
        for component in config["components"]:
            names = component["props"].get("server_fns") or ()
            self._functions.update((component["id"], name) for name in names)

    def event(self, body: bytes) -> bytes:
        """Rebuild the body of an event: its number, and the values of its inputs.

        Raises:
            Rejected: there is no such event, or the body is not of this form.
        """
        request = _json_object(body)
        index = request.get("fn_index")
        data = request.get("data")
        if not _is_integer(index) or index not in self._inputs:
            raise Rejected(400, "fn_index: not an event of these pages")
        if not isinstance(data, list) or len(data) != self._inputs[index]:
            raise Rejected(400, f"data: expected a list of {self._inputs[index]} values")
        event = {"fn_index": index, "data": data, "session_hash": _session(request)}
        return _json(event)

    def server_function(self, body: bytes) -> bytes:
        """Rebuild the body of a call of a server function: its name, and its argument.

        Raises:
            Rejected: there is no such function, or the body is not of this form.
        """
        request = _json_object(body)
        component = request.get("component_id")
        name = request.get("fn_name")
        known = (
            _is_integer(component)
            and isinstance(name, str)
            and (component, name) in self._functions
        )
        if not known:
            raise Rejected(400, "component_id, fn_name: not a function of these pages")
        session = _session(request)
        call = {
            "component_id": component,
            "fn_name": name,
            "data": request.get("data"),
            "session_hash": session,
        }
        return _json(call)


class Gate:
    """ASGI middleware that checks requests as described at the top of this file.

    Args:
        app: The application behind the gate.
        known_requests: The requests that the pages can send.
        host: The name or address that the viewer listens on. If it listens on every interface, any
            IP address and the names of this machine are accepted too: the page of an attacker
            always comes under another name.
    """

    def __init__(self, app: App, known_requests: KnownRequests, host: str):
        self._app = app
        self._readers = {
            EVENT: known_requests.event,
            SERVER_FUNCTION: known_requests.server_function,
        }
        self._any_address = host in EVERYWHERE
        if self._any_address:
            names = {socket.gethostname().lower(), socket.getfqdn().lower()}
        else:
            names = {host.lower()}
        self._names = LOOPBACK | names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise Rejected(403, "the viewer has no websockets")
            await self._pass_on(scope, receive, send)
        except Rejected as rejected:
            await _respond(scope, send, rejected)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass on to the application only what it needs."""
        headers = _Headers(scope)
        self._check_host(headers)
        self._check_origin(scope, headers)
        read = self._check_path(scope)
        is_page = scope["path"] in PAGES
        query = _query(scope)
        body = await _read_body(headers, receive)
        if read is None:
            body = b""
        else:
            content_type = headers.one("content-type").partition(";")[0]
            if content_type.strip().lower() != "application/json":
                raise Rejected(415, "content-type: expected application/json")
            body = read(body)
        dropped = ["content-length", "transfer-encoding", "content-encoding"]
        if is_page:
            dropped.append("accept-encoding")  # the scripts of the page are hashed below
        passed = headers.without_forwarding(*dropped)
        passed.append((b"content-length", str(len(body)).encode()))
        inner = {**scope, "headers": passed, "query_string": query}
        guarded = _Guarded(send, page=is_page)
        await self._app(inner, _replay(body, receive), guarded)

    def _check_host(self, headers: "_Headers") -> None:
        """Reject other host names. The port can differ, since an ssh tunnel can change it."""
        match = NAME_AND_PORT.fullmatch(headers.one("host").lower())
        name = match[1].strip("[]") if match else ""
        if name in self._names or (self._any_address and _is_address(name)):
            return
        raise Rejected(
            403, "Host: not a name of this viewer; open the address that the viewer printed"
        )

    def _check_origin(self, scope: Scope, headers: "_Headers") -> None:
        """Reject requests of other pages.

        The origin of this viewer's pages is its Host. A link that the user follows has no origin,
        and can only open a page.
        """
        origin = headers.one("origin").lower()
        host = headers.one("host").lower()
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            raise Rejected(403, "Origin: not a page of this viewer")
        is_link = scope["path"] in PAGES and headers.one("sec-fetch-mode") == "navigate"
        from_elsewhere = headers.one("sec-fetch-site") in ("cross-site", "same-site")
        if from_elsewhere and not is_link:
            raise Rejected(403, "Sec-Fetch-Site: not a page of this viewer")

    def _check_path(self, scope: Scope) -> Callable[[bytes], bytes] | None:
        """Return the reader of the request's body; None for pages, files and endpoints."""
        path = scope["path"]
        read = self._readers.get(path)
        if read is not None:
            methods = ("POST",)
        elif path.startswith(API):
            methods = ("GET",)
        elif path in PAGES or FILES.fullmatch(path):
            methods = ("GET", "HEAD")
        else:
            raise Rejected(404, "not found")
        if scope["method"] not in methods:
            raise Rejected(405, f"method: expected {' or '.join(methods)}")
        return read


# ---- requests ------------------------------------------------------------------------------------


class _Headers:
    """The headers of a request."""

    def __init__(self, scope: Scope):
        self._pairs: list[tuple[bytes, bytes]] = list(scope["headers"])

    def one(self, name: str) -> str:
        """Return the value of a header, or an empty string if it is missing.

        Raises:
            Rejected: the header occurs twice.
        """
        wanted = name.encode()
        values = [value for key, value in self._pairs if key == wanted]
        if len(values) > 1:
            raise Rejected(400, f"{name}: given twice")
        return values[0].decode("latin-1") if values else ""

    def without_forwarding(self, *names: str) -> list[tuple[bytes, bytes]]:
        """Return all headers except these and those of proxies.

        Gradio would derive addresses from the headers of proxies.
        """
        dropped = {name.encode() for name in names}
        return [
            (name, value)
            for name, value in self._pairs
            if name not in dropped and not name.startswith(b"x-forwarded-")
        ]


def _query(scope: Scope) -> bytes:
    """Return the query for a web endpoint; nothing for other paths.

    Raises:
        Rejected: the address is too long.
    """
    path = scope["path"]
    if not path.startswith(API):
        return b""
    if len(path) > LONGEST_PATH:
        raise Rejected(414, f"path: more than {LONGEST_PATH} characters")
    query = scope["query_string"]
    if len(query) > LONGEST_QUERY:
        raise Rejected(414, f"parameters: more than {LONGEST_QUERY} bytes")
    return query


async def _read_body(headers: _Headers, receive: Receive) -> bytes:
    """Read the body of a request.

    Raises:
        Rejected: it has more than `MOST_BYTES`, or does not arrive completely.
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
            raise Rejected(400, "body: incomplete")
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise too_long
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body first, and then the events of the connection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        if messages:
            return messages.pop()
        return await receive()

    return next_message


def _json_object(body: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object of limited depth, with finite numbers and valid characters."""
    try:
        value = json.loads(body, parse_constant=_reject_constant)
        check_levels(value, MOST_LEVELS)
        # This fails for 1e999 and for half a surrogate pair.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Rejected(400, "body: not valid JSON of these pages") from None
    if not isinstance(value, dict):
        raise Rejected(400, "body: expected an object")
    return value


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _session(request: Mapping[str, Any]) -> str:
    session = request.get("session_hash")
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise Rejected(400, "session_hash: expected lowercase letters and digits")
    return session


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# ---- responses -----------------------------------------------------------------------------------


class _Guarded:
    """A `send` that adds the security headers.

    The page itself is sent once it is complete, since its policy needs the hashes of its inline
    scripts.

    Args:
        send: Sends the response.
        page: Whether the response is the page itself.
    """

    def __init__(self, send: Send, page: bool):
        self._send = send
        self._page = page
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        is_start = message["type"] == "http.response.start"
        if not self._page:
            await self._send(_guarded(message, policy()) if is_start else message)
            return
        if is_start:
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = bytes(self._body)
        await self._send(_guarded(self._start, policy(body)))
        await self._send({"type": "http.response.body", "body": body})


def _guarded(start: Message, content_policy: str) -> Message:
    """Add the security headers to the start of a response; they replace others of their names."""
    security = {**HEADERS, "content-security-policy": content_policy}
    headers = [
        (name, value)
        for name, value in start.get("headers", [])
        if name.decode("latin-1") not in security
    ]
    for name, value in security.items():
        headers.append((name.encode(), value.encode()))
    return {**start, "headers": headers}


def policy(page: bytes = b"") -> str:
    """Return the content security policy of a response.

    The policy of a page contains the hashes of its inline scripts. Scripts and inline event
    handlers from a hostile name or text do not run. Gradio's components compile functions from
    text (`unsafe-eval`), and Gradio and plotly set inline styles.
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
    directives = [" ".join([name, *sources]) for name, sources in allowed.items()]
    return "; ".join(directives)


def _script_hash(script: bytes) -> str:
    text = script.replace(b"\r\n", b"\n")  # as browsers read it
    digest = hashlib.sha256(text).digest()
    encoded = base64.b64encode(digest).decode()
    return f"'sha256-{encoded}'"


async def _respond(scope: Scope, send: Send, rejected: Rejected) -> None:
    """Send the status and the reason of a rejection."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = f"{rejected}\n".encode()
    content_type = b"text/plain; charset=utf-8"
    if scope["path"].startswith(API):
        body = _json({"detail": str(rejected)})
        content_type = b"application/json"
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": rejected.status, "headers": headers}
    await send(_guarded(start, policy()))
    if scope["method"] == "HEAD":
        body = b""
    await send({"type": "http.response.body", "body": body})
