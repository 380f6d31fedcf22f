"""Costs of replies, and daily budgets in tokens and money."""

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.prompt_cache import PromptCache
from tests.support.puppet import Puppet
from tests.support.upstream import Hang, Script, Upstream, error, reply
from wsserver import ConfigError, End, Principal, Settings, Usage
from wsserver.limits import SECONDS_PER_DAY
from wsserver.prices import CLAUDE, FREE, NOTHING, Price, Prices, Spent
from wsserver.stores.base import day_of

SONNET = Price(3, 15, 3.75, 0.3)


def cost(price: Price, asked: int, said: int, written: int = 0, read: int = 0) -> Spent:
    return price.spent(Usage(asked, said, written, read))


# Prices


@pytest.mark.parametrize(
    ("counts", "tokens", "microdollars"),
    [
        ((0, 0), 0, 0),
        ((3, 5), 8, 9 + 75),
        ((0, 0, 100), 125, 375),
        ((0, 0, 0, 30), 3, 9),
        ((0, 0, 0, 1), 1, 1),
        ((0, 0, 0, 98_000), 9800, 29_400),
        ((10**400, 10**400), 10**12, 10**12),
    ],
)
def test_token_kinds_cost_their_prices(
    counts: tuple[int, ...], tokens: int, microdollars: int
) -> None:
    assert cost(SONNET, *counts) == Spent(tokens, microdollars)


def test_reply_without_usage_costs_nothing() -> None:
    assert SONNET.spent(None) == NOTHING


def test_long_prompt_has_other_price() -> None:
    price = Price(1, 2, 3, 4, over=Price(10, 20, 30, 40))
    assert cost(price, 50_000, 1, 50_000).microdollars == 50_000 + 2 + 150_000
    assert cost(price, 50_000, 1, 50_000, 1).microdollars == 500_000 + 20 + 1_500_000 + 40


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("claude-sonnet-4-6", SONNET),
        ("claude-sonnet-4-5-20250929", SONNET),
        ("claude-sonnet-4-20250514", SONNET),
        ("claude-opus-4-20250514", CLAUDE["claude-opus-4"]),
        ("claude-opus-4-1", CLAUDE["claude-opus-4"]),
        ("claude-opus-4-5-20251101", CLAUDE["claude-opus-4-5"]),
        ("claude-opus-5", CLAUDE["claude-opus-5"]),
        ("claude-opus-5-5", CLAUDE["claude-opus-5-5"]),
        ("us.anthropic.claude-opus-4-5-20251101-v1:0", CLAUDE["claude-opus-4-5"]),
        ("claude-of-tomorrow", max(CLAUDE.values(), key=lambda price: price.output)),
        ("demo", FREE),
        ("my-model", Price(1, 5, 1.25, 0.1)),
        ("claude-haiku-4-5", Price(2, 4, 8, 16)),
    ],
)
def test_price_of_model_is_setting_or_known_price(model: str, price: Price) -> None:
    given = Settings(prices="my-model=1/5, claude-haiku-4-5=2/4/8/16").prices  # type: ignore[arg-type]
    assert Prices(given).of(model) == price


@pytest.mark.parametrize("given", ["x", "x=1", "=1/2", "x=1/2/3", "x=a/b", "x=-1/2", "x=1/2/3/4/5"])
def test_malformed_price_is_refused_at_start(given: str) -> None:
    with pytest.raises(ConfigError, match="prices"):
        Settings.load(prices=given)


# A day's money


async def named(token: str | None, _: object) -> Principal | None:
    return None if token is None else Principal(token)


@asynccontextmanager
async def ada(server: wsserver.Server) -> AsyncIterator[Client]:
    async with client(server, additional_headers={"Authorization": "Bearer ada"}) as chat:
        yield chat


