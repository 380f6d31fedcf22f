"""``wsserver chat``: a chat in a terminal, or one prompt for a script.

A model's text may contain control characters that a terminal would execute. The terminal gets them
escaped. A program that reads from a pipe gets the text unchanged.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import re
import secrets
import signal
import sys
import unicodedata
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from wsserver.auth import Handshake, Principal
from wsserver.client import (
    Chat,
    ChatError,
    ConnectionFailed,
    Message,
    Reply,
    ReplyError,
    ServerError,
    State,
    Usage,
    connect,
)
from wsserver.errors import Code, ConfigError
from wsserver.protocol import Prompt
from wsserver.server import serve
from wsserver.settings import CHAT_TOKEN, Settings
from wsserver.wire import ID_PATTERN

DONE, FAILED, INTERRUPTED = 0, 1, 130
SIGNAL_BASE = 128  # exit code after a signal: this and the signal's number, as in shells
OPEN_TIMEOUT = 5.0  # seconds to connect; short, since a wrong address is likely
THOUGHT_SHOWN = 300  # characters of the model's thinking
MESSAGES_SHOWN = 6  # of a conversation that continues

# Characters that change the writing direction: with them a text can look like another one.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of the command line."""

    url: str | None = None  # the server's address; None starts a private server
    once: str | None = None  # the only prompt; `-` reads it from stdin. None starts a dialogue
    conversation: str | None = None  # id of the conversation to continue
    token: str | None = None  # bearer token. Default: that of the environment
    model: str | None = None  # the model's name
    system: str | None = None  # the system prompt


def run(options: Options) -> int:
    """Run the chat; return the exit code: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: an argument or the environment is not usable.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        raise ConfigError("stdin, stdout and stderr must be open; redirect them to /dev/null")
    try:
        prompt = _read_prompt(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.conversation is not None and not re.fullmatch(ID_PATTERN, options.conversation):
        raise ConfigError("--conversation: 16 to 64 of A-Z, a-z, 0-9, _ and -")
    if options.url is not None and not options.url.startswith(("ws://", "wss://")):
        raise ConfigError(f"{escape(options.url)!r} is not an address such as ws://localhost:3001")
    try:
        Prompt(prompt=prompt or "Hi", model=options.model, system=options.system)
    except ValueError:
        raise ConfigError("the prompt, --model or --system cannot be sent as text") from None
    # Otherwise a private server and the libraries would log to stderr, between lines of the chat.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        return asyncio.run(Terminal(options).run(prompt))
    except ConnectionFailed as failure:
        _note(str(failure))
        return FAILED
    except KeyboardInterrupt:  # before the signal handler was set
        return INTERRUPTED
    except OSError as error:
        # The reader closed the pipe, or a disk is full. Python's flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                _note(f"cannot write: {error.strerror or error}")
        return FAILED


def escape(text: str) -> str:
    """Return text with its control characters escaped, except line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if character in "\n\t":
        return character
    control = unicodedata.category(character) in {"Cc", "Cs"} or character in _DIRECTIONS
    return ascii(character)[1:-1] if control else character


def _read_prompt(options: Options) -> str | None:
    if options.once is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                "stdin is not a terminal; give one prompt with --once, or --once - <FILE"
            )
        _require_prompt_toolkit()
        return None
    try:
        prompt = sys.stdin.read() if options.once == "-" else options.once
        prompt.encode()
    except UnicodeError:
        raise ConfigError("the prompt is not UTF-8") from None
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    return prompt


def _require_prompt_toolkit() -> None:
    try:
        import prompt_toolkit  # noqa: F401, PLC0415
    except ImportError:
        raise ConfigError(
            "a dialogue needs prompt_toolkit: pip install 'wsserver[chat]'; --once works without"
        ) from None


