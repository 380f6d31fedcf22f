"""The sequences of ``PROTOCOL.md``, played to the server and to the Python client."""

from pathlib import Path

import pytest

from tests.support.sequence_client import ScriptedServer
from tests.support.sequence_server import play_to_server
from tests.support.sequences import load, playable
from tests.test_conformance import Python
from wsserver.client import connect, dial

SEQUENCES = load()


@pytest.mark.parametrize("name", SEQUENCES)
async def test_server_sends_frames_of_sequence(name: str, tmp_path: Path) -> None:
    await play_to_server(SEQUENCES[name], tmp_path)


# No call of the client causes these: `repeat` (each prompt has a new id), `page` (`Chat.history`
# loads all pages), `later` (a renewal after 48 minutes), and `blocks` (prompts are texts).
UNABLE = frozenset({"repeat", "later", "page", "blocks"})


@pytest.mark.parametrize(("name", "socket"), playable(UNABLE))
async def test_python_client_plays_sequence(
    name: str, socket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(dial, "LONGEST_BACKOFF", 0.01)
    async with ScriptedServer(SEQUENCES[name], socket) as server:
        tokens = iter(server.tokens)

        async def token() -> str:
            return next(tokens)

        async with connect(server.url, token=token if server.tokens else None) as chat:
            await server.play(Python(chat))
