"""Chats over plain HTTP: a prompt is a POST, its reply a stream of server-sent events."""

import asyncio
import itertools
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from wsserver.admission import Visitor
from wsserver.chats.http import (
    CODES,
    EVENTS,
    JSON,
    NOT_STORED,
    PREFLIGHT,
    STATUS,
    cors,
    decode_body,
    parse_prompt,
    seq_after,
)
from wsserver.chats.replies import ReplyStream
from wsserver.connections.histories import history, room_of
from wsserver.connections.session import error_frame, refusal_of
from wsserver.connections.stopping import Stopping
from wsserver.content import Message
from wsserver.denials import Denied, unauthenticated
from wsserver.dialects import StreamDialect, ag_ui, ai_sdk
from wsserver.dialects.chat import Chat, conversation_of, prompt_keys
from wsserver.dialects.sse import SSE
from wsserver.encoding import encode
from wsserver.errors import Code, Refused, StoreError
from wsserver.generation import State
from wsserver.hub.hub import Hub
from wsserver.hub.live import Generation
from wsserver.limits import Account, Rates
from wsserver.protocol import Prompt, Stop, Stopped
from wsserver.responses import BadRequest, Request, Response, Stream, respond
from wsserver.settings import Settings
from wsserver.wire import ID_PATTERN

PATH = "/api/chat"
HISTORIES = 16  # messages of the largest size that a body may have: `useChat` sends all of a chat
RELOAD = 3.0  # seconds for a page of `useChat` to load again; a stop looks the same

Route = Callable[..., Awaitable[Response | Stream]]
"""Answers a request of a visitor; further arguments are the variable parts of the path."""

Grace = Callable[[], float | None]
"""Returns the seconds in which a client that leaves now can come back; None for the setting."""

_SSE = SSE()  # of all clients: followers at the same place share one encoded event
_ID = ID_PATTERN.strip("^$")


