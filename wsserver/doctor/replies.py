"""Checks of replies: whether proxies hold them back, lose them, or cut them. They send two prompts.

The prompts have ``messages``, so that they are in no conversation of the user.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any

import httpx2

from wsserver.doctor import advice
from wsserver.doctor.deployment import Deployment, fetch, read
from wsserver.doctor.findings import Finding, Report, failed, ok, skipped, warning
from wsserver.doctor.frames import NO_INSPECTION
from wsserver.doctor.handshakes import NOT_FOUND, redirected
from wsserver.doctor.line import (
    FAILURES,
    FRAME_SIZE,
    OPEN_TIMEOUT,
    Declined,
    Frame,
    Response,
    describe,
    parse_frame,
)
from wsserver.doctor.trace import LEAST_PIECES, Trace, bursts, delay, follow, pace

PROMPT = "Count from one to two hundred in English words, one number per line. Write nothing else."
CHATS = "/api/chat"
JSON = {"Content-Type": "application/json"}
BODY_SIZE = 262_144  # bytes; `useChat` sends all of a chat
STOP_TIMEOUT = 8.0  # seconds; the server waits 5 s for its model
SLOW_STOP = 1.0  # seconds
LINES = 6  # connections; a proxy spreads them over its servers
TOO_SHORT = "the reply was too short or too fast to judge"
NO_SERVER = {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
REFUSALS = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS}


async def http(deployment: Deployment, report: Report) -> None:
    """Check that a body of the size of a long chat reaches the server.

    The body is no prompt. The server refuses it, and calls no model.
    """
    async with deployment.client() as client:
        found = await _post(client, BODY_SIZE)
        deployment.notice(found)
        small = found if _arrived(found) else await _post(client, 0)
    deployment.chats = _arrived(small)
    if _arrived(found):
        report(ok("http", f"POST {CHATS} with {BODY_SIZE} bytes reaches the server"))
    elif _arrived(small):
        seen = f"POST {CHATS} with {BODY_SIZE} bytes gets status {found.status}; a small one passes"
        report(failed("http", seen, *deployment.advise(advice.BODY)))
    else:
        report(_refusal(deployment, small))


async def _post(client: httpx2.AsyncClient, size: int) -> Response:
    body = b'{"type":"ping"}'.ljust(size)
    return await fetch(client, "POST", CHATS, content=body, headers=JSON)


def _arrived(found: Response) -> bool:
    """Whether this is the server's response to a frame that is no prompt."""
    return '"unknown_type"' in found.body


def _refusal(deployment: Deployment, found: Response) -> Finding:
    """Say what a response to a POST means."""
    if (finding := redirected("http", deployment, found)) is not None:
        return finding
    seen = f"POST {CHATS} gets status {found.status}"
    if found.headers.get("content-type") == "application/json" and '"ref"' in found.body:
        with contextlib.suppress(ValueError):
            return failed("http", f"{seen}: {Declined(parse_frame(found.body))}")
    if found.status in NO_SERVER:
        return failed("http", seen, *deployment.advise(advice.UPSTREAM))
    if found.status in REFUSALS:
        return failed("http", seen, *deployment.advise(advice.REFUSED))
    if found.body == NOT_FOUND:
        seen += ": the server has no such path as the proxy sends, or it is older than this check"
        return failed("http", seen, *deployment.advise(advice.PREFIX))
    seen += ", which is not from the server"
    return failed("http", seen, *deployment.advise(advice.ROUTE))


