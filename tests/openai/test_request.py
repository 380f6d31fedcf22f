"""The bodies of requests, and the variables of the environment."""

from typing import Any

import pytest

from wsserver import Code, ModelError
from wsserver.content import Message, parse_content
from wsserver.errors import ConfigError
from wsserver.models import make
from wsserver.models.base import Request
from wsserver.models.openai.request import arguments
from wsserver.settings import Settings

PNG = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}


def messages(*said: tuple[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of the body for these roles and contents."""
    given = tuple(Message(role, parse_content(content)) for role, content in said)  # type: ignore[arg-type]
    body: list[dict[str, Any]] = arguments(Request(given, "m", 9), "max_tokens")["messages"]
    return body


@pytest.mark.parametrize(
    ("block", "part"),
    [
        (
            {"type": "image", "source": PNG},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        ),
        (
            {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        ),
        (
            {"type": "document", "source": PDF, "title": "a.pdf"},
            {
                "type": "file",
                "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"},
            },
        ),
        (
            {"type": "document", "source": {"type": "text", "data": "Words"}},
            {"type": "text", "text": "Words"},
        ),
        (
            {"type": "document", "source": {"type": "content", "content": "Words"}},
            {"type": "text", "text": "Words"},
        ),
    ],
)
def test_block_of_a_prompt_is_a_part(block: dict[str, Any], part: dict[str, Any]) -> None:
    (message,) = messages(("user", [{"type": "text", "text": "Look"}, block]))
    assert message == {"role": "user", "content": [{"type": "text", "text": "Look"}, part]}


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "file", "file_id": "file_1"}},
        {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
        {"type": "search_result", "source": "x"},
    ],
)
def test_block_without_counterpart_is_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as refused:
        messages(("user", [block]))
    assert refused.value.code is Code.BAD_REQUEST
    assert block["type"] in str(refused.value)


def test_tools_and_their_results_are_messages() -> None:
    call = {"type": "tool_use", "id": "call_1", "name": "look", "input": {"place": "Žilina"}}
    lost = {"type": "tool_use", "id": "call_2", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "Rain"}
    thinking = {"type": "thinking", "thinking": "hm", "signature": "x"}
    said = messages(
        ("user", "Weather?"),
        ("assistant", [thinking, {"type": "text", "text": "Looking."}, call, lost]),
        ("user", [result, {"type": "text", "text": "And?"}]),
    )
    function = {"name": "look", "arguments": '{"place": "Žilina"}'}
    assert said == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
        {"role": "user", "content": "And?"},
    ]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "needs OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": "https://API.openai.com"}, "needs OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": "https://eu.api.openai.com/v1/"}, "needs OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "kéy"}, "OPENAI_API_KEY has characters"),
        ({"OPENAI_BASE_URL": "localhost:8000"}, "OPENAI_BASE_URL is not"),
        ({"OPENAI_BASE_URL": "ftp://localhost"}, "OPENAI_BASE_URL is not"),
        ({"OPENAI_BASE_URL": "http://localhost:99999"}, "OPENAI_BASE_URL is not"),
        ({"OPENAI_BASE_URL": "http://localhost/é"}, "OPENAI_BASE_URL is not"),
        ({"OPENAI_API_KEY": "key", "OPENAI_ORG_ID": "a\nb"}, "OPENAI_ORG_ID has characters"),
    ],
)
def test_broken_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        make(Settings(model="openai:gpt"))


async def test_headers_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsserver.models.openai.environment import Environment

    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project")
    template = await Environment("gpt").current()
    assert template.url == "https://api.openai.com/v1/chat/completions"
    lines = template.headers.decode().split("\r\n")
    assert {
        "host: api.openai.com",
        "accept-encoding: identity",
        "authorization: Bearer key",
        "openai-organization: org",
        "openai-project: project",
    } <= set(lines)


def test_openai_gets_its_own_name_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsserver.models.openai import OpenAI

    monkeypatch.setenv("OPENAI_API_KEY", "key")
    request = Request((Message("user", "Hello?"),), "gpt", 9)
    assert OpenAI("gpt", Settings()).make_body(request)["max_completion_tokens"] == 9
