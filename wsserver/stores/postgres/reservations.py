"""What owners and accounts use on all nodes of a cluster, in PostgreSQL.

The node that decides on a prompt locks the use of its owner and its account, decides, and adds the
accepted generation. When the end of the generation is saved, the store replaces the reservation by
the cost, in one transaction. The reservations of a dead node end with the node.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from wsserver.limits import Account
from wsserver.prices import NOTHING, Spent
from wsserver.stores.base import Used
from wsserver.stores.postgres.store import PostgresStore


class Locked:
    """The use of an owner and an account, which no other node can change until the end.

    Attributes:
        used: what they use.
        node: the node that runs the generation already; None if none does.
    """

    def __init__(self, connection: Any, owner: str, account: Account, row: Any) -> None:
        self._connection = connection
        self._owner = owner
        self._account = account
        self.node: str | None = row["node"]
        kept = zip(account, row["prompts"], row["times"], strict=True)
        self.used = Used(
            row["now"],
            dict(zip(account, row["held"], strict=True)),
            {key: (left, at) for key, left, at in kept if left is not None},
            NOTHING if row["tokens"] is None else Spent(row["tokens"], row["microdollars"]),
            Spent(row["reserved_tokens"], row["reserved_microdollars"]),
        )

    async def reserve(self, name: str, node: str, cost: Spent, prompts: list[float]) -> None:
        """Add a generation.

        Args:
            name: the id of the generation.
            node: the id of the node that runs it.
            cost: its highest cost.
            prompts: the prompts that each key of the account has left.
        """
        await self._connection.execute(
            "SELECT reserve($1, $2, $3, $4, $5, $6, $7, $8)",
            self._owner,
            name,
            node,
            *cost,
            self._account,
            prompts,
            self.used.now,
        )


class Reservations:
    """The reservations of all nodes.

    Args:
        store: the store that all nodes share.
    """

    def __init__(self, store: PostgresStore) -> None:
        self._store = store

    @contextlib.asynccontextmanager
    async def lock(self, owner: str, account: Account, name: str) -> AsyncIterator[Locked]:
        """Lock the use of an owner and an account.

        Raises:
            StoreError: the database cannot be used now.
        """
        async with self._store.request(owner) as connection, connection.transaction():
            row = await connection.fetchrow("SELECT * FROM used($1, $2, $3)", owner, name, account)
            yield Locked(connection, owner, account, row)

    async def node_of(self, owner: str, name: str) -> str | None:
        """Return the node that runs a generation; None if none does.

        Raises:
            StoreError: the database cannot be used now.
        """
        statement = "SELECT node FROM reserved WHERE owner = $1 AND id = $2"
        async with self._store.request(owner) as connection:
            node = await connection.fetchval(statement, owner, name)
        return None if node is None else str(node)

    async def remove(self, owner: str, name: str) -> None:
        """Remove the reservation for a generation whose end the store does not get.

        Raises:
            StoreError: the database cannot be used now.
        """
        async with self._store.connection() as connection:
            await connection.execute(
                "DELETE FROM reserved WHERE owner = $1 AND id = $2", owner, name
            )
