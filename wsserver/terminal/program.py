"""Runs ``wsserver chat``: the connection, the signals and the exit code."""

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from wsserver.auth import Handshake, Principal
from wsserver.client import Chat, ConnectionFailed, ServerError, State, connect
from wsserver.client.dial import without_credentials
from wsserver.errors import ConfigError, StoreInUse
from wsserver.server import serve
from wsserver.settings import ANSWER_ROOM, CHAT_TOKEN, ESCAPED, PREFIX, Settings
from wsserver.terminal import files
from wsserver.terminal.exits import FAILED, INTERRUPTED, SIGNAL_BASE
from wsserver.terminal.once import Once, note
from wsserver.terminal.options import Options, read_prompt
from wsserver.terminal.reasons import Reasons
from wsserver.terminal.wording import describe_error, describe_failure

OPEN_TIMEOUT = 5.0  # seconds to connect; short, since a wrong address is likely
# Of a private server. Its user is its only client, and sends whole files.
PROMPT_SIZE = 1_048_576  # bytes
LIMITS = {
    "prompt_size": PROMPT_SIZE,
    "message_size": ESCAPED * PROMPT_SIZE + ANSWER_ROOM,
    "max_unsent": 2 * ESCAPED * PROMPT_SIZE,
}
NOTICE_AFTER = 1.0  # seconds to connect before the user is told what the program waits for


