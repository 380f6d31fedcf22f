"""Prompts and messages of content blocks are parsed, counted, saved and sent to the model."""

import json
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet
from wsserver import Server
from wsserver.content import Document, Image, Message, Other, Text, Thinking, ToolResult
from wsserver.errors import Refused
from wsserver.parsing import parse
from wsserver.protocol import MESSAGES, Prompt

ID, CONVERSATION = "0123456789abcdef", "conversation-one"
SOURCE = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
BLOCKS: list[dict[str, Any]] = [
    {"type": "text", "text": "What is this?"},
    {"type": "image", "source": SOURCE},
    {"type": "document", "source": {"type": "text", "data": "x"}, "title": "é"},
    {"type": "hologram", "deep": [{"a": [None, 1.5]}]},
]
PARSED = (
    Text("What is this?"),
    Image(SOURCE),
    Document({"type": "text", "data": "x"}, {"title": "é"}),
    Other("hologram", {"deep": [{"a": [None, 1.5]}]}),
)


def prompt(**frame: Any) -> Prompt:
    parsed = parse(json.dumps(frame))
    assert isinstance(parsed, Prompt)
    return parsed


def test_string_prompt_is_one_text_block() -> None:
    assert prompt(prompt="Hi") == prompt(prompt=[{"type": "text", "text": "Hi"}])
    assert prompt(prompt="Hi").new_messages == (Message("user", "Hi"),)


def test_blocks_are_parsed_whole() -> None:
    assert prompt(prompt=BLOCKS).new_messages == (Message("user", PARSED),)
    messages = [
        {"role": "user", "content": BLOCKS},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "s"}]},
        {"role": "user", "content": "And this?"},
    ]
    assert prompt(messages=messages).new_messages == (
        Message("user", PARSED),
        Message("assistant", [Thinking("x", "s")]),
        Message("user", "And this?"),
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (5, "prompt: must be a text or a list of blocks."),
        ({"type": "text"}, "prompt: must be a text or a list of blocks."),
        ([], "prompt: empty."),
        (" ", "prompt: empty."),
        ([{"type": "text", "text": "\n"}], "prompt.0.text: empty."),
        (["Hi"], "prompt.0.type: a block is an object with a type."),
        ([{"type": "text", "text": "Hi"}, {"type": "image"}], "prompt.1.source: missing."),
        ([{"type": "x", "y": "\ud83d"}], "prompt.0.y: has half of a surrogate pair."),
        ([{"type": "x", "y": json.loads("[" * 70 + "]" * 70)}], "The frame is nested too deeply."),
        ([{"type": "x", "y": json.loads("[" * 50 + "]" * 50)}], "prompt.0.y: nested too deeply."),
        ([{"type": "x", "y": dict.fromkeys(map(str, range(40)), 1)}], "An object of the frame has"),
        ([{"type": "x", "y": [1] * 7 * MESSAGES}], "The frame has too many values"),
    ],
)
def test_error_of_invalid_content_names_key(value: object, why: str) -> None:
    with pytest.raises(Refused) as raised:
        prompt(prompt=value)
    assert raised.value.message.startswith(why)
    assert len(raised.value.message) < 200


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "user"}, "messages.0.content: missing."),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text: missing."),
        ({"role": "system", "content": "x"}, "messages.0.role: must be 'user' or 'assistant'."),
        ({"role": "user", "content": "x", "name": "y"}, "messages.0.name: no such key."),
        ("x", "messages.0: must be an object with `role` and `content`."),
    ],
)
def test_error_of_invalid_message_names_key(message: object, why: str) -> None:
    with pytest.raises(Refused) as raised:
        prompt(messages=[message])
    assert raised.value.message == why


def test_size_counts_text_as_text_and_other_blocks_as_json() -> None:
    assert prompt(prompt="é" * 100, system="s" * 10).size == 210
    image = json.dumps(BLOCKS[1], separators=(",", ":"))
    assert prompt(prompt=BLOCKS[:2]).size == len("What is this?") + len(image)
    large = [{"type": "image", "source": SOURCE | {"data": "A" * 10_000}}]
    assert prompt(prompt=large).size > 10_000


