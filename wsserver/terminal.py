"""``wsserver chat``: a chat in a terminal, or one prompt of a script.

What a model says is not to be trusted with the terminal: characters that terminals obey are shown
and not obeyed. A program that reads a pipe gets the text as it is.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import re
import secrets
import signal
import stat
import sys
import unicodedata
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsserver.auth import Handshake, Principal
from wsserver.client import (
    Chat,
    ChatError,
    ConnectionFailed,
    Reply,
    ReplyError,
    ServerError,
    State,
    connect,
)
from wsserver.errors import Code, ConfigError
from wsserver.protocol import ID_PATTERN, Prompt
from wsserver.server import serve
from wsserver.settings import CHAT_TOKEN, Settings

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyPressEvent

__all__ = ["Options", "run"]

DONE, FAILED, INTERRUPTED = 0, 1, 130
SIGNALLED = 128  # and the number of the signal, as shells have it
OPEN_TIMEOUT = 5.0  # seconds after which a person takes an address for wrong
TURNS_SHOWN = 6  # messages of a conversation that goes on

# Those that change the direction of what follows: a text could look like another one.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        url: of a server; None starts one for this chat alone.
        once: the one prompt; ``-`` reads it from stdin. None talks with a person.
        conversation: which goes on.
        token: who the client is. Default: the environment's.
        model: which answers.
        system: the system prompt.
    """

    url: str | None = None
    once: str | None = None
    conversation: str | None = None
    token: str | None = None
    model: str | None = None
    system: str | None = None


def run(options: Options) -> int:
    """Chat, and return the exit code: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: it cannot be done as asked.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        raise ConfigError("stdin, stdout and stderr have to be open, to /dev/null if need be")
    try:
        prompt = _prompt_of(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.conversation is not None and not re.fullmatch(ID_PATTERN, options.conversation):
        raise ConfigError("--conversation: 16 to 64 of A-Z, a-z, 0-9, _ and -")
    if options.url is not None and not options.url.startswith(("ws://", "wss://")):
        raise ConfigError(f"{safe(options.url)!r} is no address such as ws://localhost:3001")
    try:
        Prompt(prompt=prompt or "Hi", model=options.model, system=options.system)
    except ValueError:
        raise ConfigError("the prompt, --model or --system is no text that can be sent") from None
    # What a private server and the libraries log is no part of the talk.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        return asyncio.run(_Terminal(options).run(prompt))
    except ConnectionFailed as failure:
        _note(str(failure))
        return FAILED
    except KeyboardInterrupt:  # before there was a reply to stop
        return INTERRUPTED
    except OSError as error:
        # Nobody reads any more, or a disk is full. Python would complain as it flushes in the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                _note(f"cannot go on: {error.strerror or error}")
        return FAILED


def safe(text: str) -> str:
    """Return text with all escaped that a terminal would obey, but for line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    obeyed = unicodedata.category(character) in {"Cc", "Cs"} or character in _DIRECTIONS
    return ascii(character)[1:-1] if obeyed else character


def _prompt_of(options: Options) -> str | None:
    if options.once is None:
        if not sys.stdin.isatty():
            raise ConfigError("this is no terminal; give one prompt with --once, or --once - <FILE")
        _require_prompt_toolkit()
        return None
    try:
        prompt = sys.stdin.read() if options.once == "-" else options.once
        prompt.encode()
    except UnicodeError:
        raise ConfigError("the prompt is no UTF-8") from None
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    return prompt


def _require_prompt_toolkit() -> None:
    try:
        import prompt_toolkit  # noqa: F401, PLC0415
    except ImportError:
        raise ConfigError(
            "chatting needs more: pip install 'wsserver[chat]'; --once does without"
        ) from None


class _Again(Exception):
    """The user wants another answer to the last prompt."""


