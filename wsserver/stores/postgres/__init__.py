"""The store in PostgreSQL."""

from wsserver.errors import ConfigError

try:
    import asyncpg  # noqa: F401
except ImportError:
    raise ConfigError(
        "store: PostgreSQL needs the package asyncpg; install wsserver[postgres]"
    ) from None
