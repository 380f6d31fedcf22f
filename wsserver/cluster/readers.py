"""Sends the logs of this node's generations to nodes that follow them.

A reader is a follower of a log with a cursor, as a socket is. It has a bound on the bytes that the
other node has not acknowledged. Nothing is encoded when a piece arrives: when the bus is about to
send, each reader with new pieces adds one message with all of them.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wsserver.cluster.peers import Peers
from wsserver.hub.hub import Hub
from wsserver.hub.live import Generation
from wsserver.logs import log
from wsserver.stores.records import dump_terminal

WINDOW = 262_144  # characters that a node has not acknowledged
LONGEST_RUN = 65_536  # characters of one message, so that one reply does not delay others


@dataclass(eq=False, slots=True)
class Reader:
    """Follows one log for one node.

    Attributes:
        node: the id of the node.
        handle: the number by which the node knows the generation.
        sent: the seq of the last piece that was sent.
        since: when the node asked, by the event loop's clock.
    """

    node: str
    handle: int
    generation: Generation
    sent: int
    since: float
    _dirty: dict["Reader", None]
    _request_flush: Callable[[], None]
    unacknowledged: int = 0
    # The seq and the size of what was sent, in a few parts.
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def wake(self) -> None:
        """Send the new pieces with the next message of the bus."""
        if self not in self._dirty:
            self._dirty[self] = None
            self._request_flush()


class Readers:
    """The readers of all other nodes.

    Args:
        peers: sends to the nodes.
        hub: has the generations.
    """

    def __init__(self, peers: Peers, hub: Hub) -> None:
        self._peers = peers
        self._hub = hub
        self._readers: dict[tuple[str, int], Reader] = {}
        self._dirty: dict[Reader, None] = {}
        peers.bus.on_flush = self._flush
        peers.listeners["ack"] = self._acknowledge
        peers.listeners["unfollow"] = self._unfollow

    def __len__(self) -> int:
        return len(self._readers)

    def add(self, node: str, handle: int, generation: Generation, after: int) -> None:
        """Send a log from a piece on.

        The node may ask again: it has lost something, or this node has lost what acknowledges.
        """
        known = self._readers.get((node, handle))
        if known is not None:
            known.sent, known.unacknowledged = after, 0
            known.sizes.clear()
            known.wake()
            return
        for old in [r for r in self._readers.values() if r.node == node]:
            if old.generation is generation:  # the node follows again, after a loss
                self._remove(old)
        now, flush = asyncio.get_running_loop().time(), self._peers.bus.request_flush
        reader = Reader(node, handle, generation, after, now, self._dirty, flush)
        self._readers[node, handle] = reader
        self._hub.follow(generation, reader)
        reader.wake()

    def check(self, nodes: frozenset[str], since: float) -> None:
        """Remove the readers of nodes that had left the cluster at a time.

        Tell the other nodes what they have got: one of them may follow no longer.
        """
        for reader in tuple(self._readers.values()):
            if reader.since < since and reader.node not in nodes:
                self._remove(reader, lost=True)
            else:
                body = {"h": reader.handle, "a": reader.sent, "r": []}
                self._peers.tell(reader.node, "run", body)

    def _remove(self, reader: Reader, *, lost: bool = False, grace: float | None = None) -> None:
        if self._readers.pop((reader.node, reader.handle), None) is not None:
            self._dirty.pop(reader, None)
            self._hub.unfollow(reader.generation, reader, lost=lost, grace=grace)

    def _unfollow(self, node: str, body: dict[str, Any]) -> None:
        reader = self._readers.get((node, body["h"]))
        if reader is not None:
            self._remove(reader, lost=body["lost"], grace=body["grace"])

    def _acknowledge(self, node: str, body: dict[str, Any]) -> None:
        reader = self._readers.get((node, body["h"]))
        if reader is None:
            return
        while reader.sizes and reader.sizes[0][0] <= body["s"]:
            reader.unacknowledged -= reader.sizes.pop(0)[1]
        reader.wake()

    def _flush(self) -> None:
        """Add a message of each reader that has something to send."""
        dirty = tuple(self._dirty)
        self._dirty.clear()
        for reader in dirty:
            try:
                self._send(reader)
            except Exception as error:  # noqa: BLE001 - without the bus this node says nothing more
                log.error("reply not sent to another node", other=reader.node, failure=error)

    def _send(self, reader: Reader) -> None:
        source = reader.generation.log
        runs: list[tuple[str, int, list[str]]] = []
        after, size = reader.sent, 0
        if reader.unacknowledged < WINDOW:
            for kind, block, data in source.pieces.runs(after):
                taken = []
                for piece in data:
                    taken.append(piece)
                    size += len(piece)
                    if size >= LONGEST_RUN:
                        break
                runs.append((kind, block, taken))
                reader.sent += len(taken)
                if size >= LONGEST_RUN:
                    break
        whole = reader.sent == source.seq
        terminal = source.terminal if whole else None
        if not runs and terminal is None:
            return
        body: dict[str, Any] = {"h": reader.handle, "a": after, "r": runs}
        if terminal is not None:
            body["e"] = dump_terminal(terminal)
            if terminal.saved is False:
                body["saved"] = False
        self._peers.tell(reader.node, "run", body)
        if terminal is not None:
            self._remove(reader)
            return
        reader.unacknowledged += size
        if reader.sizes and reader.sizes[-1][1] < LONGEST_RUN // 4:
            size += reader.sizes.pop()[1]
        reader.sizes.append((reader.sent, size))
        if not whole and reader.unacknowledged < WINDOW:
            reader.wake()
