"""The nodes of a cluster and their leases, in PostgreSQL.

A node is alive while it renews. All times are of the clock of the database, so that the clocks of
the nodes do not matter. A node that did not renew in time is buried by the others: from then on the
database refuses its writes (:class:`~wsserver.stores.postgres.store.Fenced`), its replies end as
``interrupted``, and its conversations are free. After a start of the database, every node has the
time of a lease to renew before it can be buried.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wsserver.stores.base import Fenced
from wsserver.stores.postgres.store import PostgresStore

Key = tuple[str, str]
"""The owner and the id of a conversation."""

_LATE = (
    "NOT dead AND expires < clock_timestamp() "
    "AND pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => $1)"
)


@dataclass(frozen=True, slots=True)
class Others:
    """The other nodes, as of a renewal.

    Attributes:
        alive: ids of the nodes that renew.
        late: ids of the nodes that have to be buried.
        next: seconds until the next of the others expires; None if there is none.
    """

    alive: frozenset[str]
    late: Sequence[str]
    next: float | None


class Nodes:
    """Keeps one node alive, and leases conversations for it.

    Args:
        store: the store of the node.
        node: the id of the node, new at each start.
        life: seconds for which a renewal holds.
    """

    def __init__(self, store: PostgresStore, node: str, life: float) -> None:
        self.node = node
        self.life = life
        self._store = store

    async def join(self) -> None:
        """Begin to be alive. A repetition changes nothing: the answer to the first may be lost.

        Raises:
            StoreError: the database cannot be used now.
        """
        async with self._store.connection() as connection:
            await connection.execute(
                "INSERT INTO node VALUES ($1, clock_timestamp() + make_interval(secs => $2)) "
                "ON CONFLICT DO NOTHING",
                self.node,
                self.life,
            )

    async def leave(self) -> None:
        """Stop to be alive, and release all conversations. No reply runs any more.

        Replies whose end could not be saved end as interrupted.

        Raises:
            StoreError: the database cannot be used now.
        """
        await self._store.end_replies(self.node)
        async with self._store.connection() as connection:
            await connection.execute("DELETE FROM node WHERE id = $1", self.node)

    async def renew(self) -> Others:
        """Stay alive for another life.

        Raises:
            Fenced: the node was buried.
            StoreError: the database cannot be used now.
        """
        async with self._store.connection(urgent=True) as connection:
            renewed = await connection.fetchval(
                "UPDATE node SET expires = clock_timestamp() + make_interval(secs => $2) "
                "WHERE id = $1 AND NOT dead RETURNING true",
                self.node,
                self.life,
            )
            if not renewed:
                raise Fenced("the other nodes of the cluster have buried this node")
            await self._store.set_clock(connection)
            rows = await connection.fetch(
                f"SELECT id, dead OR {_LATE} AS late, "
                "extract(epoch FROM expires - clock_timestamp())::float8 AS left "
                "FROM node WHERE id <> $2",
                self.life,
                self.node,
            )
        alive = [row for row in rows if not row["late"]]
        return Others(
            frozenset(row["id"] for row in alive),
            [row["id"] for row in rows if row["late"]],
            min((max(0.0, row["left"]) for row in alive), default=None),
        )

    async def bury(self, node: str) -> bool:
        """End the replies of a node that did not renew, and release its conversations.

        Returns:
            False if the node has renewed after all.

        Raises:
            StoreError: the database cannot be used now.
        """
        async with self._store.connection() as connection, connection.transaction():
            # Waits for writes of the node, and no write follows.
            late = await connection.fetchval(
                f"SELECT dead OR {_LATE} FROM node WHERE id = $2 FOR UPDATE", self.life, node
            )
            if late is None:  # another node has buried it
                return True
            if not late:
                return False
            await connection.execute("UPDATE node SET dead = true WHERE id = $1", node)
        await self._store.end_replies(node)
        async with self._store.connection() as connection:
            await connection.execute("DELETE FROM node WHERE id = $1", node)
        return True

    async def claim(self, key: Key) -> str:
        """Lease a conversation, and return the node that has it then: this one, or another.

        Raises:
            Fenced: this node was buried.
            StoreError: the database cannot be used now.
        """
        async with self._store.connection() as connection:
            holder = await connection.fetchval("SELECT claim($1, $2, $3)", *key, self.node)
        if holder is None:
            raise Fenced("the other nodes of the cluster have buried this node")
        return str(holder)

    async def release(self, keys: Iterable[Key]) -> None:
        """Let other nodes lease conversations in which nothing runs or waits.

        Raises:
            StoreError: the database cannot be used now.
        """
        owners, names = zip(*keys, strict=True)
        async with self._store.connection() as connection:
            await connection.execute(
                "DELETE FROM lease WHERE node = $1 AND (owner, conversation) IN "
                "(SELECT * FROM unnest($2::text[], $3::text[]))",
                self.node,
                owners,
                names,
            )

    async def holder(self, key: Key) -> str | None:
        """Return the node that has a conversation; None if none has.

        Raises:
            StoreError: the database cannot be used now.
        """
        async with self._store.connection() as connection:
            holder = await connection.fetchval(
                "SELECT node FROM lease WHERE owner = $1 AND conversation = $2", *key
            )
        return None if holder is None else str(holder)