class _Terminal:
    """One chat, and where it is shown."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._out = sys.stdout
        if hasattr(self._out, "reconfigure"):
            self._out.reconfigure(errors="backslashreplace")
        self._chat: Chat
        self._new_line = True
        self._was_lost = False
        self._last: tuple[str, str | None] | None = None  # prompt; id of the turn, if there is one
        self._interrupt: Callable[[], None] | None = None

    async def run(self, prompt: str | None) -> int:
        options = self._options
        loop, talk = asyncio.get_running_loop(), asyncio.current_task()
        assert talk is not None
        ended_by = signal.SIGINT

        def end(number: signal.Signals = signal.SIGINT) -> None:
            nonlocal ended_by
            ended_by = number
            talk.cancel()

        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP):  # replies are stopped before it ends
            loop.add_signal_handler(number, end, number)
        self._interrupt = end
        try:
            async with (
                _server(options) as (url, token),
                connect(
                    url,
                    token=token,
                    conversation=options.conversation,
                    open_timeout=OPEN_TIMEOUT,
                    on_state=self._show_state,
                ) as self._chat,
            ):
                return await (self._talk() if prompt is None else self._answer(prompt))
        except asyncio.CancelledError:
            return SIGNALLED + ended_by

    def _on_interrupt(self) -> None:
        if self._interrupt is not None:
            self._interrupt()

    # One prompt.

    async def _answer(self, prompt: str) -> int:
        reply = self._ask(prompt)
        interrupted = await self._print(reply, raw=not self._out.isatty())
        if self._out.isatty() and not self._new_line:
            self._write("\n")
        if interrupted:
            return INTERRUPTED
        try:
            done = await reply.done()
        except ChatError as error:
            _note(_in_words(error))
            return FAILED
        if done.reason == "stopped":
            _note(f"stopped by {done.by}")
            return FAILED
        if done.reason == "max_tokens":
            _note("cut off, as it would be too long")
        return DONE

    # A talk.

    async def _talk(self) -> int:
        session = _session()
        self._say(
            "Ctrl-C stops a reply, Alt-Enter begins a new line, "
            "Alt-R asks the last prompt again, Ctrl-D leaves"
        )
        await self._show_past()
        self._interrupt = None
        while True:
            from prompt_toolkit.patch_stdout import patch_stdout  # noqa: PLC0415

            try:
                with patch_stdout():
                    text = await session.prompt_async("> ", handle_sigint=False)
            except EOFError:
                return DONE
            except _Again:
                await self._ask_again()
                continue
            if text.strip():
                await self._talk_about(text)

    async def _ask_again(self) -> None:
        if self._last is None:
            self._say("[there is no prompt to ask again]")
            return
        prompt, turn = self._last
        self._say(f"> {safe(prompt)}")
        await self._talk_about(prompt, retry_of=turn)

    async def _talk_about(self, prompt: str, retry_of: str | None = None) -> None:
        try:
            reply = self._ask(prompt, retry_of=retry_of)
        except ValueError:
            self._say("[this is no text that can be sent]")
            return
        await self._show(reply)
        # What was refused is no turn: the one before it is still the last.
        self._last = prompt, reply.id if reply.started else retry_of

    async def _show_past(self) -> None:
        if self._options.conversation is None:
            return
        try:
            history = await self._chat.history()
        except ServerError as error:
            known = error.code != Code.NOT_FOUND
            self._say(f"[{_in_words(error)}]" if known else "[a new conversation]")
            return
        self._say(safe(history.title))
        for message in history.messages[-TURNS_SHOWN:]:
            mark = f"\n[not whole: {safe(message.partial)}]" if message.partial else ""
            said = safe(message.content)
            self._say(f"> {said}" if message.role == "user" else f"{said}{mark}")
        for name in history.running:
            await self._show(self._chat.resume(name))
        if history.running:  # the prompts of those are known when they are over
            with contextlib.suppress(ServerError):
                history = await self._chat.history()
        asked = [message for message in history.messages if message.role == "user"]
        if asked:
            self._last = asked[-1].content, asked[-1].id

    async def _show(self, reply: Reply) -> None:
        mark = ""
        try:
            await self._print(reply, raw=False)
            if reply.over:
                done = await reply.done()
                if done.reason == "stopped":
                    mark = (
                        "[stopped]" if done.by == "client" else f"[stopped: {safe(str(done.by))}]"
                    )
                elif done.reason == "max_tokens":
                    mark = "[cut off, as it would be too long]"
                if not done.saved:
                    mark += "[not saved]"
            else:
                mark = "[no longer waited for]"
        except ReplyError as error:
            mark = f"[{_in_words(error)}]"
        except ConnectionFailed as failure:
            if failure.final:
                raise
            mark = f"[{safe(str(failure))}]"
        if not self._new_line:
            self._write("\n")
        if mark:
            self._say(mark)

    # What both need.

    def _ask(self, prompt: str, retry_of: str | None = None) -> Reply:
        # A private server answers by this very model, and is never asked for another one.
        model = self._options.model if self._options.url is not None else None
        system = self._options.system
        return self._chat.prompt(prompt, retry_of=retry_of, model=model, system=system)

    async def _print(self, reply: Reply, *, raw: bool) -> bool:
        """Write a reply as it comes; return whether Ctrl-C stopped it."""
        printing = asyncio.ensure_future(self._write_all(reply, raw=raw))
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            if interrupted:
                printing.cancel()  # even its end is not waited for
            interrupted = True
            reply.request_stop()

        before, self._interrupt = self._interrupt, interrupt
        try:
            await asyncio.wait({printing})
        finally:
            self._interrupt = before
            printing.cancel()
        if not printing.cancelled():
            printing.result()
        return interrupted

    async def _write_all(self, reply: Reply, *, raw: bool) -> None:
        try:
            async for text in reply:
                self._write(text if raw else safe(text))
        except ServerError:
            pass  # told by whoever waits for the end

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self._new_line = text.endswith("\n")

    def _say(self, line: str) -> None:
        """Say something that is not the model's, on a line of its own."""
        if self._options.once is not None:
            _note(line.strip("[]"))
            return
        # Through `sys.stdout`, as that is where a prompt in sight makes room.
        print("" if self._new_line else "\n", line, sep="", flush=True)
        self._new_line = True

    def _show_state(self, state: State) -> None:
        if state is State.LOST:
            self._was_lost = True
            self._say("[connection lost, trying again…]")
        elif state is State.OPEN and self._was_lost:
            self._was_lost = False
            self._say("[connected again]")


