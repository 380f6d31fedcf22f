"""Everything that can be configured: one field each, with a default, a unit and a reason.

A field ``send_timeout`` is the environment variable ``WSSERVER_SEND_TIMEOUT``, the flag
``--send-timeout`` of ``wsserver serve`` and the keyword ``send_timeout`` of
:func:`wsserver.serve`. A flag or keyword wins over the environment.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from wsserver.errors import ConfigError

__all__ = ["SECRETS", "SECTIONS", "Settings"]


class Unit(str):
    """What a field's number counts; part of its type."""

    __slots__ = ()


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("seconds")]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("seconds")]
Bytes = Annotated[int, Field(ge=1), Unit("bytes")]
Characters = Annotated[int, Field(ge=1), Unit("characters")]
Tokens = Annotated[int, Field(ge=1), Unit("tokens")]
Count = Annotated[int, Field(ge=0), Unit("number")]
Names = Annotated[tuple[str, ...], NoDecode]
PositiveCount = Annotated[int, Field(ge=1), Unit("number")]

PREFIX = "WSSERVER_"
CHAT_TOKEN = f"{PREFIX}CHAT_TOKEN"  # is no setting of a server's, but of `wsserver chat`
ANSWER_ROOM = 8192  # bytes of an answer besides the text in it
ESCAPED = 6  # bytes that JSON makes of one character at most
LEAST_SHARES = 32  # conversations or messages in memory: fewer, and a few clients take all of it
MIN_THINKING_BUDGET = 1024  # the least that the Messages API takes


SECRETS = ("jwt_secret", "metrics_token")
"""Settings that nobody else may see. Each may be in a file, which ``NAME_file`` names."""

SECTIONS = {
    "host": "where it listens",
    "model": "what answers",
    "tokens": "who may use it",
    "store": "what lasts",
    "message_size": "what a client may send",
    "generations": "how much runs at once",
    "connect_timeout": "how long things may take",
    "open_timeout": "how it treats readers",
    "metrics_token": "what its operator sees",
    "drain_timeout": "how it ends",
}
"""Where each section of the settings below begins, and what it is about."""