class Terminal:
    """One chat, shown on stdout."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._out = sys.stdout
        if hasattr(self._out, "reconfigure"):
            self._out.reconfigure(errors="backslashreplace")
        self._chat: Chat
        self._new_line = True
        self._was_lost = False
        self._last: tuple[str, str | None] | None = None  # the last prompt, and the id of its turn
        self._on_ctrl_c: Callable[[], None] | None = None

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

        loop.add_signal_handler(signal.SIGINT, self._handle_ctrl_c)
        for number in (signal.SIGTERM, signal.SIGHUP):  # leaving the chat stops its replies
            loop.add_signal_handler(number, end, number)
        self._on_ctrl_c = end
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
                return await (self._dialogue() if prompt is None else self._answer(prompt))
        except asyncio.CancelledError:
            return SIGNAL_BASE + ended_by

    def _handle_ctrl_c(self) -> None:
        if self._on_ctrl_c is not None:
            self._on_ctrl_c()

    # One prompt.

    async def _answer(self, prompt: str) -> int:
        reply = self._prompt(prompt)
        interrupted = await self._print(reply, raw=not self._out.isatty())
        if self._out.isatty() and not self._new_line:
            self._write("\n")
        if interrupted:
            return INTERRUPTED
        try:
            done = await reply.done()
        except ChatError as error:
            _note(_describe_error(error))
            return FAILED
        if done.reason == "stopped":
            _note(f"stopped by {done.by}")
            return FAILED
        if done.reason == "max_tokens":
            _note("the reply reached its maximum length")
        return DONE

    # A dialogue.

    async def _dialogue(self) -> int:
        from wsserver.line_editor import LineEditor, RetryRequested  # noqa: PLC0415

        editor = LineEditor(_note)
        self._print_line(
            "Ctrl-C stops a reply, Alt-Enter begins a new line, "
            "Alt-R repeats the last prompt, Ctrl-D leaves"
        )
        await self._show_history()
        self._on_ctrl_c = None
        while True:
            try:
                text = await editor.read()
            except EOFError:
                return DONE
            except RetryRequested:
                await self._retry()
                continue
            if text.strip():
                await self._exchange(text)

    async def _retry(self) -> None:
        if self._last is None:
            self._print_line("[there is no prompt to repeat]")
            return
        prompt, turn = self._last
        self._print_line(f"> {escape(prompt)}")
        await self._exchange(prompt, retry_of=turn)

    async def _exchange(self, prompt: str, retry_of: str | None = None) -> None:
        """Send a prompt and show its reply."""
        try:
            reply = self._prompt(prompt, retry_of=retry_of)
        except ValueError:
            self._print_line("[this cannot be sent as text]")
            return
        await self._show(reply)
        # A refused prompt creates no turn, so a retry still replaces the turn before.
        self._last = prompt, reply.id if reply.started else retry_of

    async def _show_history(self) -> None:
        if self._options.conversation is None:
            return
        try:
            history = await self._chat.history()
        except ServerError as error:
            known = error.code != Code.NOT_FOUND
            self._print_line(f"[{_describe_error(error)}]" if known else "[a new conversation]")
            return
        self._print_line(escape(history.title))
        for message in history.messages[-MESSAGES_SHOWN:]:
            self._print_message(message)
        for name in history.running:
            await self._show(self._chat.resume(name))
        if history.running:  # the history has the prompts of replies that have ended
            with contextlib.suppress(ServerError):
                history = await self._chat.history()
        asked = [message for message in history.messages if message.role == "user"]
        if asked:
            self._last = asked[-1].text, asked[-1].id

    def _print_message(self, message: Message) -> None:
        if message.role == "user":
            self._print_line(f"> {escape(message.text)}")
            return
        if message.thinking:
            self._print_line(_thought(message.thinking))
        self._print_line(escape(message.text))
        if message.partial:
            self._print_line(f"[incomplete: {escape(message.partial)}]")
        if message.model or message.usage:
            self._print_line(_facts(message.model, message.usage))

    async def _show(self, reply: Reply) -> None:
        mark = ""
        try:
            await self._print(reply, raw=False)
            if reply.over:
                done = await reply.done()
                if done.reason == "stopped":
                    mark = (
                        "[stopped]" if done.by == "client" else f"[stopped: {escape(str(done.by))}]"
                    )
                elif done.reason == "max_tokens":
                    mark = "[the reply reached its maximum length]"
                if not done.saved:
                    mark += "[not saved]"
            else:
                mark = "[gave up waiting for the end]"
        except ReplyError as error:
            mark = f"[{_describe_error(error)}]"
        except ConnectionFailed as failure:
            if failure.final:
                raise
            mark = f"[{escape(str(failure))}]"
        if not self._new_line:
            self._write("\n")
        if mark:
            self._print_line(mark)
        if reply.usage:
            self._print_line(_facts(reply.model, reply.usage))

    # For both.

    def _prompt(self, prompt: str, retry_of: str | None = None) -> Reply:
        # A private server was started with --model, and accepts no other name.
        model = self._options.model if self._options.url is not None else None
        system = self._options.system
        return self._chat.prompt(prompt, retry_of=retry_of, model=model, system=system)

    async def _print(self, reply: Reply, *, raw: bool) -> bool:
        """Write a reply while it streams; return whether Ctrl-C stopped it."""
        printing = asyncio.ensure_future(self._write_all(reply, raw=raw))
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            if interrupted:
                printing.cancel()  # the second Ctrl-C does not wait for the end
            interrupted = True
            reply.request_stop()

        before, self._on_ctrl_c = self._on_ctrl_c, interrupt
        try:
            await asyncio.wait({printing})
        finally:
            self._on_ctrl_c = before
            printing.cancel()
        if not printing.cancelled():
            printing.result()
        return interrupted

    async def _write_all(self, reply: Reply, *, raw: bool) -> None:
        shown = False
        try:
            async for text in reply:
                if self._options.once is None and not shown and reply.thoughts:
                    self._print_line(_thought(reply.thoughts))
                shown = True
                self._write(text if raw else escape(text))
        except ServerError:
            pass  # `Reply.done` raises it again

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self._new_line = text.endswith("\n")

    def _print_line(self, line: str) -> None:
        """Print a line that is not the model's text."""
        if self._options.once is not None:
            _note(line.strip("[]"))
            return
        # `patch_stdout` replaces `sys.stdout`, and prints above the prompt.
        print("" if self._new_line else "\n", line, sep="", flush=True)
        self._new_line = True

    def _show_state(self, state: State) -> None:
        if state is State.LOST:
            self._was_lost = True
            self._print_line("[connection lost, trying again…]")
        elif state is State.OPEN and self._was_lost:
            self._was_lost = False
            self._print_line("[connected again]")