async def stream(deployment: Deployment, report: Report) -> None:
    """Check one reply over WebSocket and over HTTP at the same time, and stop it.

    What one of the two has, the server has sent: the difference is due to proxies.
    """
    if not deployment.upgrades:
        report(skipped("tokens", "needs the upgrade"))
        report(skipped("stop", "needs the upgrade"))
    prompt, progress = _prompt(), asyncio.Event()
    frames, events = Trace(progress), Trace(progress)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(deployment.client())
        tasks: dict[str, asyncio.Task[None]] = {}
        stack.push_async_callback(_cancel, tasks)
        if deployment.upgrades:
            line = await stack.enter_async_context(deployment.line())
            await line.send({"type": "prompt", **prompt})
            tasks["tokens"] = asyncio.create_task(follow(line, prompt["id"], frames))
        if deployment.chats:
            tasks["sse"] = asyncio.create_task(_read_reply(client, prompt, events))
        for task in tasks.values():
            task.add_done_callback(lambda _: progress.set())
        await _listen(deployment, tasks, frames, events)
        stopped, ended = time.monotonic(), bool(frames.terminal or events.terminal)
        if not ended:
            if deployment.upgrades and not tasks["tokens"].done():
                await line.send({"type": "stop", "id": prompt["id"]})
            elif deployment.chats:
                await fetch(client, "POST", f"{CHATS}/{prompt['id']}/stop")
        await asyncio.wait(tasks.values(), timeout=STOP_TIMEOUT)
        cut = _cuts(tasks)
        if "tokens" in cut:
            report(failed("tokens", cut["tokens"], *deployment.advise(advice.IDLE)))
            report(skipped("stop", "needs the connection"))
        elif deployment.upgrades:
            report(_judge("tokens", (NO_INSPECTION,), frames, events, stopped))
            report(_judge_stop(frames, stopped, ended=ended))
        if "sse" in cut:
            report(failed("sse", cut["sse"], *deployment.advise(advice.IDLE)))
        elif deployment.chats:
            mend = deployment.advise(advice.SSE_BUFFERED)
            report(_judge("sse", mend, events, frames, stopped))
            report(await _continue(client, prompt["id"], events))


def _cuts(tasks: Mapping[str, asyncio.Task[None]]) -> dict[str, str]:
    """Return how the connections of followers failed.

    Raises:
        Declined: the server refused the prompt, or the reply failed.
    """
    found = {}
    for name, task in tasks.items():
        error = task.exception() if task.done() else None
        if isinstance(error, FAILURES) and not isinstance(error, Declined):
            found[name] = describe(error)
        elif error is not None:
            raise error
    return found


def _prompt() -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPT}]
    return {"messages": messages, "id": secrets.token_hex(16)}


async def _cancel(tasks: Mapping[str, asyncio.Task[None]]) -> None:
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


async def _listen(
    deployment: Deployment,
    tasks: Mapping[str, asyncio.Task[None]],
    frames: Trace,
    events: Trace,
) -> None:
    """Wait for the first piece, and then for some time, at most until the end of the reply."""

    async def wait_until(seconds: float, *, begun: bool) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not any(task.done() for task in tasks.values()):
                    if begun and (frames.pieces or events.pieces):
                        return
                    frames.progress.clear()
                    await frames.progress.wait()

    await wait_until(deployment.pace.patience, begun=True)
    await wait_until(deployment.pace.listening, begun=False)


async def _read_reply(client: httpx2.AsyncClient, prompt: Mapping[str, Any], trace: Trace) -> None:
    async with client.stream("POST", CHATS, json=prompt, timeout=None) as response:
        if response.status_code != HTTPStatus.OK:
            raise Declined({"code": response.status_code, "message": (await read(response)).body})
        async for frame in _frames(response):
            trace.take(frame)


async def _frames(response: httpx2.Response) -> AsyncIterator[Frame]:
    """Yield the data of server-sent events.

    Raises:
        ValueError: the data is no frame.
    """
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > FRAME_SIZE:
            raise ValueError("an event without an end")
        for line in lines:
            if line.startswith(b"data:"):
                yield parse_frame(line.removeprefix(b"data:"))


def _judge_stop(frames: Trace, stopped: float, *, ended: bool) -> Finding:
    if ended:
        return skipped("stop", "the reply ended before the stop")
    if frames.terminal is None:
        return failed(
            "stop",
            f"the reply goes on {STOP_TIMEOUT:.0f} s after the stop",
            "see the log of the server; look for a proxy that holds frames of clients back",
        )
    taken = frames.ended - stopped
    seen = f"the reply ended {taken * 1000:.0f} ms after the stop"
    if taken > SLOW_STOP:
        return warning("stop", seen, "see the log of the server: the model closes slowly")
    return ok("stop", seen)


