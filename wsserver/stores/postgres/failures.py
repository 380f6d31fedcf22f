"""What the failures of asyncpg and PostgreSQL mean. No meaning has text from the database."""

import os

import asyncpg

# Errors about values, and not about the database or its state.
UNSAVABLE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that was lost at a certain moment
    OSError,
    TimeoutError,
)

_MEANINGS = {
    asyncpg.InvalidPasswordError: "PostgreSQL refuses the name or the password",
    asyncpg.InvalidAuthorizationSpecificationError: "PostgreSQL refuses this user",
    asyncpg.InvalidCatalogNameError: "there is no such database",
    asyncpg.UndefinedObjectError: "PostgreSQL does not know a parameter of the address",
    asyncpg.InsufficientPrivilegeError: (
        "the user may not create or change the tables; let an administrator run "
        "CREATE SCHEMA wsserver AUTHORIZATION the_user"
    ),
}


def reason_of(error: BaseException) -> str:
    """Describe a failure without text from the database."""
    for kind, meaning in _MEANINGS.items():
        if isinstance(error, kind):
            return meaning
    if isinstance(error, asyncpg.PostgresError):
        return f"{type(error).__name__} ({error.sqlstate})"
    if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
        return "PostgreSQL has no TLS, which `sslmode` in the address requires"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return type(error).__name__
