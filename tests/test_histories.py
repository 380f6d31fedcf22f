"""Pages of histories and lists fit into a frame, and name the next page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver import Settings
from wsserver.connections.histories import conversations, history, room_of
from wsserver.content import Image, Message, Text, Thinking, Usage
from wsserver.encoding import encode
from wsserver.errors import ConfigError
from wsserver.stores.base import StoredConversation, Summary, Turn

SETTINGS = Settings(
    max_unsent=40_000, write_buffer=4_096, frame_size=1_000, message_size=4_000, prompt_size=2_000
)
ID = "0123456789abcdef"

# Texts that grow up to six times as JSON, and texts longer than a frame.
texts = st.builds(
    lambda character, count: character * count,
    st.sampled_from(["a", "\x01", '"', "🙂", "é", "\u2028"]),
    st.sampled_from([0, 1, 100, 2_000, 40_000]),
)
replies = st.builds(
    lambda blocks, partial, usage: Message(
        "assistant", blocks, partial, id=ID, model="m" * 256, usage=usage, began=1e9, ended=2e9
    ),
    texts | st.lists(st.builds(Text, texts) | st.builds(Thinking, texts, texts), max_size=4),
    st.none() | st.just("client"),
    st.none() | st.just(Usage(10**12, 10**12, 10**12, 10**12, estimated=True)),
)
turns = st.lists(st.tuples(texts, replies), max_size=30).map(
    lambda said: [
        Turn(number, Message("user", prompt, id=ID, began=1e9), reply)
        for number, (prompt, reply) in enumerate(said, start=1)
    ]
)


@given(turns, st.booleans())
def test_history_page_fits_frame_and_leads_to_all_turns(said: list[Turn], older: bool) -> None:
    room = room_of(SETTINGS)
    stored = StoredConversation(ID, "owner", "T" * 200, said, older)
    page = history(stored, [ID] * 9, room, "r" * 64)
    assert len(encode(page)) <= SETTINGS.answer_size
    told = [message.content for message in page.messages if message.role == "user"]
    assert len(told) >= min(1, len(said)), "the newest turn is always there"
    assert (page.before is not None) == bool(said and (older or len(told) < len(said)))
    if page.before is not None:
        assert page.before == said[len(said) - len(told)].number
    whole = [m.partial != "cut" for m in page.messages if m.role == "assistant"]
    assert all(whole) or len(told) == 1, "a turn is cut only where it is alone"


def test_cut_turn_keeps_blocks_of_prompt() -> None:
    image = Image({"type": "url", "url": "https://example.com/duck.png"})
    prompt = Message("user", (image, Text("What is this?")), id=ID)
    reply = Message("assistant", "word " * 10_000, id=ID)
    stored = StoredConversation(ID, "owner", "T", [Turn(1, prompt, reply)], older=False)
    page = history(stored, [], room_of(SETTINGS), None)
    assert page.messages[0] == prompt
    assert page.messages[1].partial == "cut"


@given(st.lists(texts.map(lambda text: text[:200]), max_size=101), st.integers(1, 100))
def test_list_page_fits_frame_and_leads_to_rest(titles: list[str], limit: int) -> None:
    found = [Summary(ID, title, 1e9, 1e9, 1000 - n) for n, title in enumerate(titles)][: limit + 1]
    page = conversations(found, limit, room_of(SETTINGS), "r" * 64)
    assert len(encode(page)) <= SETTINGS.answer_size
    assert len(page.items) >= min(1, len(found))
    more = len(found) > len(page.items)
    assert page.next == (str(found[len(page.items) - 1].place) if more else None)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_size": 60_000},
        {"max_unsent": 230_000},
        {"write_buffer": 131_072},
        {"prompt_size": 70_000},
        {"message_size": 1_000},
    ],
)
def test_settings_too_small_to_show_prompt_are_refused(
    settings: dict[str, int],
) -> None:
    with pytest.raises(ConfigError, match="must"):
        Settings.load(**settings)
