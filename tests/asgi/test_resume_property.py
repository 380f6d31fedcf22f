"""The properties of a resumed reply also hold under a server of ASGI."""

from collections.abc import AsyncIterator

import pytest

import wsserver
from tests.asgi.servers import serving
from tests.support.host import Host, Mounted
from tests.support.puppet import Puppet
from tests.support.story import LASTING
from tests.test_resume_property import (
    test_any_sequence_of_connections_gives_whole_reply,
    test_cut_at_each_byte_from_handshake_to_terminal_loses_nothing,
    test_cuts_at_any_bytes_lose_nothing,
    test_drop_at_any_frame_loses_nothing,
    test_new_connection_for_each_frame_loses_nothing,
    test_prompt_with_lost_start_runs_once,
    test_refused_resume_changes_nothing,
    test_repeated_resumes_on_one_socket_start_at_their_after,
    test_resume_after_any_piece_at_any_time_gets_rest,
    test_resume_after_open_starts_at_its_after,
    test_resume_at_end_of_reply_gets_everything,
    test_resume_while_reply_ends_gets_text_then_terminal,
    test_second_resume_replaces_first,
    test_two_tabs_dropped_at_different_frames_lose_nothing,
)

__all__ = [
    "test_any_sequence_of_connections_gives_whole_reply",
    "test_cut_at_each_byte_from_handshake_to_terminal_loses_nothing",
    "test_cuts_at_any_bytes_lose_nothing",
    "test_drop_at_any_frame_loses_nothing",
    "test_new_connection_for_each_frame_loses_nothing",
    "test_prompt_with_lost_start_runs_once",
    "test_refused_resume_changes_nothing",
    "test_repeated_resumes_on_one_socket_start_at_their_after",
    "test_resume_after_any_piece_at_any_time_gets_rest",
    "test_resume_after_open_starts_at_its_after",
    "test_resume_at_end_of_reply_gets_everything",
    "test_resume_while_reply_ends_gets_text_then_terminal",
    "test_second_resume_replaces_first",
    "test_two_tabs_dropped_at_different_frames_lose_nothing",
]

pytestmark = pytest.mark.slow


@pytest.fixture(params=["memory:"])
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def server(puppet: Puppet, store: str) -> AsyncIterator[Host]:
    chat = wsserver.asgi(puppet, allow_anonymous=True, store=store, **LASTING)
    async with serving(chat) as port:
        assert chat.app is not None
        yield Mounted(port, chat.settings, chat.app)
