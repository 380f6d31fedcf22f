"""One prompt for a script: only the reply is on stdout, and notes are on stderr."""

import asyncio
import contextlib
import sys

from wsserver.client import Chat, ChatError, ConnectionFailed, Reply, ServerError, State
from wsserver.terminal.exits import DONE, FAILED, INTERRUPTED
from wsserver.terminal.reasons import Reasons
from wsserver.terminal.wording import describe_error, describe_partial, escape


class Once:
    """Sends one prompt and writes its reply to stdout.

    A terminal gets the control characters of the model escaped. A pipe gets the text unchanged. The
    last line ends, as programs that read lines expect.
    """

    def __init__(self, chat: Chat, model: str | None, system: str | None, reasons: Reasons) -> None:
        self._chat = chat
        self._reasons = reasons
        self._model = model
        self._system = system
        self._out = sys.stdout
        self._raw = not self._out.isatty()
        self._at_start = True  # of a line
        self._interrupted = False
        self._reply: Reply
        self._writing: asyncio.Future[None] | None = None
        self._was_lost = False

    async def run(self, prompt: str) -> int:
        """Return the exit code."""
        self._reply = self._chat.prompt(prompt, model=self._model, system=self._system)
        self._writing = asyncio.ensure_future(self._write())
        try:
            await asyncio.wait({self._writing})
        finally:
            self._writing.cancel()
        if not self._writing.cancelled():
            self._writing.result()
        if not self._at_start:
            self._out.write("\n")
        return INTERRUPTED if self._interrupted else await self._end()

    def interrupt(self) -> None:
        """Stop the reply. The second time, do not wait for its end."""
        if self._interrupted and self._writing is not None:
            self._writing.cancel()
        self._interrupted = True
        self._reply.request_stop()

    def show_state(self, state: State) -> None:
        """Tell that the connection is lost, or that it is open again."""
        if state is State.LOST:
            self._was_lost = True
            note("connection lost, trying again… The text so far stays.")
        elif state is State.OPEN and self._was_lost:
            self._was_lost = False
            note("connected again")

    async def _write(self) -> None:
        with contextlib.suppress(ServerError, ConnectionFailed):  # `Reply.done` raises it again
            async for text in self._reply:
                self._out.write(text if self._raw else escape(text))
                self._out.flush()
                self._at_start = text.endswith("\n")

    async def _end(self) -> int:
        try:
            done = await self._reply.done()
        except ChatError as error:
            if isinstance(error, ConnectionFailed) and error.final:
                raise
            reason = self._reasons.of(error) if isinstance(error, ServerError) else ""
            note(describe_error(error, reason))
            return FAILED
        if done.reason == "stopped":
            note(describe_partial(done.by or "client"))
            return FAILED
        if done.reason == "max_tokens":
            note("the reply reached its maximum length")
        return DONE


def note(line: str) -> None:
    """Print a line for people."""
    print(f"wsserver: {escape(line)}", file=sys.stderr, flush=True)
