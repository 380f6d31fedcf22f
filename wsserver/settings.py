"""The settings: one field each, with a default, a unit and a reason.

The field ``send_timeout`` is the environment variable ``WSSERVER_SEND_TIMEOUT``, the flag
``--send-timeout`` of ``wsserver serve`` and the keyword ``send_timeout`` of :func:`wsserver.serve`.
A flag or keyword wins over the environment.

An operator decides the settings of the first sections. The sections from :data:`TUNING` on have
defaults that rarely need a change. The first sentence of a description is its line in
``wsserver serve --help``.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from wsserver.errors import ConfigError


class Unit(str):
    """The unit of a field's value, as part of the field's type."""

    __slots__ = ()


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("seconds")]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("seconds")]
Bytes = Annotated[int, Field(ge=1), Unit("bytes")]
Characters = Annotated[int, Field(ge=1), Unit("characters")]
Tokens = Annotated[int, Field(ge=1), Unit("tokens")]
Count = Annotated[int, Field(ge=0), Unit("number")]
Names = Annotated[tuple[str, ...], NoDecode, Unit("names")]
File = Annotated[str, Unit("path")]
PositiveCount = Annotated[int, Field(ge=1), Unit("number")]

PREFIX = "WSSERVER_"
CHAT_TOKEN = f"{PREFIX}CHAT_TOKEN"  # a variable of `wsserver chat`, and no setting of a server
ANSWER_ROOM = 16_384  # bytes of an answer besides its text
ESCAPED = 6  # most bytes of one character in JSON
LEAST_SHARES = 32  # conversations, or messages, of the largest size that must fit into memory
MIN_THINKING_BUDGET = 1024  # smallest budget that the Messages API accepts

SECRETS = ("jwt_secret", "metrics_token")
"""Settings that are secret. The setting ``NAME_file`` names a file with the secret instead."""

REMOVED = {
    "jwt_leeway": "the clocks may always differ by 10 seconds",
    "retry_budget": "the pauses between attempts are always at most 15 seconds together",
}
"""Settings of earlier versions, and the rule that replaces each."""

SECTIONS = {
    "host": "listening",
    "model": "the model",
    "token_file": "access",
    "store": "storage",
    "prompts_per_minute": "limits",
    "metrics_token_file": "operation",
    "unix_socket_mode": "listening and event loop",
    "max_tokens_limit": "the model's API",
    "tokens": "tokens and handshakes",
    "save_interval": "the store",
    "message_size": "frames and prompts",
    "generations_per_socket": "concurrency",
    "history_messages": "conversations and replies",
    "open_timeout": "sockets",
    "metrics_token": "metrics and shutdown",
}
"""Title of each section of the settings, by the first field of the section."""

TUNING = "unix_socket_mode"
"""First field of the sections that rarely need a change."""


class Settings(BaseSettings):
    """The settings of a server.

    Raises:
        pydantic.ValidationError: a value is invalid; :meth:`load` raises a one-line error instead.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # the input may be a secret
    )

    # Listening.
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. Loopback keeps all other machines out until you decide otherwise."""
    port: Annotated[int, Field(ge=0, le=65535), Unit("port")] = 3001
    """Port to listen on. 0 lets the system choose."""
    unix_socket: File = ""
    """Unix socket to listen on instead. A proxy on the same machine can then reach the server
    without a port."""
    cert: File = ""
    """TLS certificate, a PEM file. The file includes the intermediate certificates. With a
    certificate the server speaks `wss` and `https` only. SIGHUP reloads the file for new
    connections."""
    key: File = ""
    """Private key of the certificate, a PEM file. The key has no password. Empty: the key is in the
    file of `cert`."""

    # The model.
    model: str = ""
    """demo, claude-…, openai:NAME or module:function. The model that answers. `openai:NAME` is of a
    server that speaks Chat Completions, `anthropic:NAME` of one that speaks the Messages API, and
    `package.module:attribute` your own. Empty: claude-sonnet-4-6 if the environment has Anthropic
    credentials, else demo."""
    models: Names = ()
    """Other models that a prompt may choose. Separated by commas, with the names that the API of
    `model` knows. Empty by default, because each model has its own price."""
    titles: str = ""
    """Model that writes the titles of conversations. One short request after the first reply; it
    counts for the principal. A name of a model, `on` for the model that replied, or `off` for the
    first words of the prompt. Empty: `on` for `anthropic:` and `openai:`, else `off`."""
    system: str = ""
    """System prompt for prompts that have none."""
    max_tokens: Tokens = 8192
    """Output tokens per reply. A prompt may set another number."""

    # Access.
    token_file: File = ""
    """Tokens of principals, one per line. A line is `NAME sha256:DIGEST`; `wsserver token new NAME`
    makes one. SIGHUP reloads the file, and closes the sockets whose token was removed."""
    jwt_secret_file: File = ""
    """Secret that signs JSON Web Tokens (HS256). 32 bytes or more. The file replaces `jwt_secret`.
    SIGHUP reloads the file. A line end at the end of the file is not part of the secret."""
    jwt_jwks: str = ""
    """Public keys that check JSON Web Tokens. The path of a JSON Web Key Set, or the `https://`
    address where the issuer publishes the keys (RS256, PS256, ES256, EdDSA)."""
    jwt_audience: str = ""
    """Audience (`aud`) that a JSON Web Token must name. Required if `jwt_jwks` is an address,
    because the issuer signs tokens for other services with the same keys. Empty: a token that names
    an audience is refused, because the token is meant for another service."""
    hosts: Names = ()
    """Host names of this server. Separated by commas; `*.example.com` for all subdomains. Addresses
    and localhost always work. Any other name could belong to an attacker whose DNS leads to this
    server."""
    origins: Names = ()
    """Web pages of other origins that may connect. Separated by commas: `https://example.com`,
    `https://*.example.com`, `*`, or `null` for pages opened as files, an origin that any page can
    claim. Empty: the server's own page, and pages of localhost while the server listens on
    loopback."""
    proxies: Names = ()
    """Proxies whose X-Forwarded-For is trusted. Addresses or networks, separated by commas; `unix`
    for every client of the unix socket. No other client can set the header, because it could
    claim any address."""
    allow_anonymous: bool = False
    """Serve clients without a token. Off by default, because anonymous clients spend your money and
    share all their conversations."""

    # Storage.
    store: str = "memory:"
    """Where conversations are stored. `memory:` until the process ends, or `sqlite:///PATH` for a
    file (four slashes for an absolute path), or `postgresql://USER@HOST/DATABASE`. `wsserver serve`
    without this setting uses a file in the user's data folder."""
    cluster: str = ""
    """Redis that connects the nodes of a cluster. Its address, as `redis://HOST:PORT/0`, with TLS
    `rediss://`, or `redis+sentinel://HOST:PORT/SERVICE/0`. All nodes have the same `store`, in
    PostgreSQL. Empty: this server is alone."""
    workers: PositiveCount = 1
    """Processes that share the port. Each is a node of the `cluster`, with limits of its own for
    memory and connections. Worker N, counted from 0, has the `operations_port` plus N. Only for
    `wsserver serve`."""
    retention_days: Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("days")] = 0.0
    """Days until an unused conversation is deleted. 0 keeps all conversations."""

    # Limits.
    prompts_per_minute: PositiveCount = 60
    """Prompts per minute of one principal. For anonymous clients the limit is per address."""
    tokens_per_day: Annotated[int, Field(ge=0), Unit("tokens")] = 1_000_000
    """Tokens per day (UTC) of one principal. Input and output together. A token read from
    Anthropic's cache counts a tenth, a token written to the cache counts 1.25. All anonymous
    clients are one principal. 0 sets no limit."""
    dollars_per_day: Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("dollars")] = 15.0
    """US dollars per day (UTC) of one principal. The server uses the prices of the models; a
    million output tokens of claude-sonnet cost 15 dollars. 0 sets no limit."""
    generations: PositiveCount = 800
    """Replies that run or wait at the same time. Each running reply has one connection to the
    model's API."""
    connections: PositiveCount = 10_000
    """Open connections. 10,000 take about 60 MB without TLS. Further connections get status 503.
    The server lowers this limit and `generations` at the start if the limit of file descriptors
    (`ulimit -n`) is too low."""
    memory: Bytes = 536_870_912
    """Memory for all clients together. The program takes about 120 MiB more, so both fit
    into 1 GiB. The server first drops conversations and replies that no client uses. One principal
    or address may use an eighth of the free memory."""

    # Operation.
    metrics_token_file: File = ""
    """Bearer token for `/metrics`. The file replaces `metrics_token`. SIGHUP reloads the file. A
    line end at the end of the file is not part of the token."""
    operations_port: Annotated[int | None, Field(ge=0, le=65535), Unit("port")] = None
    """Separate port for operators. It serves `/metrics`, `/readyz` and `/healthz` without a login;
    the port for clients then has only `/healthz`. Empty: the port for clients serves all three. On
    loopback the host name for `/metrics` must be an address, localhost or in `hosts`."""
    log_level: str = "info"
    """debug, info, warning or error. `wsserver serve` shows log lines of this level and above. Only
    debug shows the texts of exceptions and of the model's API, which may contain secrets."""
    drain_timeout: Seconds = 15.0
    """Time for replies to finish at a shutdown. After this time the server stops them."""

    # Tuning: listening and event loop.
    unix_socket_mode: str = "660"
    """Permissions of the unix socket, in octal. They decide which users may connect."""
    event_loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    """Event loop of `wsserver serve`. `uvloop` needs less CPU per token; `asyncio` is Python's own;
    `auto` is `uvloop` if it is installed."""

    # Tuning: the model.
    max_tokens_limit: Tokens = 32_768
    """Most output tokens that a prompt may set. The server lowers a higher value to this limit,
    because tokens cost money."""
    thinking: str = ""
    """Extended thinking. `adaptive`, `disabled`, or a budget in tokens (1024 or more). Empty: the
    model's own default."""
    prompt_caching: bool = True
    """Let Anthropic cache the conversation. Each further turn is then cheaper."""
    prices: Names = ()
    """Prices of other models, or other prices of Claude models. US dollars for a million tokens,
    separated by commas: `MODEL=INPUT/OUTPUT` or `MODEL=INPUT/OUTPUT/CACHE WRITE/CACHE READ`. A
    model of your own costs nothing until you set a price."""
    connect_timeout: PositiveSeconds = 5.0
    """Time to connect to the model's API. A working API answers in much less."""
    warm_connections: bool = True
    """Open a connection to the model's API when a client connects or sends its first frame. The
    first token then does not wait for TCP and TLS. The server does so only if no connection is
    idle."""
    silence_timeout: PositiveSeconds = 60.0
    """Silence of a model after which its reply fails. Keep-alives of the API do not end a silence,
    because they say nothing about the reply."""
    retries: Count = 2
    """New attempts if the model's API fails before the first token. Most such failures are
    short."""
    demo_rate: Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("words/s")] = 25.0
    """Words per second of the demo model. The default is a human reading pace; 0 sets no pause."""

    # Tuning: tokens and handshakes.
    tokens: str = ""
    """Tokens of principals, `NAME sha256:DIGEST` each, separated by commas. For environments
    without files. The digests are not secret: nobody can log in with a digest."""
    jwt_secret: SecretStr = SecretStr("")
    """Secret that signs JSON Web Tokens (HS256). 32 bytes or more. Use `jwt_secret_file` or the
    environment: other users of the machine can see a flag."""
    jwt_issuer: str = ""
    """Issuer (`iss`) that a JSON Web Token must name. Empty: any, because the keys identify the
    issuer."""
    jwt_claim: Annotated[str, Field(min_length=1)] = "sub"
    """Claim of a JSON Web Token that is the principal's name. The claim must never pass from one
    person to another, as an e-mail address can: conversations belong to the name."""
    auth_timeout: PositiveSeconds = 10.0
    """Time for a client to send its `auth` frame. Until then its socket uses up one connection of
    the limits."""

    # Tuning: the store.
    save_interval: PositiveSeconds = 0.1
    """Time between two writes of the text of running replies. A crash loses at most the text of
    this time and of one write."""
    lease: PositiveSeconds = 10.0
    """Time after which the other nodes of a cluster hold a node for dead that does not renew. Its
    replies then end as `interrupted`."""
    store_timeout: PositiveSeconds = 5.0
    """Time for the store to save the end of a reply. After this time the client gets the end of the
    reply as not saved."""
    bytes_per_principal: Bytes = 268_435_456
    """Size of one principal's conversations in the store. The server refuses prompts over the limit
    until the client deletes conversations. All anonymous clients are one principal."""
    conversations_per_principal: PositiveCount = 10_000
    """Conversations of one principal in the store. The limit keeps the lists of one principal
    short."""

    # Tuning: frames and prompts.
    message_size: Bytes = 65_536
    """Largest WebSocket message. A larger message closes the socket with 1009."""
    prompt_size: Bytes = 32_768
    """Largest prompt, or all messages of one prompt, as UTF-8."""
    bad_frames: PositiveCount = 20
    """Unusable frames, or frames over the rate, in a row before the socket is closed with 1008.
    Enough for a person who types frames by hand."""
    frame_rate: Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("frames/s")] = 5.0
    """Frames per second of one socket over time. More than a person at a keyboard sends. A `stop`
    frame always works. WebSocket pings have a limit of their own."""
    frame_burst: PositiveCount = 40
    """Frames of one socket at once. A client that reconnects sends many frames."""

    # Tuning: concurrency.
    generations_per_socket: PositiveCount = 4
    """Replies that run or wait for one socket. One client cannot take all of `generations`."""
    generations_per_principal: PositiveCount = 32
    """Replies that run or wait for one principal on all its sockets. For anonymous clients the
    limit is per address."""
    connections_per_principal: PositiveCount = 100
    """Open sockets of one principal: tabs, devices and scripts."""
    connections_per_address: PositiveCount = 100
    """Open connections of one address, or of one /64 network of IPv6, handshakes included. Further
    connections get status 429. Many people may share an address. A /56 network gets twice as many,
    a /48 network four times."""
    queue_size: Count = 8
    """Prompts that may wait in one conversation with `on_busy: queue`."""
    conversations: PositiveCount = 10_000
    """Conversations in memory. The server drops the conversation that is idle for longest."""

    # Tuning: conversations and replies.
    history_messages: PositiveCount = 200
    """Messages of a conversation that the model gets. Over the limit the server leaves out the
    oldest turns, many at once: the prompt cache then matches until the next time."""
    history_size: Characters = 400_000
    """Characters of a conversation that the model gets, about 100,000 tokens of English. Over the
    limit the server leaves out the oldest turns in the same way."""
    reply_size: Characters = 4_000_000
    """Characters of one reply. At the limit the reply ends as `max_tokens`: a model of your own may
    never end."""
    reply_timeout: PositiveSeconds = 600.0
    """Time for a whole reply. After this time the server stops the reply."""
    stop_timeout: PositiveSeconds = 5.0
    """Time for a stopped model to close its request. After this time the server sends the last
    frame of the reply anyway."""
    grace: Seconds = 30.0
    """Time that a reply continues without readers, so that a client can reconnect. 0 stops the
    reply at once."""
    grace_tokens: Count = 2000
    """Output tokens (estimated) that a reply may produce without readers. If the connection died
    without a close frame, the reply continues for at least 15 s, because the client has to notice
    first."""
    replay: Seconds = 300.0
    """Time that the server keeps an ended reply in memory. A prompt that is sent again gets this
    reply, and not a second one."""
    replay_size: Bytes = 67_108_864
    """Size of all ended replies in memory. The server drops the oldest ones first."""

    # Tuning: sockets.
    open_timeout: PositiveSeconds = 5.0
    """Time for the opening handshake. A slow handshake uses up one connection of the limits."""
    ping_interval: PositiveSeconds = 20.0
    """Time between two keep-alive pings. Common proxies cut a connection that is silent for
    60 s."""
    ping_timeout: PositiveSeconds = 20.0
    """Time for the answer to a ping. After this time the connection counts as lost."""
    idle_timeout: Seconds = 3600.0
    """Time without a request or a reply before the socket is closed with 1000. Pings do not count.
    0 never closes the socket."""
    send_timeout: PositiveSeconds = 10.0
    """Time without progress while data waits for a client that does not read. After this time the
    server aborts the connection."""
    write_buffer: Bytes = 32_768
    """Unsent data of one socket above which the server writes no more text to it. A small value
    makes a stop take effect at once."""
    max_unsent: Bytes = 262_144
    """Unsent data of one socket, including answers and pongs, above which the server aborts the
    connection."""
    frame_size: Characters = 16_384
    """Most characters of merged text in one frame. Larger frames would delay a stop."""

    # Tuning: operation.
    metrics_token: SecretStr = SecretStr("")
    """Bearer token for `/metrics`. Without it, `/metrics` is served only at `operations_port`, or
    if only this machine can reach the server. Use `metrics_token_file` or the environment: other
    users of the machine can see a flag."""
    operations_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address of `operations_port`. Loopback by default, because the port needs no login."""
    shutdown_timeout: Seconds = 27.0
    """Time for the whole shutdown. Service managers commonly give 30 s. After this time the server
    aborts everything that is left."""

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
            raise ValueError("key needs cert, the certificate of the key")
        # Without this check, such settings would look like protection and have no effect.
        keys = self.jwt_secret.get_secret_value() or self.jwt_secret_file or self.jwt_jwks
        if (self.jwt_audience or self.jwt_issuer) and not keys:
            raise ValueError("jwt_audience and jwt_issuer need jwt_secret or jwt_jwks")
        for name in SECRETS:
            if getattr(self, name).get_secret_value() and getattr(self, f"{name}_file"):
                raise ValueError(f"set one of {name} and {name}_file, not both")
        if self.prompt_size > self.message_size:
            raise ValueError("prompt_size must not be over message_size")
        if self.max_tokens > self.max_tokens_limit:
            raise ValueError("max_tokens must not be over max_tokens_limit")
        if self.thinking.isdigit() and int(self.thinking) >= self.max_tokens:
            raise ValueError("thinking must be less than max_tokens, which includes thinking")
        if self.write_buffer + 2 * ESCAPED * self.frame_size > self.max_unsent:
            raise ValueError(
                f"max_unsent must be at least write_buffer and {2 * ESCAPED} times frame_size"
            )
        if ESCAPED * self.prompt_size + ANSWER_ROOM > self.answer_size:
            raise ValueError(
                f"max_unsent must be at least write_buffer and {ESCAPED} times prompt_size and "
                f"{ANSWER_ROOM}: a history with the largest prompt must fit"
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
        """Bytes of the largest frame that the server sends to a socket without unsent data."""
        return self.max_unsent - self.write_buffer

    def secret(self, name: str) -> str:
        """Return a secret, from its file if there is one; empty without a secret.

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
        """Return the unit of a field's value, or the kind of value if there is no unit."""
        field = cls.model_fields[name]
        units = [str(item) for item in field.metadata if isinstance(item, Unit)]
        if units:
            return units[0]
        return "yes or no" if field.annotation is bool else "text"

    @classmethod
    def shown_default(cls, name: str) -> str:
        """Return a field's default for people; empty if the field is empty by default."""
        default = cls.model_fields[name].default
        if isinstance(default, bool):
            return str(default).lower()
        if isinstance(default, float):
            return f"{default:g}"
        return "" if str(default) in {"", "()", "None"} else str(default)

    @classmethod
    def sections(cls, *, tuning: bool) -> dict[str, list[str]]:
        """Return the fields of each section by its title.

        Args:
            tuning: True for the sections that rarely need a change, False for the sections that an
                operator decides.
        """
        found: dict[str, list[str]] = {}
        wanted = not tuning
        for name in cls.model_fields:
            if name == TUNING:
                wanted = tuning
            if name in SECTIONS:
                title = SECTIONS[name]
            if wanted:
                found.setdefault(title, []).append(name)
        return found

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Read the environment; the keywords win over the environment.

        Raises:
            ConfigError: a value is invalid, or there is no such setting.
        """
        for name in given.keys() & REMOVED.keys():
            raise ConfigError(f"{name}: this setting was removed; {REMOVED[name]}")
        known = {CHAT_TOKEN, *(PREFIX + name.upper() for name in cls.model_fields)}
        for variable in os.environ:
            name = variable.upper()
            if not name.startswith(PREFIX) or name in known:
                continue
            if (old := name.removeprefix(PREFIX).lower()) in REMOVED:
                raise ConfigError(f"{variable}: this setting was removed; {REMOVED[old]}")
            hint = ""
            if "://" in os.environ[variable] or "_SERVICE_" in variable:
                hint = " (Kubernetes sets such variables; see enableServiceLinks of a pod)"
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
