"""Serving of the viewer's pages behind their gate: the address, and the lines printed about it."""

import getpass
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from spd_lightning.errors import BadInput
from spd_lightning.viewer.gate import EVERYWHERE, LOOPBACK, Gate, KnownRequests

FIRST_PORT, PORTS = 7860, 100
MOST_HEADER_BYTES = 2**21
"""The largest address and headers that are read; the gate rejects addresses that are too long."""


def protected(demo: gr.Blocks, api: FastAPI, host: str, appearance: Mapping[str, Any]) -> Gate:
    """Return the pages and the web endpoints as one ASGI application behind its gate.

    Args:
        demo: The pages.
        api: The endpoints; the pages are added to this application.
        host: Where they will be served, as for `serve`.
        appearance: The arguments of `gr.mount_gradio_app` for their appearance.
    """
    demo.root_path = ""  # overrides $GRADIO_ROOT_PATH: the pages are where the browser found them
    app = gr.mount_gradio_app(
        api,
        demo,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        **appearance,
    )
    return Gate(app, KnownRequests(demo.config), host)


def serve(app: Gate, listening: socket.socket, host: str, open_browser: bool, wait: bool) -> str:
    """Serve an application until the process is interrupted, and return its address.

    Gradio's own `launch` is not used: its queue and its file watcher wake up a thousand times a
    second, and no gate can be put in front of it. Without lifespan events, its queue never starts;
    no page uses it.

    Args:
        app: The application.
        listening: The socket for connections (`listen`).
        host: The name or address of its interface.
        open_browser: Whether to open a browser window if there is a display.
        wait: Whether to block; if not, the caller keeps the process alive.
    """
    settings = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http="h11",
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(settings)
    port = listening.getsockname()[1]
    address = _address(host, port)
    if wait:
        opened = open_browser and _open_browser(address)
        print("\n".join(_lines(host, port, opened)), flush=True)
        server.run([listening])
    else:
        thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
        thread.start()
    return address


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens: connections wait in it until the server takes them.

    Args:
        host: The name or address of the interface.
        port: The port; if None, the first free one from 7860 (or $GRADIO_SERVER_PORT) on.

    Raises:
        BadInput: the port is taken, or the host is not this machine.
    """
    ports = _ports(port)
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise BadInput(
            f"--host '{host}': not a name or address of this machine; use for example 0.0.0.0"
        ) from error
    family, _, _, _, socket_address = addresses[0]
    problem = None
    for candidate in ports:
        try:
            address = (socket_address[0], candidate)
            return socket.create_server(address, family=family, backlog=128)
        except OSError as error:
            problem = error
    where = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    reason = problem.strerror if problem else "no ports"
    raise BadInput(
        f"{where} of {host}: cannot be opened ({reason}); choose another --port or --host"
    ) from problem


def _ports(port: int | None) -> Sequence[int]:
    """Return the ports to try, in order.

    Raises:
        BadInput: the number of a port is out of range.
    """
    if port is not None:
        if not 0 <= port < 2**16:
            raise BadInput(
                f"--port {port}: not a port; use one from 1024 to 65535, for example --port 7860"
            )
        return [port]
    text = os.environ.get("GRADIO_SERVER_PORT") or str(FIRST_PORT)
    is_number = text.isascii() and text.isdecimal()
    if not is_number or int(text) >= 2**16:
        raise BadInput(f"GRADIO_SERVER_PORT='{text}': not a port; use for example {FIRST_PORT}")
    first = int(text)
    return range(first, min(first + PORTS, 2**16))


def _address(host: str, port: int) -> str:
    """Return the address of the pages on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{_bracketed(name)}:{port}"


def _bracketed(host: str) -> str:
    """Put an IPv6 address into brackets, as addresses with a port need it."""
    return f"[{host}]" if ":" in host else host


def _lines(host: str, port: int, opened: bool) -> list[str]:
    """Return the lines for the user: the address, and how to reach it from another machine."""
    machine = socket.gethostname()
    lines = [f"viewer: {_address(host, port)}    (press Ctrl-C to stop)"]
    if host in EVERYWHERE:
        address = f"http://{machine}:{port}"
        lines.append(f"Anyone who can reach this machine can view these runs: {address}")
    elif host not in LOOPBACK:
        lines.append("Anyone who can reach this address can view these runs.")
    elif not opened:
        tunnel = f"ssh -L {port}:{_bracketed(host)}:{port} {_user()}@{machine}"
        lines.append(f"From another machine: {tunnel}, then open http://localhost:{port} there.")
    return lines


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the user of a container can have no name
        return "USER"


def _open_browser(address: str) -> bool:
    """Open a browser window if the user can see it, and return whether one was opened."""
    if not has_display(os.environ, sys.platform):
        return False
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False


def has_display(environment: Mapping[str, str], platform: str) -> bool:
    """Return whether a browser window would appear in front of the user.

    It would not over ssh, unless the display is forwarded, nor on a machine without a screen.
    """
    always_has_screen = platform in ("darwin", "win32")
    if "SSH_CONNECTION" in environment:
        return bool(environment.get("DISPLAY")) and not always_has_screen
    displays = [environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")]
    return always_has_screen or any(displays)
