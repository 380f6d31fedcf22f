"""Real reverse proxies in front of a server: nginx, HAProxy and Caddy.

Each gets a configuration of a test, and listens on a socket that no other program can take.
"""

import asyncio
import contextlib
import grp
import os
import pwd
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests.support.process import Process
from tests.support.tools import require_caddy, require_haproxy, require_nginx

__all__ = ["caddy", "haproxy", "nginx"]


@contextlib.asynccontextmanager
async def _running(
    *command: str, env: Mapping[str, str], descriptors: tuple[int, ...] = ()
) -> AsyncIterator[Process]:
    """Run a program; kill it in the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **env},
        pass_fds=descriptors,
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@contextlib.asynccontextmanager
async def nginx(
    folder: Path, site: str, http: str = "", connections: int = 64
) -> AsyncIterator[str]:
    """Run nginx with the directives of one `server` and of `http`; yield its address."""
    program = require_nginx()
    user = ""
    if os.geteuid() == 0:  # the workers would run as a user without access to the folder
        user = f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getegid()).gr_name};"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        name = "{}:{}".format(*listener.getsockname())
        (folder / "nginx.conf").write_text(
            f"{user} daemon off; pid {folder}/pid; error_log stderr error; worker_processes 1;\n"
            f"events {{ worker_connections {connections}; }}\n"
            f"http {{ access_log off;\n{paths} {http} server {{ listen {name};\n{site}\n }} }}\n"
        )
        # nginx inherits the listening socket, as in an upgrade of its program.
        async with _running(
            *(program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"),
            env={"NGINX": f"{listener.fileno()};"},
            descriptors=(listener.fileno(),),
        ):
            yield f"ws://{name}/"


@contextlib.asynccontextmanager
async def haproxy(
    folder: Path, port: int, frontend: str = "", backend: str = ""
) -> AsyncIterator[str]:
    """Run HAProxy in front of a local server; yield its address."""
    program = require_haproxy()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (folder / "haproxy.cfg").write_text(
            "defaults\n mode http\n retries 0\n timeout connect 5s\n timeout client 60s\n"
            " timeout server 60s\n"
            f"frontend chat\n bind fd@{listener.fileno()}\n default_backend wsserver\n{frontend}\n"
            f"backend wsserver\n server one 127.0.0.1:{port}\n{backend}\n"
        )
        async with _running(
            *(program, "-db", "-f", str(folder / "haproxy.cfg")),
            env={},
            descriptors=(listener.fileno(),),
        ):
            yield "ws://{}:{}/".format(*listener.getsockname())


@contextlib.asynccontextmanager
async def caddy(
    folder: Path, port: int, options: str = "", site: str = "", path: str = "/*"
) -> AsyncIterator[str]:
    """Run Caddy in front of a local server; yield its address.

    Args:
        folder: for its files.
        port: of the server.
        options: inside of `reverse_proxy`.
        site: further directives of the site.
        path: what the options are for.
    """
    program = require_caddy()
    with socket.socket() as reserved:
        # Caddy shares the port; this socket does not listen, and so gets no connection.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        name = "{}:{}".format(*reserved.getsockname())
        (folder / "Caddyfile").write_text(
            "{\n admin off\n auto_https off\n grace_period 100ms\n}\n"
            f"http://{name} {{\n bind 127.0.0.1\n {site}\n"
            f" reverse_proxy {path} 127.0.0.1:{port} {{\n{options}\n }}\n"
            f" reverse_proxy 127.0.0.1:{port}\n}}\n"
        )
        home = {name: str(folder) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
        async with _running(
            *(program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")),
            env=home,
        ) as process:
            await process.line("serving initial configuration")
            yield f"ws://{name}/"