def _note(line: str) -> None:
    print(f"wsserver: {safe(line)}", file=sys.stderr, flush=True)


def _in_words(error: Exception) -> str:
    text = safe(str(error))
    if isinstance(error, ServerError) and error.retryable:
        after = error.retry_after
        text += "; try again" + ("" if after is None else f" in {max(1, round(after))} s")
    return text


@contextlib.asynccontextmanager
async def _server(options: Options) -> AsyncIterator[tuple[str, str | None]]:
    """Yield the server's address, and the token for it; start a private one if none is given."""
    if options.url is not None:
        yield options.url, options.token or os.environ.get(CHAT_TOKEN) or None
        return
    # Other programs of this machine can reach its port, but not spend this user's money.
    secret = secrets.token_urlsafe()

    async def only_me(token: str | None, _: Handshake, /) -> Principal | None:
        known = token is not None and hmac.compare_digest(token.encode(), secret.encode())
        return Principal("me") if known else None

    given = dict.fromkeys(("unix_socket", "cert", "key"), "")
    if options.model is not None:
        given["model"] = options.model
    settings = Settings.load(
        **given,
        host="127.0.0.1",
        port=0,
        operations_port=None,
        store="memory:",
        allow_anonymous=False,
        drain_timeout=0,
    )
    async with serve(authenticate=only_me, settings=settings) as server:
        if server.model_name == "demo":
            _note("this is the demo model; set ANTHROPIC_API_KEY to talk to Claude")
        yield server.url, secret


def _session() -> "PromptSession[str]":
    """Return what reads lines, as a person edits them."""
    from prompt_toolkit import PromptSession  # noqa: PLC0415
    from prompt_toolkit.application import run_in_terminal  # noqa: PLC0415
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory  # noqa: PLC0415
    from prompt_toolkit.key_binding import KeyBindings  # noqa: PLC0415

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def _(event: "KeyPressEvent") -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("escape", "r")
    def _(event: "KeyPressEvent") -> None:
        if not event.current_buffer.text:  # what is being typed is not thrown away
            event.app.exit(exception=_Again)

    @keys.add("c-c")
    def _(event: "KeyPressEvent") -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            run_in_terminal(lambda: print("[Ctrl-D leaves]", flush=True))

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            # A disk that is full, or a file that is gone, is no reason not to send it.
            with contextlib.suppress(OSError):
                super().store_string(string)

    history: History
    try:
        history = Kept(_history_file())
    except OSError as error:
        _note(f"no history of what you type is kept: {error.strerror}")
        history = InMemoryHistory()
    return PromptSession(history=history, key_bindings=keys, multiline=True)


def _history_file() -> Path:
    """Return where what a user types is kept, for nobody else to read (XDG Base Directories)."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(home) / "wsserver" / "history"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.closing(os.fdopen(descriptor)):
        # Whoever wants no history may have led it to a device, which is everybody's.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
    return path
