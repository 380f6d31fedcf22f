"""A dialogue: what is typed is sent, one prompt or command after the other."""

import asyncio
import re
import shlex
from collections import deque
from collections.abc import Coroutine
from typing import Any

from wsserver.client import ChatError, ConnectionFailed, Conversation, ServerError
from wsserver.terminal import files
from wsserver.terminal.commands import CommandError, help_lines, parse
from wsserver.terminal.exits import DONE, INTERRUPTED
from wsserver.terminal.options import Options
from wsserver.terminal.plain_screen import PlainScreen
from wsserver.terminal.screen import Screen
from wsserver.terminal.talk import Talk, is_new
from wsserver.terminal.wording import age, describe_error, escape
from wsserver.wire import ID_PATTERN

CONVERSATIONS_SHOWN = 20
OWN = "-"  # the argument that goes back to the default


class Dialogue:
    """Reads what is typed, and sends it in order. What is typed during a reply waits for its end.

    Args:
        talk: the conversation.
        screen: where the user types.
    """

    def __init__(self, talk: Talk, screen: Screen | PlainScreen) -> None:
        self._talk = talk
        self._screen = screen
        self._waiting: deque[str] = deque()
        self._typed = asyncio.Event()
        self._step: asyncio.Task[None] | None = None  # the prompt or command that runs
        self._editing: asyncio.Task[None] | None = None
        self._warned = False  # whether the next Ctrl-C leaves
        self._code = DONE
        self._listed: list[Conversation] = []
        keys = screen.keys
        keys.on_text, keys.on_interrupt, keys.on_edit = self._enter, self.interrupt, self._edit
        keys.on_retry = lambda: self._enter("/retry")
        keys.on_take_back = self._take_back

    async def run(self, *, continues: bool) -> int:
        """Run until the user leaves; return the exit code.

        Args:
            continues: whether the conversation may have messages, to be shown first.

        Raises:
            ConnectionFailed: there will be no connection again.
        """
        self._screen.note("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves")
        reading = asyncio.ensure_future(self._screen.run())
        working = asyncio.ensure_future(self._work(continues=continues))
        tasks: set[asyncio.Future[Any]] = {reading, working}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            await asyncio.wait({working})  # prints the last text above the prompt
            reading.cancel()
            await asyncio.wait({reading})
        for task in tasks:
            if not task.cancelled():
                task.result()
        return self._code

    # Keys.

    def interrupt(self) -> None:
        """Stop the reply. Without one, stop the command, or clear the line, or leave."""
        if self._editing is not None and not self._editing.done():
            return  # the editor gets Ctrl-C too
        if self._talk.interrupt():
            return
        if self._step is not None:
            self._step.cancel()
        elif self._screen.clear_input():
            self._warned = False
        elif self._warned:
            self._screen.leave()
        else:
            self._warned = True
            self._screen.note("[Ctrl-C again or Ctrl-D leaves]")
            self._screen.ready()

    def _enter(self, text: str) -> None:
        self._warned = False
        if not text.strip():
            return
        try:
            command = parse(text)
        except CommandError as error:
            self._screen.sent(text)
            self._screen.note(f"[{error}]")
            return
        match command:
            case "exit", _:
                self._screen.leave()
            case "help", _:
                for line in help_lines():
                    self._screen.note(line)
            case "edit", argument:
                self._edit(argument)
            case _:
                self._waiting.append(text)
                self._show_waiting()
                self._typed.set()

    def _take_back(self) -> None:
        if self._waiting:
            text = self._waiting.pop()
            self._show_waiting()
            self._screen.fill_input(text)

    def _edit(self, text: str) -> None:
        if self._editing is None or self._editing.done():
            self._editing = asyncio.ensure_future(self._run_editor(text))

    async def _run_editor(self, text: str) -> None:
        try:
            command = files.find_editor()
            if command is None:
                raise ValueError("there is no editor: set VISUAL or EDITOR")
            async with self._screen.lent():
                text = await files.edit(command, text)
        except (OSError, ValueError) as error:
            self._screen.note(f"[{error}]")
        self._screen.fill_input(text)

    # What is typed, in order.

    async def _work(self, *, continues: bool) -> None:
        if continues and not await self._do(self._open_first()):
            self._code = INTERRUPTED
            return
        while True:
            if not self._waiting:
                self._screen.ready()
                self._typed.clear()
                await self._typed.wait()
            text = self._waiting.popleft()
            await self._do(self._send(text))

    async def _do(self, step: Coroutine[Any, Any, None]) -> bool:
        """Run a step; return whether it was not cancelled by Ctrl-C."""
        self._step = asyncio.ensure_future(step)
        self._show_waiting()
        try:
            await asyncio.wait({self._step})
            cancelled = self._step.cancelled()
            if not cancelled:
                self._step.result()
        except ConnectionFailed as failure:
            if failure.final:
                raise
            self._screen.note(f"[{describe_error(failure)}]")
        except (ChatError, CommandError) as error:
            self._screen.note(f"[{describe_error(error)}]")
        finally:
            step_left, self._step = self._step, None
            if not step_left.done():
                step_left.cancel()
                await asyncio.wait({step_left})
        return not cancelled

    def _show_waiting(self) -> None:
        # The first one waits for nothing if no step runs.
        self._screen.queued = list(self._waiting) if self._step is not None else []
        self._screen.redraw()

    async def _open_first(self) -> None:
        try:
            await self._talk.open(self._talk.chat.conversation)
        except ServerError as error:
            if not is_new(error):
                raise
            self._screen.note("[a new conversation]")

    async def _send(self, text: str) -> None:
        command = parse(text)
        if command is None:
            await self._talk.send(text)
            return
        name, argument = command
        if name != "retry":
            self._screen.sent(text)
        await self._run_command(name, argument)

    # Commands.

    async def _run_command(self, name: str, argument: str) -> None:
        talk = self._talk
        match name:
            case "retry":
                await talk.retry()
            case "model":
                self._choose_model(argument)
            case "system":
                if argument:
                    talk.system = None if argument == OWN else argument
                self._screen.note(f"[system prompt: {talk.system or 'none'}]")
            case "new":
                talk.begin()
            case "list":
                await self._list()
            case "open":
                await self._open(argument)
            case _:
                await self._save(argument, overwrite=name == "save!")

    def _choose_model(self, name: str) -> None:
        known = self._talk.chat.models
        offer = f"the server has: {escape(', '.join(known))}"
        if name not in {"", OWN} and known and name not in known:
            raise CommandError(f"there is no model {name}; {offer}")
        if name:
            self._talk.model = None if name == OWN else name
        own = f"{escape(known[0])}, the server's own" if known else "the server's own"
        self._screen.note(f"[model: {self._talk.model or own}]")
        if known:
            self._screen.note(f"[{offer}]")

    async def _list(self) -> None:
        self._listed = await self._talk.chat.conversations(CONVERSATIONS_SHOWN)
        if not self._listed:
            self._screen.note("[there are no conversations]")
        for number, known in enumerate(self._listed, start=1):
            mark = "*" if known.id == self._talk.chat.conversation else " "
            title = " ".join(known.title.split()) or known.id
            self._screen.note(f"{mark}{number:3} {title} · {age(known.updated)}")

    async def _open(self, which: str) -> None:
        if not re.fullmatch(ID_PATTERN, which):
            if not self._listed:
                self._listed = await self._talk.chat.conversations(CONVERSATIONS_SHOWN)
            numbers = {str(number): c.id for number, c in enumerate(self._listed, start=1)}
            if which not in numbers:
                raise CommandError(f"{which} is neither a number of /list nor an id")
            which = numbers[which]
        await self._talk.open(which)

    async def _save(self, name: str, *, overwrite: bool) -> None:
        try:
            history = await self._talk.chat.history()
        except ServerError as error:
            if is_new(error):
                raise CommandError("there is nothing to save yet") from None
            raise
        try:
            path = files.save(history, name, overwrite=overwrite)
        except FileExistsError:
            raise CommandError(f"{name} exists; /save! {name} overwrites it") from None
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CommandError(f"cannot write {name} ({reason}): choose another file") from None
        self._screen.note(f"[saved {len(history.messages)} messages in {path}]")


def farewell(talk: Talk, options: Options) -> str:
    """Return the lines that tell how to continue the conversation, with the same arguments."""
    words = ["wsserver", "chat"]
    if options.url is not None:
        words.append(options.url)
    # With "=": a value that begins with "-" would look like an option.
    words += [
        f"--{name}={value}"
        for name, value in (("model", options.model), ("system", options.system))
        if value is not None
    ]
    command = shlex.join(words)
    return (
        "To continue this conversation, or the last one:\n"
        f"  {command} --conversation={talk.chat.conversation}\n"
        f"  {command} -c"
    )
