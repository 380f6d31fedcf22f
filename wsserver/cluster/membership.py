"""Keeps this node alive in the cluster, and buries nodes that died."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from wsserver.errors import StoreError
from wsserver.logs import log
from wsserver.stores.base import Fenced
from wsserver.stores.postgres.nodes import Nodes
from wsserver.stores.postgres.store import PostgresStore

MARGIN = 0.1  # part of a life: this node stops its replies so long before the others may bury it
SOONEST = 0.05  # seconds between two renewals at least


class Membership:
    """Renews the life of a node.

    A node that cannot renew in time must assume that the others have buried it, and that they run
    its conversations. It therefore ends its replies a little earlier, by its own monotonic clock,
    which also goes on while the process is stopped.

    Args:
        store: the store of the node.
        life: seconds for which a renewal holds.
        on_lost: called when the node has to end all its replies. Must not raise.
        on_fenced: called when the others have buried the node. Must not raise.
        on_others: called with the ids of the other nodes, and with the time of the event loop's
            clock from before they were read. The replies of nodes that are missing have ended.
            Must not raise.
    """

    def __init__(
        self,
        store: PostgresStore,
        life: float,
        *,
        on_lost: Callable[[], None],
        on_fenced: Callable[[], None],
        on_others: Callable[[frozenset[str], float], None],
    ) -> None:
        self.nodes = Nodes(store, "", life)  # set by `open`
        self.others: frozenset[str] = frozenset()
        self._store = store
        self._life = life
        self._on_lost = on_lost
        self._on_fenced = on_fenced
        self._on_others = on_others
        self._loop = asyncio.get_running_loop()
        self._deadline = 0.0  # until when this node is alive for certain, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._soon = asyncio.Event()
        self.buried = False  # the others have buried this node

    @property
    def alive(self) -> bool:
        """Whether no other node can have buried this one. It is checked before each write."""
        return self._loop.time() < self._deadline

    @property
    def node(self) -> str:
        """The id of this node."""
        return self.nodes.node

    async def open(self, node: str) -> None:
        """Join the cluster, also again after the others have buried this node.

        Args:
            node: the id of this node, which no node has had before.

        Raises:
            StoreError: the database cannot be used.
        """
        self.nodes, self.buried = Nodes(self._store, node, self._life), False
        await self.nodes.join()
        began = self._loop.time()
        self.others = (await self.nodes.renew()).alive
        self._extend(began)
        self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """Leave the cluster: all replies have ended. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task})
        if not self.buried:
            with contextlib.suppress(StoreError):
                await self.nodes.leave()

    def look(self) -> None:
        """Look at the other nodes now: one of them has left."""
        self._soon.set()

    async def _run(self) -> None:
        wait = self._life / 3
        told = ""  # the failure that was logged last; a renewal fails each second of an outage
        while not self.buried:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._soon.wait()
            self._soon.clear()
            began = self._loop.time()
            try:
                others = await self.nodes.renew()
            except Fenced:
                self.buried = True
                log.error("node buried")
                self._lose()
                self._on_fenced()
                return
            except StoreError as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("lease not renewed", reason=told)
                wait = min(1.0, self._life / 10)
                continue
            if told:
                told = ""
                log.warning("lease renewed again")
            self._extend(began)
            self.others = others.alive
            try:
                self._on_others(others.alive | await self._bury(others.late), began)
            except Exception as error:  # noqa: BLE001 - without this task the node would be buried
                log.error("other nodes not checked", failure=error)
            wait = self._life / 3
            if others.next is not None:  # look again when the next node may have died
                wait = min(wait, max(SOONEST, others.next))

    async def _bury(self, late: Sequence[str]) -> frozenset[str]:
        """Bury nodes that did not renew; return those that are not buried after all."""
        left = set(late)
        for node in late:
            try:
                if await self.nodes.bury(node):
                    log.warning("node died", other=node)
                    left.discard(node)
            except StoreError as error:
                log.warning("node not buried", other=node, reason=str(error))
        return frozenset(left)

    def _extend(self, began: float) -> None:
        """The node is alive for a life from the time at which the renewal began."""
        self._deadline = began + self._life * (1 - MARGIN)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._deadline, self._lose)

    def _lose(self) -> None:
        """The node may be buried now: end all its replies."""
        self._deadline = 0.0
        self._on_lost()