def _note(line: str) -> None:
    print(f"wsserver: {escape(line)}", file=sys.stderr, flush=True)


def _thought(thinking: str) -> str:
    shown = escape(" ".join(thinking.split()))
    return f"[thought: {shown if len(shown) <= THOUGHT_SHOWN else shown[:THOUGHT_SHOWN] + '…'}]"


def _facts(model: str | None, usage: Usage | None) -> str:
    facts = [] if model is None else [escape(model)]
    if usage is not None:
        read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        about = "about " if usage.estimated else ""
        given = usage.input_tokens + read + written
        facts.append(f"{given:,} tokens in, {about}{usage.output_tokens:,} out")
    return f"[{' · '.join(facts)}]"


def _describe_error(error: Exception) -> str:
    text = escape(str(error))
    if isinstance(error, ServerError) and error.retryable:
        after = error.retry_after
        text += "; try again" + ("" if after is None else f" in {max(1, round(after))} s")
    return text


@contextlib.asynccontextmanager
async def _server(options: Options) -> AsyncIterator[tuple[str, str | None]]:
    """Yield the server's address and token. Start a private server if no address is given."""
    if options.url is not None:
        yield options.url, options.token or os.environ.get(CHAT_TOKEN) or None
        return
    # Other users of this machine can reach the port. The token keeps them from using the model.
    secret = secrets.token_urlsafe()

    async def authenticate(token: str | None, _: Handshake, /) -> Principal | None:
        valid = token is not None and hmac.compare_digest(token.encode(), secret.encode())
        return Principal("me") if valid else None

    overrides = dict.fromkeys(("unix_socket", "cert", "key"), "")
    if options.model is not None:
        overrides["model"] = options.model
    settings = Settings.load(
        **overrides,
        host="127.0.0.1",
        port=0,
        operations_port=None,
        store="memory:",
        allow_anonymous=False,
        drain_timeout=0,
    )
    async with serve(authenticate=authenticate, settings=settings) as server:
        if server.model_name == "demo":
            _note("this is the demo model; set ANTHROPIC_API_KEY to talk to Claude")
        yield server.url, secret
