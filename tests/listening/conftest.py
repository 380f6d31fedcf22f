"""Folders for the tests of listening sockets."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.listening.clients import KINDS


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder with a short path: the path of a unix socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ws-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """Yield a read-only folder with certificates and keys of two kinds."""
    with tempfile.TemporaryDirectory() as name:
        for kind, options in KINDS.items():
            command = f"openssl req -x509 -nodes -subj /CN={kind} -newkey {options}"
            names = ("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
            files = ("-keyout", f"{name}/{kind}.key", "-out", f"{name}/{kind}.pem")
            subprocess.run((*command.split(), *names, *files), check=True, capture_output=True)
        yield Path(name)