class Chats:
    """Answers the requests of clients that chat over HTTP.

    ``POST /api/chat`` accepts a prompt and streams its reply. ``GET /api/chat/GENERATION`` streams
    a reply from the piece after ``?after=N`` or ``Last-Event-ID`` on. ``DELETE
    /api/chat/GENERATION`` and ``POST /api/chat/GENERATION/stop`` stop it, and are answered once
    the request to the model is closed. Clients of the AI SDK use the same addresses and the chat
    in place of the generation, and ``GET /api/chat/CHAT/stream``. For AG-UI there are ``POST
    /agui``, ``POST /agui/connect`` and ``POST /agui/THREAD/stop``.

    Args:
        hub: runs the generations.
        settings: the limits.
    """

    def __init__(self, hub: Hub, settings: Settings) -> None:
        self._hub = hub
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._streams: dict[ReplyStream, None] = {}
        self._idle = asyncio.Event()
        self._requests = Rates(settings.frame_rate, settings.frame_burst)
        reply, chat, stop = self._resume, self._resume_chat, self._stop
        routes: dict[str, dict[str, Route]] = {
            PATH: {"POST": self._prompt},
            f"{PATH}/({_ID})": {"GET": reply, "HEAD": reply, "DELETE": stop},
            f"{PATH}/([^/]+)/stop": {"POST": stop},
            f"{PATH}/([^/]+)/stream": {"GET": chat, "HEAD": chat},
            ag_ui.PATH: {"POST": self._run},
            f"{ag_ui.PATH}/connect": {"POST": self._connect},
            f"{ag_ui.PATH}/([^/]+)/stop": {"POST": stop},
        }
        self._routes = [(re.compile(path), methods) for path, methods in routes.items()]

    @staticmethod
    def answers(path: str) -> bool:
        """Whether a path belongs here."""
        return f"{path}/".startswith((f"{PATH}/", f"{ag_ui.PATH}/"))

    async def respond(self, request: Request, visitor: Visitor) -> Response | Stream:
        """Answer a request.

        Raises:
            Denied: the client may not chat here; see :meth:`deny`.
        """
        headers = request.headers
        visitor.check_origin(headers)
        if request.method == "OPTIONS":
            return _allow(Response(HTTPStatus.NO_CONTENT, PREFLIGHT), headers)
        try:
            await visitor.check_admission(request.target, headers)
            if visitor.principal is None:
                raise unauthenticated()
            answer = await self._answer(request, visitor)
        except BadRequest as bad:
            large = bad.response.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            code = Code.TOO_LONG if large else Code.INVALID_FRAME
            answer = self._refuse(Refused(code, str(bad)), bad.response.status)
        except (Refused, StoreError) as error:
            answer = self._refuse(error)
        return _allow(answer, headers)

    def deny(self, denied: Denied, headers: Mapping[str, str]) -> Response:
        """Answer a client that may not chat here. Its page may read why, if its origin may chat."""
        code = CODES.get(denied.why, Code.UNAUTHENTICATED)
        answer = self._refuse(Refused(code, denied.message), denied.status)
        allowed = {} if denied.why in {"host", "origin"} else cors(headers)
        return replace(answer, headers={**answer.headers, **denied.headers, **allowed})

    async def _answer(self, request: Request, visitor: Visitor) -> Response | Stream:
        for pattern, methods in self._routes:
            if (match := pattern.fullmatch(request.path)) is not None:
                route = methods.get(request.method)
                if route is None:
                    return self._refuse_method(methods)
                return await route(request, visitor, *match.groups())
        raise Refused(Code.NOT_FOUND)

    async def _prompt(self, request: Request, visitor: Visitor) -> Stream:
        body = await self._read(request, visitor)
        if ai_sdk.recognizes(body):
            chat = ai_sdk.parse_chat(body)
            key = _owner(visitor), chat.conversation

            def reload_time() -> float:
                return RELOAD if key in self._hub.resuming else 0

            return await self._chat(chat, ai_sdk.AiSdk(), visitor, grace=reload_time)
        prompt = parse_prompt(body)
        generation = await self._accept(prompt.bare(), visitor)
        grace = _at_once if prompt.id is None else _by_setting
        return self._stream(generation, visitor, _SSE, grace=grace, request=prompt.request)

    async def _accept(self, prompt: Prompt, visitor: Visitor) -> Generation:
        owner = _owner(visitor)
        return await self._hub.scheduler.accept(prompt, owner, visitor.account, None, None)

    async def _run(self, request: Request, visitor: Visitor) -> Stream:
        """Make the run of an AG-UI client. One that chose no id stops the run by leaving it."""
        body = await self._read(request, visitor)
        chat = ag_ui.parse_chat(body)
        grace = _by_setting if "id" in chat.keys else _at_once
        return await self._chat(chat, ag_ui.AgUi(body), visitor, grace=grace)

    async def _connect(self, request: Request, visitor: Visitor) -> Response | Stream:
        """Give an AG-UI client the messages of its thread, and the reply that runs in it."""
        body = await self._read(request, visitor)
        ag_ui.check_run(body)
        owner, name = _owner(visitor), conversation_of(body["threadId"])
        messages = await self._history(name, visitor)
        generation = await self._reply_of(owner, name)
        if generation is None:
            whole = ag_ui.AgUi(body, messages).without_reply()
            return respond(HTTPStatus.OK, whole, headers=EVENTS)
        if messages is None or generation.conversation_id is None:
            messages = []  # the prompt has all
        else:
            live = await self._live(owner, name)
            before = live[: live.index(generation)] if generation in live else []
            ending = map(_messages_of, before)
            messages += itertools.chain.from_iterable(ending)
        return self._stream(generation, visitor, ag_ui.AgUi(body, messages))

    async def _history(self, name: str, visitor: Visitor) -> list[Message] | None:
        """Return the messages of a conversation that have ended; None for an unknown one."""
        hub, owner, room = self._hub, _owner(visitor), room_of(self._settings)
        hub.accounts.check_reads(visitor.account)
        try:
            async with hub.conversations.pin(owner, name) as conversation:
                stored = await hub.conversations.history(conversation, None, room)
        except Refused as refused:
            if refused.code is Code.NOT_FOUND:
                return None
            raise
        frame = history(stored, [], room, None)
        hub.accounts.charge_reads(visitor.account, len(encode(frame)))
        return frame.messages

    async def _read(self, request: Request, visitor: Visitor) -> dict[str, Any]:
        """Read the body of a request."""
        self._check_rate(visitor.account)
        size = HISTORIES * self._settings.message_size
        return decode_body(request.headers, await request.read_body(size))

    async def _chat(
        self, chat: Chat, dialect: StreamDialect, visitor: Visitor, *, grace: Grace
    ) -> Stream:
        """Accept the newest message of a chat; see :func:`wsserver.dialects.chat.prompt_keys`."""
        owner, conversations = _owner(visitor), self._hub.conversations
        if "id" not in chat.keys:  # else the reply may be known, and is given again
            self._hub.scheduler.check_limits(visitor.account)
        async with conversations.pin(owner, chat.conversation, load=True) as conversation:
            turns = [turn.id for turn in conversation.turns]
            turns += [generation.id for generation in conversation.live]
        keys = {**chat.keys, **prompt_keys(chat, turns)}
        generation = await self._accept(parse_prompt(keys), visitor)
        if generation.conversation_id is None:
            self._hub.note_unstored(owner, chat.conversation, generation)
        return self._stream(generation, visitor, dialect, grace=grace)

    async def _live(self, owner: str, name: str, *, sure: bool = False) -> list[Generation]:
        """Return the generations of a chat that have not ended, in order.

        Args:
            owner: the owner of the chat.
            name: the conversation that the chat is.
            sure: raise an error if a node does not answer that may have another one.
        """
        live = await self._hub.live_in(owner, name)
        try:
            unstored = await self._hub.unstored(owner, name)
        except Refused:
            if sure and not live:
                raise
            return live
        return live if unstored is None else [*live, unstored]

    async def _reply_of(self, owner: str, name: str) -> Generation | None:
        """Return the generation of a conversation that runs, or will; else one that ends."""
        live = await self._live(owner, name)
        lasting = [g for g in live if g.state in {State.QUEUED, State.RUNNING}]
        return next(iter(lasting or live), None)

    async def _resume_chat(self, _: Request, visitor: Visitor, chat: str) -> Response | Stream:
        self._check_rate(visitor.account)
        owner, name = _owner(visitor), conversation_of(unquote(chat))
        self._hub.note_resuming(owner, name)
        if self._hub.elsewhere is not None:
            await self._hub.elsewhere.resuming(owner, name)
        generation = await self._reply_of(owner, name)
        if generation is None:
            return Response(HTTPStatus.NO_CONTENT, NOT_STORED)
        return self._stream(generation, visitor, ai_sdk.AiSdk(), grace=lambda: RELOAD)

    async def _resume(self, request: Request, visitor: Visitor, name: str) -> Response | Stream:
        self._check_rate(visitor.account)
        after = seq_after(request, name)
        if after is None:  # an EventSource that has all connects again, unless told not to
            return Response(HTTPStatus.NO_CONTENT, NOT_STORED)
        generation, limit = await self._hub.resume(_owner(visitor), name, after, visitor.account)
        return self._stream(generation, visitor, _SSE, after=after, limit=limit)

    async def _stop(self, request: Request, visitor: Visitor, name: str) -> Response:
        """Stop a generation, or all of a chat."""
        owner, name = _owner(visitor), unquote(name)
        known = await self._hub.find_live(owner, name, visitor.account)
        found = (
            [known]
            if known is not None
            else await self._live(owner, conversation_of(name), sure=True)
        )
        running = [generation for generation in found if generation.state is not State.ENDED]
        if not running:
            raise Refused(Code.NOT_RUNNING)
        request.extend(self._settings.stop_timeout + self._settings.store_timeout)
        ended: asyncio.Future[list[str]] = self._loop.create_future()
        stopping = Stopping(self._hub, Stop(), lambda stopping: _settle(ended, stopping))
        for generation in running:
            stopping.stop(generation)
        stopping.complete_one()
        return respond(HTTPStatus.OK, encode(Stopped(ids=await ended)), JSON)

    def _stream(
        self,
        generation: Generation,
        visitor: Visitor,
        dialect: StreamDialect,
        *,
        after: int = 0,
        limit: int | None = None,
        grace: Grace | None = None,
        request: str | None = None,
    ) -> Stream:
        stream = ReplyStream(
            self._hub,
            generation,
            dialect,
            visitor,
            after=after,
            limit=limit or self._settings.frame_size,
            grace=grace or _by_setting,
            request=request,
            silence=self._settings.ping_interval,
            on_closed=self._forget,
        )
        self._streams[stream] = None
        return Stream(HTTPStatus.OK, {**EVENTS, **dialect.headers}, stream)

    def _forget(self, stream: ReplyStream) -> None:
        del self._streams[stream]
        if not self._streams:
            self._idle.set()

    @property
    def streams(self) -> Iterable[ReplyStream]:
        """The responses that stream a reply now."""
        return tuple(self._streams)

    async def delivered(self) -> None:
        """Wait until the clients have all that they follow, terminals included, or are gone."""
        while self._streams:
            self._idle.clear()
            await self._idle.wait()

    def _check_rate(self, account: Account) -> None:
        if wait := self._requests.consume(account, self._loop.time()):
            raise Refused(
                Code.LIMIT, "Too many requests at once. Try again in a moment.", retry_after=wait
            )

    def _refuse_method(self, methods: Iterable[str]) -> Response:
        refused = Refused(Code.INVALID_FRAME, "This address has no such method.")
        answer = self._refuse(refused, HTTPStatus.METHOD_NOT_ALLOWED)
        allowed = {"Allow": ", ".join([*methods, "OPTIONS"])}
        return replace(answer, headers={**answer.headers, **allowed})

    def _refuse(self, error: Exception, status: HTTPStatus | None = None) -> Response:
        """Answer with the error frame as JSON, as ``Session.refuse`` does on a socket."""
        refused, cause = refusal_of(error)
        frame = error_frame(self._hub.metrics, "prompt", refused, cause)
        headers = {}
        if frame.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(frame.retry_after))
        status = status or STATUS.get(frame.code, HTTPStatus.SERVICE_UNAVAILABLE)
        return respond(status, encode(frame), JSON, headers)


def _allow(answer: Response | Stream, headers: Mapping[str, str]) -> Response | Stream:
    return replace(answer, headers={**answer.headers, **cors(headers)})


def _owner(visitor: Visitor) -> str:
    assert visitor.principal is not None
    return visitor.principal.name


def _messages_of(generation: Generation) -> list[Message]:
    """Return the prompt and the reply so far of a generation in a conversation."""
    (prompt,) = generation.prompt.new_messages
    reply = generation.log.pieces.blocks(unfinished=True)
    return [
        Message("user", prompt.blocks, id=generation.id),
        Message("assistant", reply, id=generation.id),
    ]


def _settle(ended: "asyncio.Future[list[str]]", stopping: Stopping) -> None:
    if ended.done():  # the server has closed meanwhile
        return
    if stopping.ids:
        ended.set_result(stopping.ids)
    else:
        ended.set_exception(stopping.refused)


def _at_once() -> float:
    return 0


def _by_setting() -> None:
    return None
