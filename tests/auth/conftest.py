"""Fixtures for the tests of JSON Web Tokens."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.auth.issuer import Clock, Issuer, key_set, serving


@pytest.fixture
def keys_file(tmp_path: Path) -> Callable[..., str]:
    def write(*keys: Any) -> str:
        path = tmp_path / "keys.json"
        path.write_bytes(key_set(*keys))
        return str(path)

    return write


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with serving() as issuer:
        issuer.body = key_set("rsa-1")
        yield issuer


@pytest.fixture
def clock() -> Clock:
    return Clock()
