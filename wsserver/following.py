"""What one client follows: generations, and the conversations that it has open."""

import asyncio
from dataclasses import dataclass, field

from wsserver.cursor import Cursor
from wsserver.dialects import Dialect
from wsserver.errors import Code, Refused
from wsserver.generation import State
from wsserver.live import Conversation, Generation
from wsserver.logs import log
from wsserver.protocol import Close, Deleted, Prompt, Renamed
from wsserver.session import Session

OPEN_CONVERSATIONS = 64  # of one client: more than a person has tabs, and each costs memory


@dataclass(eq=False, slots=True)
class Following:
    """The generations and conversations that one client follows. A watcher of the conversations."""

    _session: Session
    _dialect: Dialect
    # The client's place in each generation; the one served longest ago comes first.
    cursors: dict[Generation, Cursor] = field(default_factory=dict)
    own: str | None = None  # id of the conversation that goes on where a prompt names none
    _open: tuple[Conversation, ...] = ()  # which takes no memory while it is empty
    _done: asyncio.Future[None] | None = None  # done when nothing is followed any more

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
            generation: which one.
            after: the seq of the last piece that the client has.
            limit: characters that a frame may merge; None for those of the settings.
            own: the client sent the prompt, which counts as one of its generations.
            asked: the client asked for the generation by its id.
            shown: the client does not know the prompt yet.
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
        """Follow a generation no more.

        Args:
            cursor: the cursor in that generation.
            lost: the connection died, and the client may not know yet.
        """
        del self.cursors[cursor.generation]
        self._session.hub.unfollow(cursor.generation, cursor, lost=lost)
        if not self.cursors and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def wake(self) -> None:
        """Go on writing each generation, the one served longest ago first."""
        for generation, cursor in tuple(self.cursors.items()):
            if not self._session.transport.writable:
                return
            if cursor.behind:
                del self.cursors[generation]
                self.cursors[generation] = cursor
                cursor.wake()

    def merged(self, pieces: int) -> None:
        """Count the pieces of a frame that has several."""
        self._session.hub.metrics.pieces_merged(pieces)

    def fail(self, error: Exception) -> None:
        """Close the connection, as one of its cursors has failed."""
        if not self._session.ended:
            log.error("cursor failed", failure=error)
            self._session.end(Close.INTERNAL_ERROR, "")

    def active(self, prompt: Prompt) -> int:
        """Count the client's own generations, without those that a prompt would replace."""
        name = prompt.conversation or self.own
        replaced = name if prompt.on_busy == "interrupt" and prompt.messages is None else None
        return sum(
            cursor.own
            and generation.state in {State.QUEUED, State.RUNNING}
            and (generation.conversation_id is None or generation.conversation_id != replaced)
            for generation, cursor in self.cursors.items()
        )

    async def wait_done(self) -> None:
        """Wait until the client has all that it follows, terminals included, or is gone."""
        if self.cursors:
            self._done = asyncio.get_running_loop().create_future()
            await self._done

    # Conversations.

    def check_open(self, conversation: Conversation) -> None:
        """Pass a conversation that the client may open.

        Raises:
            Refused: the client has too many conversations open.
        """
        if len(self._open) >= OPEN_CONVERSATIONS and conversation not in self._open:
            message = f"This socket has {OPEN_CONVERSATIONS} conversations open; close one."
            raise Refused(Code.LIMIT, message)

    def open(self, conversation: Conversation) -> None:
        """Follow what runs in a conversation, now and later. The client's next prompts go there."""
        self.own = conversation.id
        if conversation not in self._open:
            self._open += (conversation,)
        conversation.watchers[self] = None
        for generation in conversation.live:
            if generation not in self.cursors:
                self.follow(generation, shown=True)

    def close(self, name: str) -> None:
        """Follow nothing more in a conversation but what the client asked for by id."""
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
        """Follow a generation that another client asked for in an open conversation."""
        self.follow(generation, shown=True)

    def renamed(self, conversation: Conversation, title: str) -> None:
        """Tell the title that another client gave an open conversation."""
        self._session.write(Renamed(conversation=conversation.id, title=title))

    def drop(self, conversation: Conversation) -> None:
        """Tell that another client deleted an open conversation."""
        self.forget(conversation.id)
        self._session.write(Deleted(conversation=conversation.id))

    def detach(self, *, lost: bool) -> None:
        """The client is gone: follow nothing more."""
        for conversation in self._open:
            conversation.watchers.pop(self, None)
        self._open = ()
        for cursor in tuple(self.cursors.values()):
            self.leave(cursor, lost=lost)
