"""The server as a program of its own: signals, output, service manager, garbage collection."""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from socket import socket
from typing import Any, NoReturn
from urllib.parse import urlsplit

import wsserver
from wsserver import workers
from wsserver.errors import ConfigError
from wsserver.logs import log, write_left_out
from wsserver.server import Server, serve
from wsserver.settings import Settings
from wsserver.sockets import service_manager

OUT_OF_MEMORY = 1  # exit code; a service manager then restarts the program
LAST_WORDS = b"wsserver: out of memory; the process ends now, and the store keeps what it has\n"
LAST_MOMENT = 1.0  # seconds for Python to end after the shutdown


def run(settings: Settings) -> int:
    """Run a server until a signal ends it, and return the exit code.

    Raises:
        ConfigError: the server cannot start.
    """
    sockets: Sequence[socket] = service_manager.inherited()
    parent = None
    if settings.workers > 1:
        workers.check(settings)
        tied = _is_tied()
        supervisor = workers.Supervisor(
            settings, sockets, _print_banner, lambda: tied and not _has_terminal()
        )
        try:
            work = supervisor.run()
        except OSError as error:
            raise ConfigError(_cannot_listen(settings, error)) from error
        if isinstance(work, int):
            return work
        settings, sockets, parent = work.settings, work.sockets, work.parent
    gc.disable()  # until _start_gc
    with asyncio.Runner(loop_factory=_loop_factory(settings)) as runner:
        runner.run(_serve(settings, sockets, parent))
    return 0


def _place_of(store: str) -> str:
    """Return where conversations are kept, without a password."""
    if store == "memory:":
        return "memory, until the server ends"
    parts = urlsplit(store)
    if parts.scheme == "sqlite":
        return store.removeprefix("sqlite:///")
    return f"PostgreSQL at {parts.hostname or 'the default host'}{parts.path}"


def _loop_factory(settings: Settings) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the function that makes the event loop of the settings.

    Raises:
        ConfigError: the event loop is not installed.
    """
    if settings.event_loop != "asyncio":
        try:
            import uvloop  # noqa: PLC0415
        except ImportError as error:  # no wheel for this machine or Python
            if settings.event_loop == "uvloop":
                raise ConfigError("event_loop: uvloop is not installed") from error
        else:
            return uvloop.new_event_loop
    return asyncio.new_event_loop


def exit_out_of_memory() -> NoReturn:
    """End the process now, without code that could need memory."""
    os.write(2, LAST_WORDS)
    os._exit(OUT_OF_MEMORY)


def _watch_failures(stack: contextlib.ExitStack) -> None:
    """Log unhandled exceptions that Python would print; end the process after a MemoryError.

    After a MemoryError in a callback the event loop would continue with an inconsistent state. A
    restart keeps everything that the store has.
    """

    def on_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), MemoryError):
            exit_out_of_memory()
        loop.default_exception_handler(context)

    def on_unraisable(failed: Any) -> None:
        if issubclass(failed.exc_type, MemoryError):
            exit_out_of_memory()
        log.error("exception ignored", failure=failed.exc_value)

    def on_thread(failed: Any) -> None:
        if issubclass(failed.exc_type, MemoryError):
            exit_out_of_memory()
        log.error("thread failed", failure=failed.exc_value)

    asyncio.get_running_loop().set_exception_handler(on_failure)
    stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
    stack.callback(setattr, threading, "excepthook", threading.excepthook)
    sys.unraisablehook, threading.excepthook = on_unraisable, on_thread


async def _serve(
    settings: Settings, sockets: Sequence[socket], parent: workers.Parent | None
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        _watch_failures(stack.enter_context(contextlib.ExitStack()))
        try:
            server = await stack.enter_async_context(serve(settings=settings, sockets=sockets))
        except OSError as error:
            raise ConfigError(_cannot_listen(settings, error)) from error
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        hung_up = asyncio.Event()
        tied = parent is None and _is_tied()

        def on_signal() -> None:
            if asked.is_set():
                server.hurry()
            asked.set()

        def on_hangup() -> None:
            if tied and not _has_terminal():
                asked.set()
            else:
                hung_up.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        reloading = loop.create_task(_reload(server, hung_up))
        starting_gc = loop.create_task(_start_gc(server))
        # After the signal handlers: a reader of the banner may send a signal.
        if parent is None:
            _print_banner(_banner(server))
            service_manager.notify("READY=1")
        else:
            loop.add_reader(parent.control, asked.set)  # the supervisor has died
            parent.tell_ready(_banner(server))
        await asked.wait()
        if parent is not None:
            loop.remove_reader(parent.control)
        for task in (reloading, starting_gc):
            task.cancel()
        await asyncio.wait({reloading, starting_gc})
        service_manager.notify("STOPPING=1")
        if parent is None:
            _print("shutting down; press Ctrl-C again to stop at once")
        await server.close()
        write_left_out()
        # A thread or task of a model that does not end must not keep the process alive.
        last = threading.Timer(LAST_MOMENT, os._exit, [0])
        last.daemon = True
        last.start()


async def _start_gc(server: Server) -> None:
    """Start garbage collection, for objects that are created from now on.

    The libraries have a hundred thousand objects that stay. Traversing them would take a fifth of
    the start, and would later pause all replies for 0.1 s at times.
    """
    await server.prepared()
    gc.freeze()
    gc.enable()


async def _reload(server: Server, asked: asyncio.Event) -> None:
    """Reload after each SIGHUP; once for all signals that arrive during a reload."""
    while True:
        await asked.wait()
        asked.clear()
        service_manager.notify("RELOADING=1")
        try:
            if await server.reload():
                log.info("reloaded")
        except Exception as error:  # noqa: BLE001
            log.error("reload failed", failure=error)
        finally:
            service_manager.notify("READY=1")


def _is_tied() -> bool:
    """Return whether the program ends if its terminal closes: nohup ignores SIGHUP."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_DFL and _has_terminal()


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _cannot_listen(settings: Settings, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} of {settings.host} is in use; choose another with --port"
    number = error.errno or 0  # negative if the host name is unknown
    reason = os.strerror(number) if number > 0 else error.strerror
    return f"cannot listen on {settings.host} port {settings.port}: {reason}"


def _banner(server: Server) -> str:
    note = ""
    if server.model_name == "demo":
        note = (
            " (offline, no language model; set ANTHROPIC_API_KEY to talk to Claude, or --model "
            "openai:NAME)"
        )
    lines = [f"wsserver {wsserver.__version__}, model {server.model_name}{note}"]
    if server.port:
        lines += [f"  page       {server.page}", f"  websocket  {server.url}"]
    lines += [f"  socket     {name}" for name in server.bound if name.startswith(("/", "@"))]
    lines.append(f"  store      {_place_of(server.settings.store)}")
    if server.operations_port is not None:
        lines.append(
            f"  operations http://{server.settings.operations_host}:{server.operations_port}/"
        )
    if server.open_to_users and not server.settings.allow_anonymous:
        lines.append("  EVERY USER of this machine can connect; --token-file keeps other users out")
    if server.settings.allow_anonymous:
        lines.append("  ANYONE who can connect can spend your money and read all conversations")
    return "\n".join(lines)


def _print_banner(banner: str) -> None:
    _print(f"{banner}\n  Ctrl-C stops")


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # stdout is closed
        print(text, flush=True)
