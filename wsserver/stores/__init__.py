"""Stores: they save conversations and generations."""

from pathlib import Path

from wsserver.errors import ConfigError
from wsserver.limits import Memory
from wsserver.prices import Prices
from wsserver.settings import Settings
from wsserver.stores.base import Store
from wsserver.stores.memory import MemoryStore

__all__ = ["MemoryStore", "Store", "make"]


def make(settings: Settings, memory: Memory) -> Store:
    """Make the store that the settings name: ``memory:`` or ``sqlite:///path``.

    Args:
        settings: the store and its limits.
        memory: counts the bytes of a store in memory.

    Raises:
        ConfigError: there is no such store.
    """
    url, prices = settings.store, Prices(settings.prices)
    if url == "memory:":
        return MemoryStore(settings.conversations, memory, prices)
    path = url.removeprefix("sqlite:///")
    if path not in {url, "", ":memory:"}:
        from wsserver.stores.sqlite import SqliteStore  # noqa: PLC0415

        # As in SQLAlchemy: three slashes for a relative path, four for an absolute one.
        try:
            return SqliteStore(Path(path).expanduser(), settings.store_timeout, prices)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"store: {url!r}: {error}") from error
    raise ConfigError(f"store: {url!r} is neither memory: nor sqlite:///PATH")