def run(options: Options) -> int:
    """Run the chat; return the exit code: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: an argument or the environment is not usable.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        raise ConfigError("stdin, stdout and stderr must be open; redirect them to /dev/null")
    try:
        prompt = read_prompt(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    # Otherwise a private server and the libraries would log to stderr, between lines of the chat.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        return asyncio.run(Terminal(options).run(prompt))
    except KeyboardInterrupt:  # before the signal handler was set
        return INTERRUPTED
    except OSError as error:
        # The reader closed the pipe, or a disk is full. Python's flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                note(f"cannot write: {error.strerror or error}")
        return FAILED


class Terminal:
    """One chat, shown on stdout."""

    def __init__(self, options: Options) -> None:
        self._options = options
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        self._reasons = Reasons()
        # Both are replaced when the chat is shown.
        self._on_ctrl_c: Callable[[], None]
        self._on_state: Callable[[State], None] = lambda _: None

    async def run(self, prompt: str | None) -> int:
        """Send one prompt, or run a dialogue; return the exit code."""
        options = self._options
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        ended_by = signal.SIGINT

        def end(number: signal.Signals = signal.SIGINT) -> None:
            nonlocal ended_by
            ended_by = number
            task.cancel()

        self._on_ctrl_c = end
        loop.add_signal_handler(signal.SIGINT, self._handle_ctrl_c)
        for number in (signal.SIGTERM, signal.SIGHUP):  # leaving the chat stops its replies
            loop.add_signal_handler(number, end, number)
        address = _Address(options.url or "", options.token)
        try:
            async with _server(options, self._reasons) as address:
                return await self._chat(address, prompt)
        except ConnectionFailed as failure:
            note(describe_failure(failure, address.url, has_token=bool(address.token)))
            return FAILED
        except ServerError as error:
            note(describe_error(error))
            return FAILED
        except asyncio.CancelledError:
            return SIGNAL_BASE + ended_by

    async def _chat(self, address: "_Address", prompt: str | None) -> int:
        options = self._options
        slow = asyncio.get_running_loop().call_later(
            NOTICE_AFTER, note, f"connecting to {without_credentials(address.url)}…"
        )
        if prompt is not None:  # a script's log has the outcome only
            slow.cancel()
        async with connect(
            address.url,
            token=address.token,
            conversation=options.conversation,
            open_timeout=OPEN_TIMEOUT,
            on_state=self._show_state,
        ) as chat:
            slow.cancel()
            continues = options.conversation is not None
            if options.last:
                continues = await self._choose_last(chat)
            if prompt is None:
                return await self._talk(chat, address, continues=continues)
            once = Once(chat, options.prompt_model, options.system, self._reasons)
            self._on_ctrl_c, self._on_state = once.interrupt, once.show_state
            return await once.run(prompt)

    def _handle_ctrl_c(self) -> None:
        self._on_ctrl_c()

    def _show_state(self, state: State) -> None:
        self._on_state(state)

    async def _choose_last(self, chat: Chat) -> bool:
        """Continue the last conversation; return whether there is one.

        Raises:
            ServerError: the server refuses to list the conversations.
            ConnectionFailed: there is no connection.
        """
        last = await chat.conversations(limit=1)
        if not last:
            note("there is no conversation to continue; this is a new one")
            return False
        chat.conversation = last[0].id
        return True

    async def _talk(self, chat: Chat, address: "_Address", *, continues: bool) -> int:
        # Imported here: --once works without prompt_toolkit and rich.
        from wsserver.terminal.dialogue import Dialogue, farewell  # noqa: PLC0415
        from wsserver.terminal.screens import make_screen  # noqa: PLC0415
        from wsserver.terminal.talk import Talk  # noqa: PLC0415

        options = self._options
        screen = make_screen(plain=options.plain, warn=note)
        talk = Talk(chat, screen, options.prompt_model, options.system, self._reasons)
        dialogue = Dialogue(talk, screen)
        self._on_ctrl_c, self._on_state = dialogue.interrupt, talk.show_state
        try:
            return await dialogue.run(continues=continues)
        finally:
            if talk.used and address.lasting:
                print(farewell(talk, options), flush=True)


@dataclass(frozen=True, slots=True)
class _Address:
    """Where the server is.

    Attributes:
        url: its address.
        token: the bearer token.
        lasting: whether its conversations can be continued by another program.
    """

    url: str
    token: str | None
    lasting: bool = True


@contextlib.asynccontextmanager
async def _server(options: Options, reasons: Reasons) -> AsyncIterator[_Address]:
    """Yield the server's address. Start a private server if no address is given.

    Args:
        options: the arguments of the command line.
        reasons: gets the reasons of errors of a private server.
    """
    if options.url is not None:
        yield _Address(options.url, options.token or os.environ.get(CHAT_TOKEN) or None)
        return
    # Other users of this machine can reach the port. The token keeps them from using the model.
    secret = secrets.token_urlsafe()

    async def authenticate(token: str | None, _: Handshake, /) -> Principal | None:
        valid = token is not None and hmac.compare_digest(token.encode(), secret.encode())
        return Principal("me") if valid else None

    overrides: dict[str, Any] = dict.fromkeys(("unix_socket", "cert", "key"), "")
    # Limits depend on each other, so those of the environment are not mixed with others.
    if not any(PREFIX + name.upper() in os.environ for name in (*LIMITS, "memory")):
        overrides |= LIMITS
    if options.model is not None:
        overrides["model"] = options.model
    # A prompt of a script leaves nothing behind, unless it continues a conversation.
    kept = options.once is None or options.last or options.conversation is not None
    if not kept:
        overrides["titles"] = "off"
    file = files.state_file("chat.sqlite", "XDG_DATA_HOME", ".local/share")
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(reasons.kept())
        for store in (*([f"sqlite:///{file}"] if kept else []), "memory:"):
            settings = Settings.load(
                **overrides,
                host="127.0.0.1",
                port=0,
                operations_port=None,
                store=store,
                allow_anonymous=False,
                drain_timeout=0,
            )
            server = serve(authenticate=authenticate, settings=settings)
            try:
                started = await stack.enter_async_context(server)
            except ConfigError as error:
                if store == "memory:" or not str(error).startswith("store:"):
                    raise
                reason = str(error).removeprefix("store: ")
                advice = "set XDG_DATA_HOME to another folder, and start again"
                if isinstance(error, StoreInUse):
                    reason = f"another wsserver chat is open and uses {file}"
                    advice = (
                        "leave that chat, and start again; for several chats at once, run "
                        "`wsserver serve`, and `wsserver chat ws://localhost:3001` in each terminal"
                    )
                note(f"this conversation will not be saved: {reason}; to save it, {advice}")
            else:
                break
        if started.model_name == "demo":
            note(
                "this is the demo model; set ANTHROPIC_API_KEY to talk to Claude, or use --model "
                "openai:NAME"
            )
        yield _Address(started.url, secret, lasting=store != "memory:")
