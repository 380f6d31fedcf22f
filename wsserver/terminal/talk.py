"""One conversation on the screen: sends prompts and shows replies and messages."""

import asyncio
import contextlib

from wsserver.client import (
    Chat,
    ConnectionFailed,
    History,
    Message,
    Reply,
    ReplyError,
    ServerError,
    State,
    new_id,
)
from wsserver.errors import Code
from wsserver.terminal.plain_screen import PlainScreen
from wsserver.terminal.reasons import Reasons
from wsserver.terminal.screen import Screen
from wsserver.terminal.views import View
from wsserver.terminal.wording import (
    describe_cost,
    describe_error,
    describe_partial,
    describe_thought,
    quoted,
)

MESSAGES_SHOWN = 6  # of a conversation that continues


class Talk:
    """The conversation of a dialogue.

    Args:
        chat: the connection.
        screen: shows everything.
        model: the model of the next prompts; None for the server's own.
        system: the system prompt of the next prompts.
        reasons: of failed replies, if the user is the operator of the server.

    Attributes:
        used: whether the server has the conversation, so that it can be continued.
    """

    def __init__(
        self,
        chat: Chat,
        screen: Screen | PlainScreen,
        model: str | None,
        system: str | None,
        reasons: Reasons,
    ) -> None:
        self.chat = chat
        self.model = model
        self.system = system
        self.used = False
        self._screen = screen
        self._reasons = reasons
        self._last: tuple[str, str | None] | None = None  # the last prompt, and the id of its turn
        self._reply: Reply | None = None  # the reply on the screen
        self._showing: asyncio.Future[None] | None = None
        self._was_lost = False

    # Prompts.

    async def send(self, prompt: str, *, retry_of: str | None = None) -> None:
        """Send a prompt and show its reply.

        Raises:
            ConnectionFailed: there will be no connection again.
        """
        self._screen.sent(prompt)
        try:
            reply = self.chat.prompt(
                prompt,
                on_busy="queue",  # behind the prompts of other clients
                retry_of=retry_of,
                model=self.model,
                system=self.system,
            )
        except ValueError:
            self._screen.note("[this cannot be sent as text]")
            return
        try:
            await self._show(reply)
        finally:
            self.used |= reply.started
        # A refused prompt creates no turn, so a retry still replaces the turn before.
        self._last = prompt, reply.id if reply.started else retry_of

    async def retry(self) -> None:
        """Send the last prompt again. The new turn replaces the old one."""
        if self._last is None:
            self._screen.note("[there is no prompt to repeat]")
            return
        prompt, turn = self._last
        await self.send(prompt, retry_of=turn)

    def interrupt(self) -> bool:
        """Stop the reply on the screen; the second time, do not wait for its end.

        Return whether there is a reply.
        """
        if self._reply is None or self._showing is None:
            return False
        if self._reply.stopping:
            self._showing.cancel()
        self._reply.request_stop()
        self._screen.redraw()
        return True

    # Conversations.

    def begin(self) -> None:
        """Begin a new conversation."""
        self.chat.conversation, self._last, self.used = new_id(), None, False
        self._screen.note("[a new conversation]")

    async def open(self, conversation: str) -> None:
        """Continue a conversation. Show its last messages, and the replies that run.

        Raises:
            ServerError: the server has no such conversation, or cannot read it now.
            ConnectionFailed: there is no connection.
        """
        history = await self.chat.history(conversation)
        self.chat.conversation, self._last, self.used = conversation, None, True
        self._screen.note(f"[{history.title}]")
        left_out = len(history.messages) - MESSAGES_SHOWN
        if left_out > 0:
            self._screen.note(f"[{left_out} earlier messages]")
        for message in history.messages[-MESSAGES_SHOWN:]:
            self._show_message(message)
        for name in history.running:
            await self._show(self.chat.resume(name))
        if history.running:  # the history has the prompts of replies that have ended
            with contextlib.suppress(ServerError):
                history = await self.chat.history(conversation)
        self._last = _last_prompt(history)

    def _show_message(self, message: Message) -> None:
        if message.role == "user":
            self._screen.note(quoted(message.text))
            return
        if message.thinking:
            self._screen.note(describe_thought(message.thinking, message.thought or 0.0))
        self._screen.show(message.text)
        if message.partial:
            self._screen.note(f"[{describe_partial(message.partial)}]")
        if message.model or message.usage:
            self._screen.note(describe_cost(message.model, message.usage))

    # Replies.

    async def _show(self, reply: Reply) -> None:
        """Show a reply until its end.

        Raises:
            ConnectionFailed: there will be no connection again.
        """
        view = self._screen.view(reply)
        self._reply, self._showing = reply, asyncio.ensure_future(_follow(reply, view))
        try:
            await asyncio.wait({self._showing})
        finally:
            self._showing.cancel()
            self._reply = self._showing = None
            view.close()
        mark = await self._describe_end(reply) if reply.over else "[gave up waiting for the end]"
        if mark:
            self._screen.note(mark)
        if reply.usage:
            self._screen.note(describe_cost(reply.model, reply.usage))

    async def _describe_end(self, reply: Reply) -> str:
        """Return the line about an end that is not the model's own; else an empty text."""
        try:
            done = await reply.done()
        except ReplyError as error:
            repeats = "; /retry repeats it" if error.retryable else ""
            return f"[{describe_error(error, self._reasons.of(error))}{repeats}]"
        except ConnectionFailed as failure:
            if failure.final:
                raise
            return f"[{describe_error(failure)}; the text so far is kept]"
        mark = ""
        if done.reason == "stopped":
            mark = f"[{describe_partial(done.by or 'client')}]"
        elif done.reason == "max_tokens":
            mark = "[the reply reached its maximum length]"
        return mark if done.saved else mark + "[not saved]"

    def show_state(self, state: State) -> None:
        """Tell that the connection is lost, or that it is open again."""
        if state is State.LOST:
            self._was_lost = True
            replying = self._reply is not None
            kept = " The text so far stays; Ctrl-C twice gives up." if replying else ""
            self._screen.note(f"[connection lost, trying again…{kept}]")
        elif state is State.OPEN and self._was_lost:
            self._was_lost = False
            self._screen.note("[connected again]")


async def _follow(reply: Reply, view: View) -> None:
    async def think() -> None:
        async for thinking in reply.thinking:
            view.think(thinking)

    async def say() -> None:
        with contextlib.suppress(ServerError, ConnectionFailed):  # `Reply.done` raises it again
            async for text in reply:
                view.say(text)

    # In this order: of a thought and a text that arrive together, the view gets the thought first.
    await asyncio.gather(think(), say())


def _last_prompt(history: History) -> tuple[str, str | None] | None:
    asked = [message for message in history.messages if message.role == "user"]
    return (asked[-1].text, asked[-1].id) if asked else None


def is_new(error: ServerError) -> bool:
    """Return whether an error only says that the server has no such conversation."""
    return error.code == Code.NOT_FOUND
