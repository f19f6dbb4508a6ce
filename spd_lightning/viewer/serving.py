"""Serves the viewer's pages behind their gate: where it listens, and what it prints about that."""

import getpass
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Mapping
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from spd_lightning.errors import BadInput
from spd_lightning.viewer.gate import EVERYWHERE, LOOPBACK, Gate, Questions

FIRST_PORT, PORTS = 7860, 100


def protected(demo: gr.Blocks, host: str, appearance: Mapping[str, Any]) -> Gate:
    """Return the pages as an ASGI application behind its gate.

    Args:
        demo: The pages.
        host: Where they will be served, as for `serve`.
        looks: The arguments of `gr.mount_gradio_app` that say how they look.
    """
    demo.root_path = (
        ""  # the pages are where the browser found them, whatever $GRADIO_ROOT_PATH says
    )
    bare = FastAPI(openapi_url=None)
    app = gr.mount_gradio_app(
        bare,
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
    return Gate(app, Questions(demo.config), host)


def serve(app: Gate, listening: socket.socket, host: str, open_browser: bool, wait: bool) -> str:
    """Serve an application until the process is interrupted, and return its address.

    Gradio's own `launch` is not used: its queue and its watcher of files wake up a thousand times a
    second, and nothing can stand between it and the network. Without lifespan events its queue
    never starts; no page uses it.

    Args:
        app: What to serve.
        listening: The socket that connections come from (`listen`).
        host: The name or address of its interface.
        open_browser: Whether to open a browser window, where there is a display.
        wait: Whether to block; without it the caller keeps the process alive.
    """
    settings = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(settings)
    address = _address(host, listening.getsockname()[1])
    if wait:
        opened = open_browser and _opened(address)
        print("\n".join(_lines(host, listening.getsockname()[1], opened)), flush=True)
        server.run([listening])
    else:
        threading.Thread(target=server.run, args=[[listening]], daemon=True).start()
    return address


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens: connections wait in it until the server takes them.

    Args:
        host: The name or address of the interface.
        port: Where to listen; the first free port from 7860 (or $GRADIO_SERVER_PORT) on if None.

    Raises:
        BadInput: the port is taken, or the host is not one of this machine.
    """
    if port is not None and not 0 <= port < 2**16:
        raise BadInput(
            f"--port {port}: not a port; take one from 1024 to 65535, for example --port 7860"
        )
    word = os.environ.get("GRADIO_SERVER_PORT") or str(FIRST_PORT)
    if port is None and not (word.isascii() and word.isdecimal() and int(word) < 2**16):
        raise BadInput(f"GRADIO_SERVER_PORT='{word}': not a port; for example {FIRST_PORT}")
    ports = [port] if port is not None else range(int(word), min(int(word) + PORTS, 2**16))
    try:
        family, _, _, _, place = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        remedy = "take a name or address of this machine, for example 0.0.0.0"
        raise BadInput(
            f"--host '{host}': not a name or address that this machine knows; {remedy}"
        ) from error
    problem = None
    for one in ports:
        try:
            return socket.create_server((place[0], one), family=family, backlog=128)
        except OSError as error:
            problem = error
    where = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    reason = problem.strerror if problem else "no ports"
    raise BadInput(
        f"{where} of {host}: cannot listen there ({reason}); choose another --port or --host"
    ) from problem


def _address(host: str, port: int) -> str:
    """Where this machine itself finds the pages."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _lines(host: str, port: int, opened: bool) -> list[str]:
    """Return the lines for the user: the address, and how to reach it from another machine."""
    here = socket.gethostname()
    lines = [f"viewer: {_address(host, port)}    (Ctrl-C ends it)"]
    if host in EVERYWHERE:
        lines.append(f"Whoever can reach this machine can look at these runs: http://{here}:{port}")
    elif host not in LOOPBACK:
        lines.append("Whoever can reach this address can look at these runs.")
    elif not opened:
        tunnel = f"ssh -L {port}:{host if ':' not in host else f'[{host}]'}:{port} {_user()}@{here}"
        lines.append(f"From another machine: {tunnel}, then open http://localhost:{port} there.")
    return lines


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "USER"


def _opened(address: str) -> bool:
    """Open a browser window where there is a display on which the user can see it."""
    if not has_display(os.environ, sys.platform):
        return False
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False


def has_display(environment: Mapping[str, str], platform: str) -> bool:
    """Whether a window would appear in front of the user: not over ssh, and not on a machine
    without a screen.
    """
    if "SSH_CONNECTION" in environment:
        return bool(environment.get("DISPLAY")) and platform not in ("darwin", "win32")
    return platform in ("darwin", "win32") or any(
        environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
