"""Copies of generations that other nodes run. The clients of this node follow the copies.

A mirror has a log of its own, which receives what the owner's log has. A message that was lost
shows as a gap in `seq`, or in the answer to a probe; the owner then sends the rest again. A message
that comes twice changes nothing.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wsserver.cluster.peers import Body, Peers
from wsserver.hub.live import Generation
from wsserver.limits import Account, Memory, account_of, memory_size
from wsserver.pieces import Pieces
from wsserver.protocol import Terminal
from wsserver.stores.records import dump_prompt, parse_prompt, parse_terminal

ACKNOWLEDGE = 65_536  # characters after which the owner is told
PROBE = 1.0  # seconds of silence after which a mirror asks whether it has lost something


def facts_of(generation: Generation) -> Body:
    """Return what another node has to know of a generation, besides its log."""
    return {
        "owner": generation.owner,
        "id": generation.id,
        "prompt": dump_prompt(generation.prompt),
        "model": generation.model,
        "conversation": generation.conversation_id,
        "queued": generation.queued,
        "seq": generation.log.seq,
    }


@dataclass(eq=False, slots=True)
class Mirror:
    """The copy of one generation."""

    generation: Generation
    node: str
    handle: int
    since: float  # when it was made, by the event loop's clock
    account: Account  # pays for the `memory` bytes
    memory: int = 0
    unacknowledged: int = 0  # characters
    silent: bool = False  # nothing has come since the last probe
    unused: bool = False  # no client here followed it at the last probe


class Mirrors:
    """The mirrors of this node.

    Args:
        peers: sends to the owners.
        memory: counts the bytes of the logs.
        on_ended: called with a generation whose mirror has its terminal.
        on_unused: called with a generation that no client here has followed for a while; has to
            call :meth:`unfollow`.
    """

    def __init__(
        self,
        peers: Peers,
        memory: Memory,
        on_ended: Callable[[Generation], None],
        on_unused: Callable[[Generation], None],
    ) -> None:
        self._peers = peers
        self._memory = memory
        self._on_ended = on_ended
        self._on_unused = on_unused
        self._handles = itertools.count(1)
        self._by_handle: dict[int, Mirror] = {}
        self._by_key: dict[tuple[str, str], Mirror] = {}
        peers.listeners["run"] = self._receive
        self._probe: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, node: str, facts: Body) -> Generation:
        """Follow a generation of another node that this node does not follow yet.

        Args:
            node: the id of the node.
            facts: see :func:`facts_of`.
        """
        generation = Generation(
            facts["id"],
            facts["owner"],
            parse_prompt(facts["prompt"]),
            facts["model"],
            facts["conversation"],
            node=node,
            place=facts["queued"],
            reached=facts["seq"],
        )
        now, account = asyncio.get_running_loop().time(), account_of(generation.owner)
        mirror = Mirror(generation, node, next(self._handles), now, account)
        self._count(mirror, generation.prompt_size)
        self._by_key[generation.owner, generation.id] = mirror
        self._follow(mirror)
        return generation

    def open(self) -> None:
        """Begin to probe silent mirrors, and to end unused ones."""
        self._probe = asyncio.get_running_loop().call_later(PROBE, self._probe_all)

    def close(self) -> None:
        """Probe no more. Idempotent."""
        if self._probe is not None:
            self._probe.cancel()

    def _probe_all(self) -> None:
        """Tell the owners of silent mirrors what the mirrors have: a message may be lost.

        Follow no longer what no client here has followed for a while.
        """
        for mirror in tuple(self._by_key.values()):
            if mirror.unused and not mirror.generation.readers:
                self._on_unused(mirror.generation)
                continue
            if mirror.silent:
                self._ask(mirror)
            mirror.silent, mirror.unused = True, not mirror.generation.readers
        self.open()

    def unfollow(self, generation: Generation, *, lost: bool, grace: float | None) -> None:
        """Follow a generation no longer: it has no clients here.

        Args:
            generation: the generation.
            lost: the last client may not have noticed yet that its connection died.
            grace: seconds in which the clients can come back; None for the setting.
        """
        mirror = self._by_key.get((generation.owner, generation.id))
        if mirror is not None and mirror.generation is generation:
            self._forget(mirror)
            self._peers.tell(
                mirror.node, "unfollow", {"h": mirror.handle, "lost": lost, "grace": grace}
            )

    def follow_again(self) -> None:
        """Ask for what was lost: the bus was away."""
        for mirror in tuple(self._by_key.values()):
            self._follow(mirror)

    def named(self, node: str, handle: int) -> Generation | None:
        """Return the generation of a mirror, as its owner names it."""
        mirror = self._by_handle.get(handle)
        return None if mirror is None or mirror.node != node else mirror.generation

    def orphans(self, nodes: frozenset[str], since: float) -> list[Generation]:
        """Return the generations of nodes that had left the cluster at a time."""
        return [
            mirror.generation
            for mirror in self._by_key.values()
            if mirror.since < since and mirror.node not in nodes
        ]

    def end(self, generation: Generation, pieces: Pieces, terminal: Terminal) -> None:
        """End a mirror whose node has left the cluster.

        Args:
            generation: the mirror's generation.
            pieces: the pieces that the store has. If the node has died, they may be fewer than
                those of the mirror.
            terminal: the end that the store has.
        """
        mirror = self._by_key.get((generation.owner, generation.id))
        if mirror is None or mirror.generation is not generation:
            return
        log = generation.log
        log.extend(pieces.after(log.seq))
        self._end(mirror, terminal.model_copy(update={"seq": log.seq}))

    def _follow(self, mirror: Mirror) -> None:
        """Ask the owner for everything after what the mirror has, under a new handle."""
        self._by_handle.pop(mirror.handle, None)
        mirror.handle, mirror.unacknowledged = next(self._handles), 0
        self._by_handle[mirror.handle] = mirror
        self._ask(mirror)

    def _ask(self, mirror: Mirror) -> None:
        generation = mirror.generation
        body = {
            "h": mirror.handle,
            "owner": generation.owner,
            "id": generation.id,
            "after": generation.log.seq,
        }
        self._peers.tell(mirror.node, "follow", body)

    def _forget(self, mirror: Mirror) -> None:
        self._by_handle.pop(mirror.handle, None)
        self._by_key.pop((mirror.generation.owner, mirror.generation.id), None)
        self._memory.release(mirror.account, mirror.memory)
        mirror.memory = 0

    def _count(self, mirror: Mirror, size: int) -> bool:
        """Count bytes of a mirror; return False if there is no memory for them."""
        if not self._memory.acquire(mirror.account, size):
            return False
        mirror.memory += size
        return True

    def _receive(self, node: str, body: dict[str, Any]) -> None:
        mirror = self._by_handle.get(body["h"])
        if mirror is None:  # the message that this node follows no longer was lost
            unfollow = {"h": body["h"], "lost": False, "grace": None}
            self._peers.tell(node, "unfollow", unfollow)
            return
        if mirror.node != node:
            return
        mirror.silent = False
        log, after = mirror.generation.log, body["a"]
        if after > log.seq:  # a message was lost
            self._follow(mirror)
            return
        pieces = Pieces()
        for kind, block, data in body["r"]:
            pieces.extend(kind, block, data)
        new = pieces.after(log.seq - after)
        if len(new):
            if not self._count(mirror, sum(map(memory_size, new.data))):
                return  # as if the message was lost: the mirror asks again later
            log.extend(new)
            mirror.unacknowledged += sum(map(len, new.data))
        if mirror.unacknowledged >= ACKNOWLEDGE:
            mirror.unacknowledged = 0
            self._peers.tell(node, "ack", {"h": mirror.handle, "s": log.seq})
        if "e" in body:
            terminal = parse_terminal(body["e"], mirror.generation.id)
            if body.get("saved") is False:
                terminal = terminal.model_copy(update={"saved": False})
            self._end(mirror, terminal)

    def _end(self, mirror: Mirror, terminal: Terminal) -> None:
        self._forget(mirror)
        mirror.generation.restore(terminal)
        self._on_ended(mirror.generation)
