"""Stores: they save conversations and generations."""

from pathlib import Path

from wsserver.errors import ConfigError
from wsserver.limits import Memory
from wsserver.prices import Prices
from wsserver.settings import Settings
from wsserver.stores.base import Store
from wsserver.stores.memory import MemoryStore

__all__ = ["MemoryStore", "Store", "make"]


def make(settings: Settings, memory: Memory, node: str | None = None) -> Store:
    """Make the store that the settings name: ``memory:``, ``sqlite:///path`` or ``postgresql://…``.

    Args:
        settings: the store and its limits.
        memory: counts the bytes of a store in memory.
        node: the id of this node of a cluster; None for a single server.

    Raises:
        ConfigError: there is no such store.
    """
    url, prices = settings.store, Prices(settings.prices)
    if url == "memory:" and node is None:
        return MemoryStore(settings.conversations, memory, prices)
    if url.startswith(("postgresql://", "postgres://")):
        from wsserver.stores.postgres.store import PostgresStore  # noqa: PLC0415

        try:
            return PostgresStore(url, settings.store_timeout, prices, node=node)
        except ValueError as error:
            raise ConfigError(f"store: this is no address of PostgreSQL: {error}") from None
    if node is not None:
        raise ConfigError("store: the nodes of a cluster share a store, such as postgresql://…")
    path = url.removeprefix("sqlite:///")
    if path not in {url, "", ":memory:"}:
        from wsserver.stores.sqlite import SqliteStore  # noqa: PLC0415

        # As in SQLAlchemy: three slashes for a relative path, four for an absolute one.
        try:
            return SqliteStore(Path(path).expanduser(), settings.store_timeout, prices)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"store: {url!r}: {error}") from error
    _, at, rest = url.rpartition("@")
    shown = f"…@{rest}" if at else url  # without a password
    raise ConfigError(f"store: {shown!r} is none of memory:, sqlite:///PATH and postgresql://…")