async def test_model_gets_blocks_and_history_keeps_them(chat: Client, puppet: Puppet) -> None:
    await chat.send({"prompt": BLOCKS, "conversation": CONVERSATION})
    first = await puppet.reply()
    assert first.request.messages == (Message("user", PARSED),)
    assert first.request.prompt == "What is this?"
    first.say("A duck.").end()
    await chat.next("done")
    result = [{"type": "tool_result", "tool_use_id": "t", "content": "3"}]
    await chat.send({"prompt": result, "conversation": CONVERSATION})
    second = await puppet.reply(1)
    assert [message.blocks for message in second.request.messages] == [
        PARSED,
        (Text("A duck."),),
        (ToolResult("t", "3"),),
    ]
    second.say("Three.").end()
    await chat.next("done")
    await chat.send({"type": "open", "conversation": CONVERSATION})
    history = await chat.next("history")
    assert [message["content"] for message in history["messages"]] == [
        "What is this?",
        "A duck.",
        "",
        "Three.",
    ]
    assert [message.get("blocks") for message in history["messages"]] == [
        BLOCKS,
        None,
        result,
        None,
    ]


async def test_repeated_prompt_of_same_blocks_attaches(chat: Client, puppet: Puppet) -> None:
    await chat.send({"prompt": "Hi", "id": ID})
    (await puppet.reply()).say("Hello").end()
    await chat.next("done")
    await chat.send({"prompt": [{"type": "text", "text": "Hi"}], "id": ID})
    assert (await chat.next("done"))["id"] == ID
    await chat.send({"prompt": [*BLOCKS], "id": ID})
    assert (await chat.next("error"))["code"] == "id_conflict"
    assert len(puppet.replies) == 1


async def test_base64_data_counts_for_prompt_size(server: Server, chat: Client) -> None:
    data = "A" * server.settings.prompt_size
    await chat.send({"prompt": [{"type": "image", "source": SOURCE | {"data": data}}]})
    assert (await chat.next("error"))["code"] == "too_long"


async def test_other_tab_gets_text_of_prompt(server: Server, puppet: Puppet) -> None:
    async with client(server) as one, client(server) as two:
        await one.send({"prompt": "Hi", "conversation": CONVERSATION})
        (await puppet.reply()).say("Hello").end()
        await one.next("done")
        await two.send({"type": "open", "conversation": CONVERSATION})
        await two.next("history")
        await one.send({"prompt": BLOCKS, "conversation": CONVERSATION})
        assert (await two.next("start"))["prompt"] == "What is this?"


async def test_image_data_does_not_count_as_text_tokens(puppet: Puppet) -> None:
    """Characters of Base64 data do not count as text tokens."""
    async with wsserver.serve(
        puppet, port=0, drain_timeout=0, tokens_per_day=10_000, max_tokens=1000
    ) as server:
        async with client(server) as chat:
            source = SOURCE | {"data": "A" * 30_000}
            await chat.send({"prompt": [{"type": "image", "source": source}]})
            assert (await chat.receive())["type"] == "start"


async def test_blocks_of_crashed_reply_are_in_history(puppet: Puppet, tmp_path: Any) -> None:
    store = f"sqlite:///{tmp_path}/chat.sqlite"
    settings: dict[str, Any] = {"port": 0, "drain_timeout": 0, "store": store}
    async with wsserver.serve(puppet, **settings) as server, client(server) as chat:
        await chat.send({"prompt": BLOCKS, "conversation": CONVERSATION})
        reply = await puppet.reply()
        reply.say(wsserver.Thinking("Hm", "s"), "A ")
        await chat.next("token")
    async with wsserver.serve(puppet, **settings) as server, client(server) as chat:
        await chat.send({"type": "open", "conversation": CONVERSATION})
        asked, said = (await chat.next("history"))["messages"]
    assert asked["blocks"] == BLOCKS
    assert (said["content"], said["partial"]) == ("A ", "shutdown")
    assert said["blocks"] == [
        {"type": "thinking", "thinking": "Hm", "signature": "s"},
        {"type": "text", "text": "A "},
    ]
