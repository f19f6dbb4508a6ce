"""The viewer's gate: what other sites, other names and made-up requests get; and what the pages'
own requests get.
"""

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.toy_run import make_run
from support.web import HOST, Response, send

from spd_lightning.errors import BadInput
from spd_lightning.store import prompt_hash
from spd_lightning.viewer import gate
from spd_lightning.viewer.gate import EVENT, MOST_BYTES, SERVER_FUNCTION, Gate, KnownRequests

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # gradio's own, of what it imports
JSON_TYPE = {"content-type": "application/json"}
PROBE = str(prompt_hash(b"feature 3"))


def post(app: Any, path: str, value: Any, **headers: str) -> Response:
    return send(app, "POST", path, JSON_TYPE | headers, [json.dumps(value).encode()])


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[None]:
    """One event loop for all requests."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield
    made.run_until_complete(made.shutdown_default_executor())
    asyncio.set_event_loop(None)
    made.close()


@pytest.fixture(scope="module")
def viewer(tmp_path_factory) -> tuple[Gate, Mapping[str, Any]]:
    """The real pages behind their gate, and what Gradio tells browsers about them."""
    from spd_lightning.viewer import api, serving  # imports Gradio, which takes seconds
    from spd_lightning.viewer.app import build
    from spd_lightning.viewer.library import Library

    root = tmp_path_factory.mktemp("runs")
    make_run(root / "tms_5-2")

    # While a loop runs, Gradio makes none of its own.
    async def built() -> tuple[Gate, Mapping[str, Any]]:
        demo = build(str(root))
        endpoints = api.build(Library(str(root)))
        return serving.protected(demo, endpoints, "127.0.0.1", {}), demo.config

    return asyncio.get_event_loop().run_until_complete(built())


def server_function(config: dict[str, Any], name: str) -> int:
    return next(
        one["id"] for one in config["components"] if name in (one["props"].get("server_fns") or ())
    )


def graph_request(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    data = {
        "run": "tms_5-2",
        "harvest": "probe",
        "prompt": PROBE,
        "top_k": 50,
        "threshold": 0,
        "min_importance": 0,
    }
    sent = {
        "component_id": server_function(config, "graph"),
        "fn_name": "graph",
        "session_hash": "abc123",
    }
    return sent | {"data": data | {"influence": 1}} | changes


# ---- other names, other sites --------------------------------------------------------------------


def test_the_pages_own_requests_get_responses(viewer):
    app, config = viewer
    own = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
    response = post(app, SERVER_FUNCTION, graph_request(config), **own)
    assert response.status == 200
    assert len(json.loads(response.body)["edges"]) == 7
    arrive = next(
        one
        for one in config["dependencies"]
        if one["targets"][0][1] == "load" and one["backend_fn"]
    )
    event = {
        "fn_index": arrive["id"],
        "data": [None, None],
        "session_hash": "abc123",
        "trigger_id": 0,
    }
    assert b"tms_5-2" in post(app, EVENT, event, **own).body
    for path in ("/theme.css", "/favicon.ico", "/static/js/iframeResizer.contentWindow.min.js"):
        assert send(app, "GET", path).status == 200


@pytest.mark.parametrize(
    "path", ["/", "/theme.css", EVENT, SERVER_FUNCTION, "/gradio_api/upload", "/config"]
)
def test_a_foreign_name_gets_nothing(viewer, path):
    """DNS rebinding: a name of the attacker's that means this machine is not a name of the
    viewer.
    """
    for name in (
        "evil.example:7860",
        "evil.example",
        "",
        "127.0.0.1.evil.example",
        "localhost:7860@evil.example",
        "192.168.0.7:7860",
        "127.0.0.1:7860, evil.example",
        "\xff",
    ):
        response = send(viewer[0], "POST" if path == EVENT else "GET", path, {"host": name})
        assert response.status == 403
        assert b"Host" in response.body
    for name in (
        "localhost:7860",
        "LOCALHOST:9000",
        "127.0.0.1",
        "[::1]:7860",
    ):  # a tunnel may have another port
        assert send(viewer[0], "GET", "/theme.css", {"host": name}).status == 200


def test_a_foreign_origin_gets_nothing(viewer):
    app, config = viewer
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:8000",
        "http://localhost:7860",
        "file://",
    ):
        assert post(app, SERVER_FUNCTION, graph_request(config), origin=origin).status == 403
        assert send(app, "GET", "/", {"origin": origin}).status == 403
    for site in (
        "cross-site",
        "same-site",
    ):  # requests of a page that come without an Origin, as of images and scripts
        assert (
            send(
                app, "GET", "/theme.css", {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
            ).status
            == 403
        )
        assert (
            send(app, "GET", "/", {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}).status
            == 200
        )  # a link


def test_a_given_host_is_a_name_and_every_interface_has_addresses():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def status(host: str, name: str) -> int:
        nothing = KnownRequests({"dependencies": [], "components": []})
        return send(Gate(app, nothing, host), "GET", "/theme.css", {"host": name}).status

    assert status("lab.example", "Lab.example:80") == status("lab.example", "localhost:80") == 200
    assert status("lab.example", "10.0.0.3:80") == status("10.0.0.3", "10.0.0.4:80") == 403
    assert status("0.0.0.0", "10.0.0.3:80") == status("::", "[fe80::1]:80") == 200
    assert status("0.0.0.0", "evil.example:80") == 403


def test_every_answer_carries_the_headers_of_protection(viewer):
    app, config = viewer
    responses = [
        send(app, "GET", "/"),
        send(app, "GET", "/nothing"),
        send(app, "GET", "/", {"host": "evil.example"}),
        send(app, "GET", "/theme.css"),
        post(app, SERVER_FUNCTION, graph_request(config)),
    ]
    assert [response.status for response in responses] == [200, 404, 403, 200, 200]
    for response in responses:
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
        policy = dict(
            rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; ")
        )
        assert policy["frame-ancestors"] == policy["default-src"] == "'none'"
        assert "unsafe-inline" not in policy["script-src"]
        assert "http" not in response.headers["content-security-policy"]


def test_the_policy_names_the_inline_scripts_of_a_page_alone():
    """A script that was not in the page as it was sent has another hash, and does not run."""
    page = (
        b'<script>a = "x"</script>\n<script type="module" src="./x.js"></script><script '
        b"data-y>\nb()\n</script>"
    )
    hashes = [
        base64.b64encode(hashlib.sha256(s).digest()).decode() for s in (b'a = "x"', b"\nb()\n")
    ]
    rules = dict(rule.split(" ", 1) for rule in gate.policy(page).split("; "))
    assert rules["script-src"] == f"'self' 'unsafe-eval' 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'"


def test_endpoints_and_their_description_are_served_next_to_the_pages(viewer):
    """They are behind the same checks, and get only GET requests with a query of limited length."""
    app, _ = viewer
    for path in ("/docs", "/openapi.json", "/api/meta", "/static/docs/swagger-ui-bundle.js"):
        assert send(app, "GET", path).status == 200, path
        for foreign in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
            assert send(app, "GET", path, foreign).status == 403
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert send(app, "GET", "/docs", link).status == 200
    assert send(app, "GET", "/api/meta", link).status == 403
    meta = send(app, "GET", "/api/meta", query=b"run=tms_5-2&harvest=probe")
    assert (meta.status, meta.json()["prompts"]) == (200, 69)
    assert "frame-ancestors 'none'" in meta.headers["content-security-policy"]
    for method in ("POST", "PUT", "HEAD", "OPTIONS"):
        assert send(app, method, "/api/meta").status == 405
    long = send(app, "GET", "/api/meta", query=b"run=" + b"x" * 2**20)
    assert (long.status, long.json()) == (414, {"detail": "parameters: more than 16384 bytes"})
    assert send(app, "GET", "/api/" + "x" * 2**20).status == 414


def test_the_page_of_endpoints_runs_only_its_own_script(viewer):
    """It loads nothing from the internet: its script and its style are served here."""
    response = send(viewer[0], "GET", "/docs")
    page = response.body.decode()
    assert "https://" not in page
    (script,) = gate.INLINE_SCRIPT.findall(response.body)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert f"'sha256-{digest}'" in response.headers["content-security-policy"]


# ---- what the pages never send -------------------------------------------------------------------


def test_nothing_is_uploaded_and_nothing_else_is_served(viewer):
    app, _ = viewer
    form = {"content-type": "multipart/form-data; boundary=x"}
    part = (
        b'--x\r\ncontent-disposition: form-data; name="files"; '
        b'filename="a.bin"\r\n\r\nQQQ\r\n--x--\r\n'
    )
    assert send(app, "POST", "/gradio_api/upload", form, [part]).status == 404
    assert send(app, "POST", SERVER_FUNCTION, form, [part]).status == 415
    assert send(app, "POST", SERVER_FUNCTION, {"content-type": "text/plain"}, [b"{}"]).status == 415
    for path in (
        "/config",
        "/gradio_api/info",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
        "/redoc",
        "/docs/",
        "/docs/oauth2-redirect",
        "/api",
        "/gradio_api/file=/etc/hostname",
        "/gradio_api/proxy=http://example.com/",
        "/gradio_api/vibe-code/",
        "/gradio_api/startup-events",
        "/gradio_api/heartbeat/x",
        "/monitoring",
        "/login",
        "/assets/../../../etc/passwd",
        "/assets//etc/passwd",
        "/static/..",
        "/assets/\x00",
        "/assets/é",
        "/gradio_api/run/look",
        "/gradio_api/call/look",
        "//",
        "/assets/",
    ):
        for method in ("GET", "POST", "HEAD"):
            assert send(app, method, path).status == 404, path
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
        assert send(app, method, "/").status == send(app, method, SERVER_FUNCTION).status == 405
    assert send(app, "GET", SERVER_FUNCTION).status == send(app, "POST", "/theme.css").status == 405


def test_a_body_of_two_megabytes_is_rejected_however_it_is_sent(viewer):
    app, config = viewer
    large = 2 * MOST_BYTES
    declared = send(app, "POST", SERVER_FUNCTION, JSON_TYPE | {"content-length": str(large)})
    assert declared.status == 413
    chunked = [b" " * 2**16] * 32
    assert (
        send(
            app, "POST", SERVER_FUNCTION, JSON_TYPE | {"transfer-encoding": "chunked"}, chunked
        ).status
        == 413
    )
    assert send(app, "GET", "/", {"content-length": "2"}, chunked).status == 413
    assert send(app, "GET", "/", {"content-length": "9" * 400}).status == 413
    request = json.dumps(graph_request(config)).encode()
    just = request + b" " * (MOST_BYTES - len(request))
    assert send(app, "POST", SERVER_FUNCTION, JSON_TYPE, [just]).status == 200
    assert send(app, "POST", SERVER_FUNCTION, JSON_TYPE, [just, b" "]).status == 413


MADE_UP = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"{}",
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b"\xff\xfe",
    b'{"a": 1e999}',
    b"[" * 5000,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b"9" * 5000,
    b'{"data": "\\ud800"}',
]


@pytest.mark.parametrize("body", MADE_UP)
def test_what_is_not_a_request_of_a_page_is_rejected(viewer, body):
    for path in (EVENT, SERVER_FUNCTION):
        assert send(viewer[0], "POST", path, JSON_TYPE, [body]).status == 400


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, -(2**64), 10**300])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["tms_5-2", "probe", PROBE, "linear1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(
    max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # pages are slow
@given(draw=st.data())
def test_made_up_requests_never_get_a_5xx(viewer, draw):
    """Every event with as many odd values as it has inputs, and every field of a request replaced
    by anything.
    """
    app, config = viewer
    events = [one for one in config["dependencies"] if one["backend_fn"]]
    event = draw.draw(st.sampled_from(events))
    values = draw.draw(st.lists(ODD, min_size=len(event["inputs"]), max_size=len(event["inputs"])))
    own = {"fn_index": event["id"], "data": values, "session_hash": "abc123"}
    fields = st.sampled_from(
        ["fn_index", "data", "session_hash", "trigger_id", "event_data", "event_id", "component_id"]
    )
    odd = draw.draw(st.dictionaries(fields, ODD, max_size=2))
    for path, request in (
        (EVENT, own),
        (EVENT, own | odd),
        (SERVER_FUNCTION, graph_request(config, **odd)),
    ):
        response = post(app, path, request)
        assert response.status < 500, (response.body, request)
        if response.status == 200:
            json.loads(response.body)


def test_every_function_of_the_pages_stands_odd_arguments(viewer):
    app, config = viewer
    for component in config["components"]:
        for name in component["props"].get("server_fns") or ():
            for data in (
                None,
                [],
                "x",
                2**80,
                {"run": "tms_5-2", "harvest": {}},
                {"run": [1], "prompt": -1},
            ):
                sent = {
                    "component_id": component["id"],
                    "fn_name": name,
                    "data": data,
                    "session_hash": "a",
                }
                assert "problem" in json.loads(post(app, SERVER_FUNCTION, sent).body)
            made_up = {
                "component_id": component["id"],
                "fn_name": "__init__",
                "data": 1,
                "session_hash": "a",
            }
            assert post(app, SERVER_FUNCTION, made_up).status == 400


def test_websockets_are_closed(viewer):
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": [(b"host", HOST.encode())]}
    asyncio.get_event_loop().run_until_complete(viewer[0](scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


# ---- where it listens, and what it prints --------------------------------------------------------


def test_lines_name_the_address_and_a_tunnel(monkeypatch):
    from spd_lightning.viewer import serving  # imports Gradio, which takes seconds

    monkeypatch.setattr("socket.gethostname", lambda: "server")
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    lines = serving._lines("127.0.0.1", 7861, opened=False)
    assert lines == [
        "viewer: http://127.0.0.1:7861    (press Ctrl-C to stop)",
        (
            "From another machine: ssh -L 7861:127.0.0.1:7861 ada@server, then open "
            "http://localhost:7861 there."
        ),
    ]
    assert serving._lines("127.0.0.1", 7861, opened=True) == lines[:1]
    everywhere = serving._lines("0.0.0.0", 80, opened=False)
    assert everywhere[0].startswith("viewer: http://127.0.0.1:80 ")
    assert (
        everywhere[1] == "Anyone who can reach this machine can view these runs: http://server:80"
    )
    assert serving._lines("::1", 80, opened=True)[0].startswith("viewer: http://[::1]:80 ")


def test_a_browser_opens_only_where_a_user_sees_it():
    from spd_lightning.viewer import serving  # imports Gradio, which takes seconds

    here = [
        ({"DISPLAY": ":0"}, "linux"),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux"),
        ({}, "darwin"),
    ]
    forwarded = [({"DISPLAY": ":10", "SSH_CONNECTION": "x"}, "linux")]
    hidden = [({}, "linux"), ({"DISPLAY": ""}, "linux")]
    far = [({"SSH_CONNECTION": "x"}, "darwin"), ({"SSH_CONNECTION": "x"}, "linux")]
    assert [serving.has_display(*place) for place in here + forwarded] == [True] * 4
    assert [serving.has_display(*place) for place in hidden + far] == [False] * 4


def test_a_port_that_is_taken_is_skipped_or_named(monkeypatch):
    from spd_lightning.viewer import serving  # imports Gradio, which takes seconds

    monkeypatch.delenv("GRADIO_SERVER_PORT", raising=False)
    with serving.listen("127.0.0.1", None) as first, serving.listen("127.0.0.1", None) as second:
        ports = [one.getsockname()[1] for one in (first, second)]
        assert serving.FIRST_PORT <= ports[0] < ports[1]
        with pytest.raises(BadInput, match=f"port {ports[0]} of 127.0.0.1: cannot be opened"):
            serving.listen("127.0.0.1", ports[0])
    monkeypatch.setenv("GRADIO_SERVER_PORT", "http")
    with pytest.raises(BadInput, match="GRADIO_SERVER_PORT='http': not a port"):
        serving.listen("127.0.0.1", None)


def test_only_names_of_files_are_paths():
    """Only names of files in Gradio's own folders pass, whatever they are called."""
    for path in ("/assets/a.js", "/static/js/a.min.js", "/assets/index-D_x.css"):
        assert gate.FILES.fullmatch(path)
    for path in (
        "/assets/.env",
        "/assets/a/../b",
        "/assets/a\n",
        "/assets/%2e%2e",
        "/asset/a.js",
        "/static/js/",
    ):
        assert not gate.FILES.fullmatch(path)


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize("place", ["/assets/", "/static/img/", "/"])
def test_a_name_too_long_for_a_file_is_not_found(viewer, place, length):
    assert send(viewer[0], "GET", place + "a" * length).status == 404
