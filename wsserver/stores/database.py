"""A connection to a SQLite file in its own thread, and checks of the file."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from wsserver.errors import StoreError

T = TypeVar("T")


class Connection:
    """A connection to the file. Its thread runs one call after another."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wsserver-store")
        self._closing: asyncio.Future[None] | None = None
        self.database: sqlite3.Connection | None = None
        self.damage: str | None = None  # SQLite's message about damage of the file

    async def open(self) -> None:
        """Open the file.

        Raises:
            sqlite3.Error: the file cannot be opened.
        """
        await self._run(self._open)

    def close(self) -> "asyncio.Future[None]":
        """Close the connection after all earlier calls. The caller need not wait."""
        if self._closing is None:
            self._closing = self._run(self._close)
            self._thread.shutdown(wait=False)
        return self._closing

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in the thread, outside of a transaction."""

        def call() -> T:
            assert self.database is not None
            return work(self.database)

        return await self._run(call)

    async def transact(
        self, work: Callable[[sqlite3.Connection], T], begin: str = "BEGIN IMMEDIATE"
    ) -> T:
        """Run ``work`` in the thread, in one transaction.

        Raises:
            StoreError: ``work`` failed. The transaction was rolled back.
        """

        def transact(database: sqlite3.Connection) -> T:
            with errors():
                try:
                    database.execute(begin)
                    done = work(database)
                    database.execute("COMMIT")
                except BaseException as error:
                    if isinstance(error, sqlite3.Error) and _damaged(error):
                        self.damage = str(error)
                    if database.in_transaction:
                        with contextlib.suppress(sqlite3.Error):
                            database.execute("ROLLBACK")
                    raise
                return done

        return await self.call(transact)

    def _run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        try:
            return asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError:  # the thread accepts no more work
            raise StoreError("the store is closed") from None

    def _open(self) -> None:
        self.database = database = sqlite3.connect(
            self._path, isolation_level=None, timeout=self._timeout
        )
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA secure_delete = ON").close()

    def _close(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Raise errors of SQLite and of records as :class:`StoreError`, without text from the file."""
    try:
        yield
    except ValidationError as error:
        kind = error.errors(include_context=False, include_input=False)[0]["type"]
        raise StoreError(f"a saved record is damaged: {kind}") from None
    except (sqlite3.Error, ValueError) as error:
        message = str(error).partition(" with text ")[0]
        raise StoreError(f"{type(error).__name__}: {message}") from None


def check(database: sqlite3.Connection) -> str | None:
    """Return the first error in the structure of a file; None if there is none."""
    ((found,),) = database.execute("PRAGMA quick_check(1)")
    return None if found == "ok" else " ".join(str(found).split())


def _damaged(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the details of extended codes
    return code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def files_of(database: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Return the files of a database and the identity of each."""
    ((path,),) = database.execute("SELECT file FROM pragma_database_list WHERE name = 'main'")
    found = {file: identity(file) for file in (path, f"{path}-wal")}
    return {file: known for file, known in found.items() if known is not None}


def identity(path: str) -> tuple[int, int] | None:
    """Return the device and inode of a file; None if there is no file."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
