"""The sequences of ``PROTOCOL.md``, played to the server and to the Python client."""

from pathlib import Path

import pytest

from tests.support.sequences import load, play_to_server

SEQUENCES = load()


@pytest.mark.parametrize("name", SEQUENCES)
async def test_the_server_says_what_the_sequence_says(name: str, tmp_path: Path) -> None:
    await play_to_server(SEQUENCES[name], tmp_path)