def serve(model: Any = None, **given: Any) -> wsserver.Server:
    return wsserver.serve(
        model,
        port=0,
        drain_timeout=0,
        authenticate=named,
        prompts_per_minute=100_000,
        frame_rate=100_000,
        frame_burst=100_000,
        **given,
    )


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_daily_dollars_survive_restart(puppet: Puppet, tmp_path: Any, kind: str) -> None:
    store = "memory:" if kind == "memory" else f"sqlite:///{tmp_path}/s.sqlite"
    given: dict[str, Any] = {"dollars_per_day": 0.01, "prices": "puppet=1/10", "store": store}
    async with serve(puppet, **given) as server, ada(server) as chat:
        await chat.prompt()
        (await puppet.reply()).say("x", End(usage=Usage(1000, 900))).end()
        await chat.next("done")
        refused = await chat.prompt()
        assert (refused["code"], refused["retryable"]) == ("quota", True)
        assert "dollars" in refused["message"]
        assert "tokens" not in refused["message"]
    if kind == "sqlite":
        async with serve(puppet, **given) as server, ada(server) as chat:
            assert (await chat.prompt())["code"] == "quota"


async def test_quota_error_names_tokens(puppet: Puppet) -> None:
    async with serve(puppet, tokens_per_day=1000, prices="puppet=1/1") as server:
        async with ada(server) as chat:
            await chat.prompt()
            (await puppet.reply()).say("x", End(usage=Usage(1000))).end()
            await chat.next("done")
            refused = await chat.prompt()
    assert refused["code"] == "quota"
    assert "tokens" in refused["message"]


async def test_remaining_daily_dollars_bound_reply(puppet: Puppet) -> None:
    async with serve(puppet, dollars_per_day=0.01, prices="puppet=1/10") as server:
        async with ada(server) as chat:
            await chat.prompt(conversation="conversation-one", max_tokens=700)
            await chat.prompt(conversation="conversation-two", max_tokens=700)
            replies = [await puppet.reply(number) for number in range(2)]
            assert [reply.request.max_tokens for reply in replies] == [700, 299]
            refused = await chat.prompt(conversation="conversation-three")
    assert (refused["code"], refused["message"].count("dollars")) == ("limit", 1)


async def test_clock_set_back_over_midnight_restores_no_budget(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    now = 10.0 * SECONDS_PER_DAY
    monkeypatch.setattr("wsserver.stores.memory.time.time", lambda: now)
    limits = {"tokens_per_day": 1000, "dollars_per_day": 0.001, "prices": "puppet=1/1"}
    async with serve(puppet, **limits) as server, ada(server) as chat:
        for number in range(2):
            start = await chat.prompt(conversation="conversation-one", max_tokens=100)
            runs = await chat.prompt(conversation="conversation-two", max_tokens=100)
            (await puppet.reply(2 * number)).say("x", End(usage=Usage(950))).end()
            await chat.next("done", id=start["id"])
            now -= SECONDS_PER_DAY
            refused = await chat.prompt(conversation="conversation-three")
            assert refused["code"] == "limit", "what is left is set aside for the one that runs"
            (await puppet.reply(2 * number + 1)).say("x", End(usage=Usage(50))).end()
            await chat.next("done", id=runs["id"])
            assert (await chat.prompt(conversation="conversation-three"))["code"] == "quota"
            now += 2 * SECONDS_PER_DAY


async def test_models_of_one_server_have_own_prices(puppet: Puppet) -> None:
    given = {"models": "dear", "prices": "puppet=1/1,dear=1000/1000", "dollars_per_day": 1}
    async with serve(puppet, **given) as server, ada(server) as chat:
        await chat.prompt(model="dear", max_tokens=2000)
        reply = await puppet.reply()
        assert reply.request.max_tokens == 1000
        reply.say("x", End(usage=Usage(output_tokens=999))).end()
        await chat.next("done")
        assert (await chat.prompt(model="dear"))["code"] == "quota"
        assert (await chat.prompt(model="puppet"))["type"] == "start"


async def test_limit_of_zero_means_unlimited(puppet: Puppet) -> None:
    async with serve(puppet, dollars_per_day=0, prices="puppet=1000/1000") as server:
        async with ada(server) as chat:
            await chat.prompt()
            (await puppet.reply()).say("x", End(usage=Usage(output_tokens=500_000))).end()
            await chat.next("done")
            assert (await chat.prompt())["type"] == "start"


async def test_cost_is_in_log_and_metrics(puppet: Puppet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "wsserver")
    async with serve(puppet, prices="puppet=1/10") as server, ada(server) as chat:
        await chat.prompt()
        (await puppet.reply()).say("x", End(usage=Usage(1000, 100))).end()
        await chat.next("done")
        assert (
            'wsserver_dollars_total{model="puppet"} 0.002' in server.metrics.exposition().decode()
        )
    assert "0.002" in caplog.text


# Against what the API bills


class Bill:
    """The bill of the fake API, at the prices of the requested model."""

    def __init__(self) -> None:
        self.cache = PromptCache()
        self.tokens = 0.0
        self.dollars = 0.0

    def __call__(self, body: Any) -> Script:
        usage = self.cache.usage(body)
        output = 1
        self.tokens += usage["input_tokens"] + usage["cache_creation_input_tokens"] * 1.25
        self.tokens += usage["cache_read_input_tokens"] * 0.1 + output
        self.dollars += (
            usage["input_tokens"] * 3e-6 + usage["cache_creation_input_tokens"] * 3.75e-6
        )
        self.dollars += usage["cache_read_input_tokens"] * 0.3e-6 + output * 15e-6
        return reply(["!"], output_tokens=output, **usage)


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Upstream]:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    async with Upstream() as running:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", running.url)
        yield running


