"""Decides on the limits of owners and accounts as one server would."""

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from wsserver.cluster.membership import Membership
from wsserver.errors import Code, Refused, StoreError
from wsserver.generation import State
from wsserver.hub.elsewhere import Running
from wsserver.hub.live import Generation
from wsserver.limits import Account
from wsserver.logs import log
from wsserver.stores.postgres.reservations import Locked, Reservations
from wsserver.stores.postgres.store import PostgresStore


class Use:
    """What an owner and an account use, for one decision; see :mod:`wsserver.hub.elsewhere`."""

    def __init__(self, locked: Locked) -> None:
        self.locked = locked
        self.used = locked.used
        self.booked: tuple[Generation, list[float]] | None = None

    def reserve(self, generation: Generation, prompts: list[float]) -> None:
        """Count a generation that was accepted."""
        self.booked = generation, prompts


class Uses:
    """The use of all owners and accounts.

    Args:
        store: the store that all nodes share.
        spawn: runs a coroutine until the node leaves.
    """

    def __init__(
        self, store: PostgresStore, spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self._reservations = Reservations(store)
        self._spawn = spawn

    @contextlib.asynccontextmanager
    async def of(
        self, owner: str, account: Account, name: str, membership: Membership
    ) -> AsyncIterator[Use]:
        """Lock what an owner and an account use, until the decision on a prompt is saved.

        Args:
            owner: the owner of the prompt.
            account: the account whose limits apply.
            name: the id of the generation.
            membership: this node.

        Raises:
            Running: another node runs the generation.
            Refused: this node is cut off from the others.
            StoreError: the database cannot be used now.
        """
        async with contextlib.AsyncExitStack() as stack:
            locked = await stack.enter_async_context(self._reservations.lock(owner, account, name))
            if locked.node not in {None, membership.node}:
                raise Running(locked.node)
            if not membership.alive:
                raise Refused(Code.UNAVAILABLE)
            use = Use(locked)
            yield use
            if use.booked is not None:  # the client does not wait for this
                self._spawn(self._save(use, *use.booked, membership.node, stack.pop_all()))

    async def node_of(self, owner: str, name: str) -> str | None:
        """Return the node that runs a generation, even one that the store does not have yet."""
        return await self._reservations.node_of(owner, name)

    async def _save(
        self,
        use: Use,
        generation: Generation,
        prompts: list[float],
        node: str,
        locks: contextlib.AsyncExitStack,
    ) -> None:
        """Save a reservation, and let the others decide."""
        try:
            async with locks:
                await use.locked.reserve(generation.id, node, generation.reserved, prompts)
        except StoreError as error:
            log.warning("reply not reserved", id=generation.id, reason=str(error))
            return
        if generation.state in {State.SAVING, State.ENDED}:  # its end was perhaps saved before
            await self._remove(generation)

    def remove(self, generation: Generation) -> None:
        """Count a generation no longer: its end cannot be saved."""
        self._spawn(self._remove(generation))

    async def _remove(self, generation: Generation) -> None:
        with contextlib.suppress(StoreError):  # the reservation ends with the node at the latest
            await self._reservations.remove(generation.owner, generation.id)