class Settings(BaseSettings):
    """How this server behaves.

    Raises:
        pydantic.ValidationError: a value does not fit; :meth:`load` makes that one clear line.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # which may be a secret
    )

    # Where it listens.
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. Loopback, so that nobody else's machine reaches it until you decide
    otherwise."""
    port: Annotated[int, Field(ge=0, le=65535), Unit("port")] = 3001
    """Port to listen on; 0 lets the system choose."""
    unix_socket: str = ""
    """Path of a unix socket to listen on, in place of `host` and `port`; for a proxy on the same
    machine."""
    unix_socket_mode: str = "660"
    """Who may connect to the unix socket: its file's permissions, in octal."""
    cert: str = ""
    """TLS certificate, as a PEM file with the intermediate ones; the server then speaks `wss` and
    `https` alone. SIGHUP has it read again, for new connections."""
    key: str = ""
    """Its private key, as a PEM file without a password. Default: it is in the file of `cert`."""
    event_loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    """What reads and writes: `uvloop` costs less per token, `asyncio` is Python's own; `auto`
    takes the first where it is installed. Of `wsserver serve` alone."""

    # What answers.
    model: str = ""
    """What answers: `demo`, `anthropic:MODEL` (or a bare `claude-…`), or
    `package.module:attribute` for a model of your own. Default: claude-sonnet-4-6 where
    the environment has Anthropic credentials, else demo."""
    models: Names = ()
    """Other model ids that a prompt may ask for, separated by commas. Empty, as each is a price
    that you agree to pay."""
    system: str = ""
    """System prompt where a prompt brings none."""
    max_tokens: Tokens = 8192
    """Output tokens per reply where a prompt says nothing."""
    max_tokens_limit: Tokens = 32_768
    """The most output tokens that a prompt may ask for; a higher wish is lowered to this."""
    thinking: str = ""
    """Extended thinking: `adaptive`, `disabled`, or a budget in tokens (1024 or more). Default:
    whatever the model does by itself."""
    prompt_caching: bool = True
    """Let Anthropic cache the conversation so far, which makes every further turn cheaper."""
    demo_rate: Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("words/s")] = 25.0
    """Pace of the demo model, by default a human reading pace; 0 is as fast as it can."""

    # Who may use it.
    tokens: str = ""
    """Tokens that let principals in, `NAME sha256:DIGEST` each, separated by commas;
    `wsserver token new NAME` makes one. Digests, so that whoever reads them cannot use them."""
    token_file: str = ""
    """A file of such lines, read again on SIGHUP; sockets whose token is gone are then closed."""
    jwt_secret: SecretStr = SecretStr("")
    """Secret of 32 bytes or more that JSON Web Tokens are signed with (HS256). Better not as a
    flag, which other users of the machine can see."""
    jwt_secret_file: str = ""
    """A file that has the secret in place of `jwt_secret`, read again on SIGHUP. One line end
    after the secret is not a part of it."""
    jwt_jwks: str = ""
    """Keys that JSON Web Tokens are signed with (RS256, PS256, ES256, EdDSA), instead of a secret:
    the path of a JSON Web Key Set, or the `https://` address where their issuer has it."""
    jwt_audience: str = ""
    """The `aud` that a token must name. An address in `jwt_jwks` demands it, as its keys sign
    tokens for others too. Empty: a token that names any is refused, as it is meant for another."""
    jwt_issuer: str = ""
    """The `iss` that a token must name; empty for any, as the keys tell enough."""
    jwt_claim: Annotated[str, Field(min_length=1)] = "sub"
    """Which claim of a token is the user's name. It must never pass from one person to another, as
    an e-mail address can: conversations belong to it."""
    jwt_leeway: Seconds = 10.0
    """That the clocks of a token's issuer and of this server may differ."""
    allow_anonymous: bool = False
    """Serve whoever can reach an address that is not loopback. Off, as they spend your money and
    share all their conversations."""
    auth_timeout: PositiveSeconds = 10.0
    """For a client to send its `auth` frame; it takes a slot that others may need."""
    hosts: Names = ()
    """Names under which browsers reach this server, separated by commas, `*.example.com` for all
    below one. Addresses and localhost are always served; any other name may be an attacker's that
    was made to lead here."""
    origins: Names = ()
    """Web pages of other origins that may connect, separated by commas: `https://example.com`,
    `https://*.example.com`, `null` for pages opened as files, which any page can pass for, or
    `*`. By default only this server's own, and while it listens on loopback those of
    localhost."""
    proxies: Names = ()
    """Addresses or networks of proxies whose `X-Forwarded-For` is believed, separated by commas;
    `unix` for whoever is at the unix socket. From anyone else it is a claim."""

    # What lasts.
    store: str = "memory:"
    """Where conversations last: `memory:` for as long as the process, or `sqlite:///PATH` for a
    file (with four slashes for an absolute path). `wsserver serve` by itself uses a file in the
    user's data folder."""
    save_interval: PositiveSeconds = 0.1
    """Between two writes of what replies have said since. A crash loses no more than that, and
    what is said while it is written."""
    store_timeout: PositiveSeconds = 5.0
    """For the store to save; a reply then ends as not saved."""
    bytes_per_principal: Bytes = 268_435_456
    """What one principal's conversations may take in the store; more prompts are then refused until
    some are deleted. All the anonymous are one."""
    conversations_per_principal: PositiveCount = 10_000
    """Conversations that one principal may have in the store."""
    retention_days: Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("days")] = 0.0
    """That a conversation is kept after its last use, and then deleted; 0 keeps it for ever."""

    # What a client may send.
    message_size: Bytes = 65_536
    """Largest WebSocket message accepted; a larger one closes the socket with 1009."""
    prompt_size: Bytes = 32_768
    """Largest prompt, or messages together, as UTF-8."""
    bad_frames: PositiveCount = 20
    """Unusable frames, or those over the rate, in a row after which a socket is closed with 1008.
    Enough for a person who tries things out by hand."""
    frame_rate: Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("frames/s")] = 5.0
    """Frames of one socket in the long run, and more than a person at a keyboard sends. A `stop`
    is always obeyed. WebSocket's own pings are counted apart; too many close the socket."""
    frame_burst: PositiveCount = 40
    """Frames at once: a client that comes back asks again for all that it had open."""
    prompts_per_minute: PositiveCount = 60
    """Prompts of one principal, or of one address where nobody says who they are."""
    tokens_per_day: Count = 1_000_000
    """Tokens of one principal per day (UTC), input and output. What is read from Anthropic's cache
    counts a tenth, what is written to it a quarter more. All the anonymous are one. 0 sets no
    limit."""
    dollars_per_day: Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("US dollars")] = 15.0
    """The same in money, by the prices of the models; a million tokens of claude-sonnet cost at
    most that. 0 sets no limit."""
    prices: Names = ()
    """Prices of other models, or other prices, in US dollars for a million tokens:
    `MODEL=INPUT/OUTPUT` or `MODEL=INPUT/OUTPUT/CACHE WRITE/CACHE READ`, separated by commas.
    Claude's are known; a model of your own costs nothing until you say."""

    # How much runs at once.
    generations: PositiveCount = 800
    """Replies running or queued in this process, and connections to the model's API with them."""
    generations_per_socket: PositiveCount = 4
    """Replies running or queued for one socket, so that one client cannot take them all."""
    generations_per_principal: PositiveCount = 32
    """Replies running or queued for one principal, or one address where nobody says who they
    are, on however many sockets."""
    connections: PositiveCount = 10_000
    """Open connections of this process, about 60 MB of them, without TLS; more get 503. Where the
    limit of file descriptors (`ulimit -n`) allows fewer, it is lowered at the start, and so are
    `generations`."""
    connections_per_principal: PositiveCount = 100
    """Open sockets of one principal: tabs, devices and scripts."""
    connections_per_address: PositiveCount = 100
    """Open connections of one address, or of one /64 network of IPv6, handshakes included; more
    get 429. Many people may share an address. A /56 gets twice as many, a /48 four times."""
    queue_size: Count = 8
    """Prompts that may wait in one conversation with `on_busy: queue`."""
    conversations: PositiveCount = 10_000
    """Conversations kept in memory; the one idle for longest is dropped first."""
    history_messages: PositiveCount = 200
    """Messages of a conversation that are sent to the model. Where there are more, the oldest turns
    are dropped, many at once: the prompt cache then matches until the next time."""
    history_size: Characters = 400_000
    """Characters of a conversation that are kept and sent to the model, about 100,000 tokens of
    English; the oldest turns are dropped in the same way."""
    memory: Bytes = 536_870_912
    """Bytes in memory for all that clients send, ask for and are kept for; the program itself takes
    about 120 MiB more, so that all fits into 1 GiB. Conversations and replies that nobody needs are
    dropped first. One principal or address may hold an eighth of what is free."""
    reply_size: Characters = 4_000_000
    """Characters of one reply, after which it ends as `max_tokens`: a model of one's own may know
    no end."""

    # How long things may take.
    connect_timeout: PositiveSeconds = 5.0
    """To reach the model's API."""
    warm_connections: bool = True
    """Open one connection to the model's API when a client connects or sends its first frame, if
    none is idle, so that the first token waits for neither TCP nor TLS."""
    silence_timeout: PositiveSeconds = 60.0
    """Silence of a model after which its reply fails. Its keep-alives do not count."""
    reply_timeout: PositiveSeconds = 600.0
    """A whole reply; it is then stopped."""
    stop_timeout: PositiveSeconds = 5.0
    """For a stopped model to close its request, before the stop is reported regardless."""
    retries: Count = 2
    """New attempts after the model's API failed before its first token."""
    retry_budget: Seconds = 15.0
    """For all pauses between attempts together; a longer retry-after is passed on to the client
    instead."""
    grace: Seconds = 30.0
    """That a reply runs on when its last reader is gone; 0 stops it at once."""
    grace_tokens: Count = 2000
    """The same in output tokens, estimated: no more is spent on a reply that nobody reads. Where
    the connection died without a close frame, the reply runs on for 15 s regardless: the client
    has to notice first."""
    replay: Seconds = 300.0
    """That an ended reply is kept, so that a prompt sent again gets it and not a second one."""
    replay_size: Bytes = 67_108_864
    """All ended replies that are kept, about; the oldest are forgotten first."""

    # How it treats readers.
    open_timeout: PositiveSeconds = 5.0
    """For the opening handshake."""
    ping_interval: PositiveSeconds = 20.0
    """Between keep-alive pings, well below the 60 s after which common proxies cut a silent
    connection."""
    ping_timeout: PositiveSeconds = 20.0
    """For the answer to a ping; the peer is then taken for gone."""
    idle_timeout: Seconds = 3600.0
    """That a client may neither ask nor follow anything, before its socket is closed with 1000:
    one that has been forgotten takes a slot. Pings do not count; 0 waits for ever."""
    send_timeout: PositiveSeconds = 10.0
    """That a reader may take nothing of what waits for it; its socket is then aborted."""
    write_buffer: Bytes = 32_768
    """Unsent data of one socket above which it gets no more text until it has read; little, so
    that a stop is seen at once."""
    max_unsent: Bytes = 262_144
    """Unsent data of one socket, answers and pongs included, above which it is aborted."""
    frame_size: Characters = 16_384
    """Characters up to which text that waited for a slow reader is merged into one frame."""

    # What its operator sees.
    metrics_token: SecretStr = SecretStr("")
    """Bearer token for `/metrics`. Without one they are at `operations_port`, or on a server that
    is for this machine alone, as they tell how much is going on. Better not as a flag, which
    other users of the machine can see."""
    metrics_token_file: str = ""
    """A file that has the token in place of `metrics_token`, read again on SIGHUP. One line end
    after the token is not a part of it."""
    operations_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address of the port for operators."""
    operations_port: Annotated[int, Field(ge=0, le=65535), Unit("port")] | None = None
    """Another port for `/metrics`, `/readyz` and `/healthz`, which ask nobody for anything, so
    that the port for clients need not have the first two. Without one they are at the same. On
    loopback it gives the metrics only under an address, localhost or a name in `hosts`."""
    log_level: str = "info"
    """Least severe log lines that `wsserver serve` shows: debug, info, warning or error. Only debug
    shows the texts of exceptions, which may tell what should stay secret."""

    # How it ends.
    drain_timeout: Seconds = 15.0
    """That running replies get to finish on SIGTERM or Ctrl-C; they are then stopped."""
    shutdown_timeout: Seconds = 27.0
    """For the whole shutdown, within the 30 s that service managers commonly give; what is left
    is aborted."""

    @field_validator("models", "prices", "hosts", "origins", "proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("prices")
    @classmethod
    def _check_prices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        number = r"\d{1,9}(\.\d{1,9})?"
        for price in value:
            if not re.fullmatch(rf".+={number}/{number}(/{number}/{number})?", price, re.ASCII):
                raise ValueError(f"{price!r} is not MODEL=INPUT/OUTPUT, such as my-model=1/5")
        return value

    @field_validator("thinking")
    @classmethod
    def _check_thinking(cls, value: str) -> str:
        if value in {"", "adaptive", "disabled"}:
            return value
        if value.isascii() and value.isdigit() and int(value) >= MIN_THINKING_BUDGET:
            return value
        raise ValueError(f"adaptive, disabled, or a number from {MIN_THINKING_BUDGET}")

    @field_validator("unix_socket_mode")
    @classmethod
    def _check_mode(cls, value: str) -> str:
        if not re.fullmatch("0?[0-7]{3}", value, re.ASCII):
            raise ValueError("three octal digits, such as 660")
        return value

    @field_validator("log_level")
    @classmethod
    def _check_level(cls, value: str) -> str:
        if value.lower() not in {"debug", "info", "warning", "error"}:
            raise ValueError("debug, info, warning or error")
        return value.lower()

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.key and not self.cert:
            raise ValueError("key needs cert, the certificate that it belongs to")
        # Else what was meant to keep strangers out would let everybody in.
        keys = self.jwt_secret.get_secret_value() or self.jwt_secret_file or self.jwt_jwks
        if (self.jwt_audience or self.jwt_issuer) and not keys:
            raise ValueError("jwt_audience and jwt_issuer need jwt_secret or jwt_jwks")
        for name in SECRETS:
            if getattr(self, name).get_secret_value() and getattr(self, f"{name}_file"):
                raise ValueError(f"give one of {name} and {name}_file, and not both")
        if self.prompt_size > self.message_size:
            raise ValueError("prompt_size must not be over message_size")
        if self.max_tokens > self.max_tokens_limit:
            raise ValueError("max_tokens must not be over max_tokens_limit")
        if self.thinking.isdigit() and int(self.thinking) >= self.max_tokens:
            raise ValueError("thinking must be less than max_tokens, of which it is a part")
        if self.write_buffer + 2 * ESCAPED * self.frame_size > self.max_unsent:
            raise ValueError(
                f"max_unsent must be at least write_buffer and {2 * ESCAPED} times frame_size"
            )
        if ESCAPED * self.prompt_size + ANSWER_ROOM > self.answer_size:
            raise ValueError(
                f"max_unsent must be at least write_buffer and {ESCAPED} times prompt_size and "
                f"{ANSWER_ROOM}: else a prompt could not be shown again"
            )
        if 4 * self.history_size * LEAST_SHARES > self.memory:  # Python's 4 bytes a character
            raise ValueError(f"memory must be at least {4 * LEAST_SHARES} times history_size")
        if self.message_size * LEAST_SHARES > self.memory:
            raise ValueError(f"memory must be at least {LEAST_SHARES} times message_size")
        if self.drain_timeout > self.shutdown_timeout:
            raise ValueError("drain_timeout must not be over shutdown_timeout")
        return self

    @property
    def answer_size(self) -> int:
        """Bytes of the largest frame that the server sends: one that an idle socket may hold."""
        return self.max_unsent - self.write_buffer

    def secret(self, name: str) -> str:
        """Return a secret, from its file where it has one; empty where there is none.

        Args:
            name: one of :data:`SECRETS`.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        setting = f"{name}_file"
        path = getattr(self, setting)
        if not path:
            value = getattr(self, name).get_secret_value()
            assert isinstance(value, str)
            return value
        try:
            text = Path(path).expanduser().read_text()
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text, or not a path"
            raise ConfigError(f"{setting}: cannot read {path}: {reason}") from None
        if not (value := text.removesuffix("\n").removesuffix("\r")):
            raise ConfigError(f"{setting}: {path} is empty")
        return value

    @classmethod
    def unit(cls, name: str) -> str:
        """Return what a field's value is: a unit for a number, else the kind of value."""
        field = cls.model_fields[name]
        units = [str(item) for item in field.metadata if isinstance(item, Unit)]
        return units[0] if units else "yes or no" if field.annotation is bool else "text"

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Read the environment, and let what is given win over it.

        Raises:
            ConfigError: a value does not fit, or there is no such setting.
        """
        known = {CHAT_TOKEN, *(PREFIX + name.upper() for name in cls.model_fields)}
        for variable in os.environ:
            if variable.upper().startswith(PREFIX) and variable.upper() not in known:
                hint = ""
                if "://" in os.environ[variable] or "_SERVICE_" in variable:
                    hint = " (Kubernetes makes such ones; see enableServiceLinks of a pod)"
                raise ConfigError(f"{variable}: there is no such setting{hint}")
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if name in cls.model_fields and name not in given:
                name = PREFIX + name.upper()
            message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
            raise ConfigError(f"{name}: {message}" if name else message) from None