async def use_up(chat: Client) -> dict[str, Any]:
    """Send long prompts, and then tiny prompts that read them from the cache, until a refusal."""
    for number in itertools.count():
        conversation, turn = divmod(number, 60)
        text = f"{turn:02}".ljust(32_700, "x") if turn < 12 else "x"
        start = await chat.prompt(
            text, conversation=f"conversation-{conversation:04}", max_tokens=1
        )
        if start["type"] == "error":
            break
        await chat.next("done", "error", id=start["id"])
        chat.frames.clear()
    return start


@pytest.mark.parametrize(
    ("limits", "name"),
    [({"tokens_per_day": 300_000}, "tokens"), ({"dollars_per_day": 1.0}, "dollars")],
)
async def test_prompt_cache_reads_count_for_daily_dollars(
    upstream: Upstream, limits: dict[str, Any], name: str
) -> None:
    bill = Bill()
    upstream.default = bill
    async with serve(**limits) as server, ada(server) as chat:
        refused = await use_up(chat)
        assert (refused["code"], name in refused["message"]) == ("quota", True)
        spent = await server.app.store.spent("ada", day_of(time.time()))
    assert spent.dollars == pytest.approx(bill.dollars, rel=1e-3)
    assert spent.tokens == pytest.approx(bill.tokens, rel=1e-3)
    used, limit = (bill.tokens, 300_000) if name == "tokens" else (bill.dollars, 1.0)
    most = 98_000 * (1.25 if name == "tokens" else 3.75e-6)  # of one more prompt
    assert 0.95 * limit < used < limit + most


async def test_prompt_cache_abuse_costs_under_four_dollars_by_default(
    upstream: Upstream,
) -> None:
    bill = Bill()
    upstream.default = bill
    limits = {
        name: Settings.model_fields[name].default for name in ("tokens_per_day", "dollars_per_day")
    }
    async with serve(**limits) as server, ada(server) as chat:
        assert (await use_up(chat))["code"] == "quota"
    assert bill.tokens < 1_000_000 + 98_000
    assert bill.dollars < 4


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (413, "request_too_large"), (529, "overloaded_error")],
)
async def test_request_refused_by_api_costs_nothing(
    upstream: Upstream, status: int, kind: str
) -> None:
    upstream.default = Script((error(status, kind, headers={"retry-after": "0"}),))
    async with serve(tokens_per_day=8200) as server, ada(server) as chat:
        for _ in range(3):
            start = await chat.prompt("x" * 32_000)
            failed = await chat.next("error", id=start["id"])
            assert failed["usage"] == {"input_tokens": 0, "output_tokens": 0}


async def test_replies_stopped_before_usage_count_for_daily_tokens(
    upstream: Upstream,
) -> None:
    upstream.default = reply(["漢字仮名交じり文"] * 100, Hang())
    async with serve(tokens_per_day=5000) as server, ada(server) as chat:
        replies = 0
        while (start := await chat.prompt())["type"] == "start":
            while len(chat.said(start["id"])) < 800:
                await chat.receive()
            await chat.send({"type": "stop", "id": start["id"]})
            await chat.next("done")
            replies += 1
    assert start["code"] == "quota"
    assert replies * 800 <= 5000 + 800
