"""Finding a model by its name, and the demo model."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.client import client
from wsserver import (
    Code,
    ConfigError,
    End,
    Message,
    Model,
    ModelError,
    Request,
    Settings,
    Thinking,
    Usage,
)
from wsserver.models import make, name_of
from wsserver.models.demo import Demo
from wsserver.pieces import Piece


def request(*messages: Message, max_tokens: int = 1000) -> Request:
    return Request(messages, "demo", max_tokens)


async def listen(model: Model, asked: Request) -> tuple[str, Usage, End]:
    text, usage, end = "", Usage(), End("none")
    async for piece in model(asked):
        if isinstance(piece, str):
            text += piece
        elif isinstance(piece, Usage):
            usage = piece
        elif isinstance(piece, End):
            end = piece
    return text, usage, end


async def test_demo_names_itself_and_answers_from_prompt() -> None:
    asked = request(Message("user", "the quick  brown\nfox"))
    text, usage, end = await listen(Demo(rate=0), asked)
    assert text.startswith("This is the demo model")
    assert "“the quick brown fox”" in text
    assert "4 words and 19 characters" in text
    assert "| quick | 5 | kciuq |" in text
    assert "= 24 $$" in text, "the factorial of 4"
    assert "ANTHROPIC_API_KEY" in text
    assert len(text.split()) > 150, "long enough to interrupt"
    for mark in ("\n|---|", "\n1. ", "\n```js\n", "](https://", "**", "`"):
        assert mark in text, mark
    assert (usage.input_tokens, usage.output_tokens) == (4, len(text.split()))
    assert end.reason == "end_turn"
    assert (await listen(Demo(rate=0), asked))[0] == text, "deterministic"


@pytest.mark.parametrize(
    ("prompt", "last"),
    [
        ("Count to a thousand", 1000),
        ("please count up to 2,000!", 2000),
        ("count to one hundred", 100),
        ("Count to 1", 1),
    ],
)
async def test_demo_counts(prompt: str, last: int) -> None:
    asked = request(Message("user", prompt), max_tokens=5000)
    text, usage, end = await listen(Demo(rate=0), asked)
    assert text == ", ".join(str(number) for number in range(1, last + 1))
    assert (usage.output_tokens, end.reason) == (last, "end_turn")


async def test_demo_stops_counting_at_max_tokens() -> None:
    asked = request(Message("user", "Count to a million"), max_tokens=3)
    assert (await listen(Demo(rate=0), asked))[::2] == ("1, 2, 3", End("max_tokens"))


async def test_demo_thinks_before_it_answers() -> None:
    asked = request(Message("user", "Think about tea"))
    kinds = [
        type(piece) async for piece in Demo(rate=0)(asked) if isinstance(piece, str | Thinking)
    ]
    first = kinds.index(str)
    assert first > 20
    assert set(kinds[:first]) == {Thinking}
    assert set(kinds[first:]) == {str}


@pytest.mark.parametrize(
    ("count", "formula"),
    [
        (1, "$$ 1! = 1 $$"),
        (5, r"$$ 5! = \prod_{k=1}^{5} k = 120 $$"),
        (300, r"$$ 300! = \prod_{k=1}^{300} k \approx 3.06 \times 10^{614} $$"),
    ],
)
async def test_demo_formula_stays_short(count: int, formula: str) -> None:
    text, _, _ = await listen(Demo(rate=0), request(Message("user", "x " * count)))
    assert formula in text


async def test_demo_uses_history() -> None:
    first, again = Message("user", "My name is Ann"), Message("user", "What did I just say?")
    text, _, _ = await listen(Demo(rate=0), request(first, Message("assistant", "Hi"), again))
    assert text == "You said: “My name is Ann”"
    cut = Message("assistant", "Hello, my dear friend Ann", "client")
    text, _, _ = await listen(Demo(rate=0), request(first, cut, again))
    assert text.endswith("cut short after “Hello, my dear friend Ann”.")
    text, _, _ = await listen(Demo(rate=0), request(again))
    assert "not said anything" in text


async def test_demo_respects_max_tokens() -> None:
    text, usage, end = await listen(Demo(rate=0), request(Message("user", "x"), max_tokens=5))
    assert len(text.split()) == usage.output_tokens == 5
    assert end.reason == "max_tokens"


@pytest.mark.parametrize("kind", ["a class", "not async", "a generator"])
def test_model_with_invalid_push_is_refused(kind: str) -> None:
    class Whole:
        async def push(self, request: Request, take: object, /) -> None: ...

    class Plain:
        def push(self, request: Request, take: object, /) -> None: ...

    class Generator:
        async def push(self, request: Request, take: object, /) -> AsyncIterator[str]:
            yield "x"

    models = {"a class": Whole, "not async": Plain(), "a generator": Generator()}
    with pytest.raises(ConfigError, match="push"):
        wsserver.serve(models[kind])  # type: ignore[arg-type]
    wsserver.serve(Whole())


class Named:
    name = "its-own"

    async def __call__(self, request: Request, /) -> AsyncIterator[str]:
        yield str(request.model)


async def nameless(request: Request, /) -> AsyncIterator[str]:
    yield str(request.model)


@pytest.mark.parametrize(
    ("model", "chosen", "shown", "asked"),
    [
        (nameless, None, "nameless", "None"),
        (nameless, "nameless", "nameless", "None"),
        (nameless, "listed", "listed", "listed"),
        (Named(), None, "its-own", "its-own"),
        (Named(), "its-own", "its-own", "its-own"),
        (Named(), "listed", "listed", "listed"),
    ],
)
async def test_model_gets_name_chosen_by_client_or_own_name(
    model: Model, chosen: str | None, shown: str, asked: str
) -> None:
    async with wsserver.serve(model, port=0, models="listed") as server, client(server) as chat:
        start = await chat.prompt(model=chosen) if chosen else await chat.prompt()
        assert start["model"] == shown
        assert (await chat.text(start["id"]))[0] == asked


def test_model_error_takes_known_code_as_string() -> None:
    error = ModelError("overloaded", retry_after=3)
    assert error.code is Code.OVERLOADED
    assert (error.message, error.retryable) == (Code.OVERLOADED.meaning, True)
    for wrong in ("the service is down", "OVERLOADED", None, 5):
        with pytest.raises(ValueError, match=r"is not an error code; pass one of wsserver\.Code"):
            ModelError(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [float("inf"), float("nan")])
def test_retry_after_of_nan_or_infinity_is_omitted(seconds: float) -> None:
    assert ModelError("overloaded", retry_after=seconds).retry_after is None


async def test_model_error_with_string_code_reaches_client() -> None:
    async def failing(request: Request, /) -> AsyncIterator[str]:
        yield "Half"
        raise ModelError("overloaded", "It is busy.")

    async with wsserver.serve(failing, port=0) as server, client(server) as chat:
        await chat.prompt()
        failed = await chat.next("error")
        assert (failed["code"], failed["message"]) == ("overloaded", "It is busy.")
        assert failed["retryable"] is True


async def _yields_bytes(request: Request, /) -> AsyncIterator[Any]:
    yield b"x"


async def _yields_piece(request: Request, /) -> AsyncIterator[Any]:
    yield Piece("tool", 0, "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (_yields_bytes, "the model yielded bytes; yield str, Thinking"),
        (_yields_piece, "the model yielded a piece of kind 'tool'"),
        (lambda request: request.prompt, "the model returned str; write an async generator"),
    ],
    ids=["bytes", "piece", "text"],
)
async def test_mistake_of_model_is_explained_to_operator(
    caplog: pytest.LogCaptureFixture, model: Any, says: str
) -> None:
    caplog.set_level("INFO", "wsserver")
    async with wsserver.serve(model, port=0) as server, client(server) as chat:
        await chat.prompt()
        failed = await chat.next("error")
    (line,) = [r.getMessage() for r in caplog.records if failed["ref"] in r.getMessage()]
    assert failed["code"] == "internal"
    assert says in line


def test_demo_is_default_model_without_credentials() -> None:
    assert name_of(make(Settings())) == "demo"


@pytest.mark.parametrize("name", ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"])
def test_claude_is_default_model_with_credentials(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    assert name_of(make(Settings())) == "claude-sonnet-4-6"
    assert name_of(make(Settings(model="anthropic:some-model"))) == "some-model"
    assert name_of(make(Settings(model="claude-opus-5"))) == "claude-opus-5"
    assert name_of(make(Settings(model="demo"))) == "demo"


@pytest.mark.parametrize(
    ("variable", "says"), [("HOME", "ANTHROPIC_API_KEY"), ("ANTHROPIC_CONFIG_DIR", "not found")]
)
def test_claude_without_credentials_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, says: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(ConfigError, match=says):
        make(Settings(model="claude-opus-5"))


def test_custom_model_is_imported_from_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_models.py").write_text(
        "class Box:\n"
        "    async def deep(request): yield 'x'\n"
        "async def echo(request): yield request.prompt\n"
        "async def whole(request): return 'x'\n"
        "def plain(request): yield 'x'\n"
        "class Other:\n"
        "    async def __call__(self, request): return 'x'\n"
        "other = Other()\n"
        "number = 5\n"
    )
    (tmp_path / "broken_model.py").write_text("import no_such_library")
    (tmp_path / "wordy_model.py").write_text("raise ValueError('two\\nlines')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert name_of(make(Settings(model="my_models:echo"))) == "echo"
    assert name_of(make(Settings(model="my_models:Box.deep"))) == "deep"
    for spec, says in {
        "my_models:number": "not callable",
        "my_models:whole": "must be an async generator: `async def` with `yield`",
        "my_models:plain": "must be an async generator",
        "my_models:other": "must be an async generator",
        "my_models:Other": r"Other is a class; pass an object, such as Other\(\)",
        "my_models:nothing": "cannot import",
        "no_such_module:x": "no module and no provider 'no_such_module'; choose demo, anthropic:",
        "my_models.deeper:x": "no module and no provider 'my_models.deeper'",
        "mistral:gpt-4o": "no provider 'mistral'; choose demo, anthropic:",
        "json:gpt-4o": "no provider 'json'; choose demo, anthropic:",
        "ollama:llama3.1:8b": "no provider 'ollama'",
        "mistral:gpt4": "no module and no provider 'mistral'",
        "wordy_model:x": "ValueError: two lines",
        "broken_model:x": "'broken_model:x': the module 'no_such_library' is not installed",
        "gpt": "no model; choose demo",
        "my_models:": "no model; choose demo",
    }.items():
        with pytest.raises(ConfigError, match=says) as raised:
            make(Settings(model=spec))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("model", ["openai:large", "anthropic:large", "claude-large"])
@pytest.mark.parametrize("setting", ["models", "titles"])
def test_other_models_with_the_prefix_of_a_provider_are_refused(
    monkeypatch: pytest.MonkeyPatch, model: str, setting: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    monkeypatch.setenv(f"WSSERVER_{setting.upper()}", "openai:small:8b")
    with pytest.raises(ConfigError, match=f"{setting}: write 'small:8b' instead of 'openai:small"):
        make(Settings.load(model=model))
    monkeypatch.setenv(f"WSSERVER_{setting.upper()}", "small:8b")
    make(Settings.load(model=model))
