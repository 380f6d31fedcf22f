"""The generations that one client follows, and its open conversations."""

import asyncio
from dataclasses import dataclass, field

from wsserver.connections.cursor import Cursor
from wsserver.connections.session import Session
from wsserver.dialects import Dialect
from wsserver.errors import Code, Refused
from wsserver.generation import State
from wsserver.hub.live import Conversation, Generation
from wsserver.logs import log
from wsserver.protocol import Close, Deleted, Prompt, Renamed

OPEN_CONVERSATIONS = 64  # of one client; each open conversation costs memory


@dataclass(eq=False, slots=True)
class Following:
    """The generations and conversations that one client follows. A watcher of the conversations."""

    _session: Session
    _dialect: Dialect
    # One cursor per generation; the one written longest ago comes first.
    cursors: dict[Generation, Cursor] = field(default_factory=dict)
    own: str | None = None  # id of the conversation for prompts that name none
    _open: tuple[Conversation, ...] = ()  # an empty tuple takes no memory
    _done: asyncio.Future[None] | None = None  # done when the client follows nothing

    # Generations.

    def follow(
        self,
        generation: Generation,
        after: int = 0,
        *,
        limit: int | None = None,
        own: bool = False,
        asked: bool = False,
        shown: bool = False,
        request: str | None = None,
    ) -> None:
        """Write the ``start`` of a generation, and follow it from a piece on.

        Args:
            generation: the generation.
            after: the seq of the last piece that the client has.
            limit: characters of merged text in a frame; None for the setting `frame_size`.
            own: the client sent the prompt; the generation counts towards its limit.
            asked: the client asked for the generation by its id.
            shown: the ``start`` has the prompt, because another client sent it.
            request: the ``request`` of the frame that the ``start`` answers.
        """
        limit = limit or self._session.settings.frame_size
        cursor = self.cursors.get(generation)
        if cursor is None:
            cursor = Cursor(generation, self._session.transport, self._dialect, self, limit)
            self.cursors[generation] = cursor
            self._session.hub.follow(generation, cursor)
        cursor.own = cursor.own or own
        cursor.asked = cursor.asked or own or asked
        cursor.begin(after, limit, shown=shown, request=request)

    def leave(self, cursor: Cursor, *, lost: bool = False) -> None:
        """Stop following a generation.

        Args:
            cursor: the cursor of the generation.
            lost: the connection died, and the client may not have noticed yet.
        """
        del self.cursors[cursor.generation]
        self._session.hub.unfollow(cursor.generation, cursor, lost=lost)
        if not self.cursors and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def wake(self) -> None:
        """Continue to write each generation, the one written longest ago first."""
        for generation, cursor in tuple(self.cursors.items()):
            if not self._session.transport.writable:
                return
            if cursor.behind:
                del self.cursors[generation]
                self.cursors[generation] = cursor
                cursor.wake()

    def merged(self, pieces: int) -> None:
        """Count the pieces of a merged frame."""
        self._session.hub.metrics.pieces_merged(pieces)

    def fail(self, error: Exception) -> None:
        """Close the connection: one of its cursors failed."""
        if not self._session.ended:
            log.error("cursor failed", failure=error)
            self._session.end(Close.INTERNAL_ERROR, "")

    def active(self, prompt: Prompt) -> int:
        """Count the client's own generations, without the ones that a prompt would replace."""
        name = prompt.conversation or self.own
        replaced = name if prompt.on_busy == "interrupt" and prompt.messages is None else None
        return sum(
            cursor.own
            and generation.state in {State.QUEUED, State.RUNNING}
            and (generation.conversation_id is None or generation.conversation_id != replaced)
            for generation, cursor in self.cursors.items()
        )

    async def wait_done(self) -> None:
        """Wait until the client has all terminals, or has disconnected."""
        if self.cursors:
            self._done = asyncio.get_running_loop().create_future()
            await self._done

    # Conversations.

    def check_open(self, conversation: Conversation) -> None:
        """Check that the client may open a conversation.

        Raises:
            Refused: the client has too many conversations open.
        """
        if len(self._open) >= OPEN_CONVERSATIONS and conversation not in self._open:
            message = f"This socket has {OPEN_CONVERSATIONS} conversations open; close one."
            raise Refused(Code.LIMIT, message)

    def open(self, conversation: Conversation) -> None:
        """Follow the running and later generations of a conversation, and make it the own one."""
        self.own = conversation.id
        if conversation not in self._open:
            self._open += (conversation,)
        conversation.watchers[self] = None
        for generation in conversation.live:
            if generation not in self.cursors:
                self.follow(generation, shown=True)

    def close(self, name: str) -> None:
        """Close a conversation: follow only the generations that the client asked for by id."""
        for conversation in self.forget(name):
            conversation.watchers.pop(self, None)
            for cursor in tuple(self.cursors.values()):
                if cursor.generation.conversation is conversation and not cursor.asked:
                    self.leave(cursor)

    def forget(self, name: str) -> list[Conversation]:
        """Forget that a conversation is open, and return it. Its terminals are still written."""
        found = [conversation for conversation in self._open if conversation.id == name]
        self._open = tuple(other for other in self._open if other not in found)
        if self.own == name:
            self.own = None
        return found

    def attach(self, generation: Generation) -> None:
        """Follow a generation that another client started in an open conversation."""
        self.follow(generation, shown=True)

    def renamed(self, conversation: Conversation, title: str) -> None:
        """Send ``renamed``: another client changed the title of an open conversation."""
        self._session.write(Renamed(conversation=conversation.id, title=title))

    def drop(self, conversation: Conversation) -> None:
        """Send ``deleted``: another client deleted an open conversation."""
        self.forget(conversation.id)
        self._session.write(Deleted(conversation=conversation.id))

    def detach(self, *, lost: bool) -> None:
        """Stop following everything: the client has disconnected."""
        for conversation in self._open:
            conversation.watchers.pop(self, None)
        self._open = ()
        for cursor in tuple(self.cursors.values()):
            self.leave(cursor, lost=lost)