def _judge(
    check: str,
    mend: tuple[str, ...],
    own: Trace,
    other: Trace,
    until: float,
) -> Finding:
    """Judge how one follower got the reply, compared with another one."""
    late = delay(own, other, until) or own.held()
    seen = pace(own, until)
    if late is not None:
        finding = failed(check, f"the reply is held back: {late}", *mend)
    elif not own.pieces:
        finding = skipped(check, "no piece came in time")
    elif (few := bursts(own, other, until)) is not None:
        finding = warning(check, few, *mend)
    elif seen is None:
        finding = skipped(check, TOO_SHORT)
    else:
        finding = ok(check, seen)
    return finding


async def _continue(client: httpx2.AsyncClient, reply: str, events: Trace) -> Finding:
    """Get the second half of a reply again, as an EventSource does."""
    if events.terminal is None:
        return failed("sse_resume", "the stream has not ended with the reply")
    after = events.pieces[len(events.pieces) // 2].seq if events.pieces else 0
    rest = Trace()
    async with client.stream("GET", f"{CHATS}/{reply}", params={"after": after}) as response:
        if response.status_code != HTTPStatus.OK:
            seen = f"GET {CHATS}/ID gets status {response.status_code}"
            return failed("sse_resume", seen, "the proxy must pass GET and POST of this path")
        async for frame in _frames(response):
            rest.take(frame)
    if rest.content() == events.content(after):
        return ok("sse_resume", f"GET {CHATS}/ID?after={after} has exactly the rest")
    return failed("sse_resume", "the rest of the reply differs", "see the log of the server")


async def _nodes(deployment: Deployment, reply: str, trace: Trace) -> Finding:
    """Get a reply on several connections: a proxy may spread them over several servers."""
    for number in range(1, LINES + 1):
        whole = Trace()
        async with deployment.line() as line:
            await line.send({"type": "resume", "id": reply})
            try:
                await follow(line, reply, whole)
            except Declined as declined:
                seen = f"connection {number} of {LINES} does not know the reply: {declined}"
                return failed("nodes", seen, *deployment.advise(advice.STICKY))
        if whole.content() != trace.content():
            return failed("nodes", f"the reply differs on connection {number} of {LINES}")
    return ok("nodes", f"{LINES} more connections have the same reply")


async def resume(deployment: Deployment, report: Report) -> None:
    """Cut the connection in the middle of a reply, and resume the reply on another one."""
    prompt, trace = _prompt(), Trace()
    reply = prompt["id"]
    async with deployment.line() as line:
        await line.send({"type": "prompt", **prompt})
        try:
            async with asyncio.timeout(deployment.pace.patience):
                await follow(line, reply, trace, LEAST_PIECES)
        except TimeoutError:
            await line.send({"type": "stop", "id": reply})
            report(skipped("resume", f"no pieces came within {deployment.pace.patience:.0f} s"))
            return
        line.cut()
    if trace.terminal is not None:
        report(skipped("resume", TOO_SHORT))
        return
    cut, began, whole = trace.seq, time.monotonic(), Trace()
    async with deployment.line() as line:
        try:
            await line.send({"type": "resume", "id": reply, "after": cut})
            async with asyncio.timeout(OPEN_TIMEOUT):
                answer = await line.next("start", "error")
            if answer["type"] == "error":
                raise Declined(answer)
            taken = time.monotonic() - began
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deployment.pace.listening):
                    await follow(line, reply, trace, LEAST_PIECES)
            if trace.terminal is None:
                await line.send({"type": "stop", "id": reply})
            await follow(line, reply, trace)
            await line.send({"type": "resume", "id": reply})
            await follow(line, reply, whole)
        except Declined as declined:
            mend = deployment.advise(advice.STICKY) if declined.code == "not_found" else ()
            report(failed("resume", f"the server does not resume: {declined}", *mend))
            return
    if trace.content() == whole.content():
        resumed = (
            f"cut after piece {cut}, resumed in {taken * 1000:.0f} ms, no piece lost or doubled"
        )
        report(ok("resume", resumed))
        report(await _nodes(deployment, reply, trace))
    else:
        report(failed("resume", "the resumed reply differs from the whole", "see the server's log"))
