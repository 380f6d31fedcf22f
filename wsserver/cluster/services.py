"""What a node does when other nodes ask it: accept a prompt, list, send or stop replies, delete.

The node that has a conversation decides, as for a client of its own.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from wsserver.cluster.mirrors import facts_of
from wsserver.cluster.peers import Body, Peers
from wsserver.cluster.readers import Readers
from wsserver.errors import Code, Refused, StoreError
from wsserver.generation import State
from wsserver.hub.elsewhere import Moved
from wsserver.hub.hub import Hub
from wsserver.hub.live import Conversation, Generation
from wsserver.protocol import Prompt
from wsserver.stores.records import parse_prompt


@dataclass(eq=False, slots=True)
class _End:
    """Waits for the end of a generation."""

    generation: Generation
    ended: "asyncio.Future[None]"

    def wake(self) -> None:
        if self.generation.log.terminal is not None and not self.ended.done():
            self.ended.set_result(None)


class Services:
    """Answers the requests of other nodes.

    Args:
        peers: receives the requests.
        hub: has the generations and conversations of this node.
        readers: send the logs.
        spawn: runs a coroutine until the node leaves.
    """

    def __init__(
        self,
        peers: Peers,
        hub: Hub,
        readers: Readers,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._peers = peers
        self._hub = hub
        self._readers = readers
        self._spawn = spawn
        peers.handlers.update(
            prompt=self._accept, stop=self._stop, live=self._list, delete=self._delete
        )
        peers.listeners["follow"] = self._follow

    async def _accept(self, _: str, body: Body) -> Body:
        """Accept a prompt; answer with its generation, or that this node does not decide."""
        prompt, owner = parse_prompt(body["prompt"]), body["owner"]
        try:
            generation = await self._hub.scheduler.accept(
                prompt, owner, tuple(body["account"]), body["conversation"], None, forwarded=True
            )
        except Moved:
            return {"moved": True}
        except Refused as refused:
            if refused.code is not Code.SHUTTING_DOWN:
                raise
            self._check_leaving(prompt, self._hub.conversations.known(owner, body["conversation"]))
            return {"leaving": True}
        return facts_of(generation)

    def _check_leaving(self, prompt: Prompt, conversation: Conversation | None) -> None:
        """Prepare a conversation for its next node, which gets the prompt: this one leaves.

        Raises:
            Refused: the conversation is busy, and the prompt does not wait.
        """
        if conversation is None or not conversation.busy:
            return
        if prompt.on_busy == "reject":
            raise Refused(Code.BUSY)
        if prompt.on_busy == "interrupt":
            for generation in reversed(conversation.live):
                self._hub.stop(generation, "replaced")

    async def _stop(self, _: str, body: Body) -> Body:
        """Stop a generation; answer after its request to the model is closed."""
        generation = self._hub.known(body["owner"], body["id"])
        if generation is None or generation.node is not None:
            return {}
        self._hub.stop(generation, "client")
        if generation.state is not State.ENDED:
            end = _End(generation, asyncio.get_running_loop().create_future())
            generation.log.followers.append(end)
            try:
                await end.ended
            finally:
                generation.log.followers.remove(end)
        return {}

    async def _list(self, _: str, body: Body) -> Body:
        """Answer with the generations here of a conversation, of an id, or of an unstored chat.

        ``late`` tells whether replies of the conversation are not saved yet.
        """
        found: Sequence[Generation | None]
        late = False
        if "conversation" in body:
            key = body["owner"], body["conversation"]
            conversation = self._hub.conversations.known(*key)
            late = self._hub.journal.has_late(*key)
            found = [] if conversation is None else conversation.live
        elif "id" in body:
            found = [self._hub.known(body["owner"], body["id"])]
        else:
            found = [self._hub.known_unstored(body["owner"], body["chat"])]
        own = (each for each in found if each is not None and each.node is None)
        return {"live": [facts_of(generation) for generation in own], "late": late}

    def _follow(self, node: str, body: Body) -> None:
        """Send the log of a generation to a node that has a mirror of it."""
        if not (isinstance(body["h"], int) and isinstance(body["after"], int)) or body["after"] < 0:
            raise ValueError("no such handle, or no such piece")
        generation = self._hub.known(body["owner"], body["id"])
        if generation is not None and generation.node is None:
            self._readers.add(node, body["h"], generation, body["after"])
            return
        self._spawn(self._follow_stored(node, body))

    async def _follow_stored(self, node: str, body: Body) -> None:
        """Send a reply that has ended, and is only in the store by now, or nowhere."""
        try:
            generation = await self._hub.retention.find(body["owner"], body["id"], ())
        except StoreError:
            return  # the node asks again
        except Refused as refused:
            if refused.code is not Code.FORGOTTEN:
                return
            generation = None
        if generation is None:
            self._peers.tell(node, "gone", {"h": body["h"]})
        elif generation.node is None:
            self._readers.add(node, body["h"], generation, body["after"])

    async def _delete(self, _: str, body: Body) -> Body:
        await self._hub.delete(body["owner"], body["conversation"])
        return {}
