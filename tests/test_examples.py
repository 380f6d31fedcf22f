"""The programs in examples/, run without changes."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest
from websockets.asyncio.client import connect

from tests.support.puppet import BOUND
from tests.support.tools import ROOT


@pytest.fixture
def _ctrl_c_arrives() -> Iterator[None]:
    """Handle Ctrl-C, which a shell makes background programs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_arrives")
async def test_embedding_example_serves_model_until_ctrl_c() -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        ROOT / "examples/embedding.py",
        env={**os.environ, "WSSERVER_PORT": "0"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert program.stdout is not None
    try:
        async with asyncio.timeout(BOUND):
            said = (await program.stdout.readline()).decode()
            page = re.search(r"http://\S+", said)
            assert page is not None, said
            async with connect(page.group().replace("http", "ws"), proxy=None) as socket:
                await socket.send('{"prompt": "hello there"}')
                frames = [json.loads(await socket.recv()) for _ in range(4)]
                assert [frame["type"] for frame in frames] == ["start", "token", "token", "done"]
                assert [frame.get("text") for frame in frames[1:3]] == ["HELLO ", "THERE "]
                assert frames[0]["model"] == "shout"
                await socket.send('{"prompt": "one two three"}')
                await socket.recv()  # Ctrl-C comes in the middle of a reply
                program.send_signal(signal.SIGINT)
                _, complaints = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert (program.returncode, complaints.decode()) == (0, "")
