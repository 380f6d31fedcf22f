"""The interface of a model, and how a model is found by its name."""

import importlib
import inspect
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from wsserver.content import Block, Message, Usage
from wsserver.errors import ConfigError
from wsserver.generation import End
from wsserver.logs import log
from wsserver.pieces import Piece
from wsserver.settings import Settings

Output = str | Block | Piece | Usage | End
"""What a model yields. A ``str`` is text."""

Take = Callable[[Output], None]

DEFAULT_ANTHROPIC_MODEL = "claude-sonnet-4-6"
CHOICES = "demo, anthropic:MODEL, claude-… and package.module:attribute for a model of your own"

# Any of these means that Anthropic's SDK will find credentials in the environment.
_CREDENTIALS = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_PROFILE",
    "ANTHROPIC_IDENTITY_TOKEN",
    "ANTHROPIC_IDENTITY_TOKEN_FILE",
)


@dataclass(frozen=True, slots=True)
class Request:
    """What a model gets: the conversation, whose last message is the user's, and parameters.

    ``model`` is the id that the client chose from the setting ``models``, else the ``name`` of the
    model. It is None if there is neither: the name of a function is no id that an API knows.
    """

    messages: tuple[Message, ...]
    model: str | None
    max_tokens: int
    system: str | None = None
    temperature: float | None = None

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return self.messages[-1].text


class Model(Protocol):
    """A callable from a request to an async iterator of pieces; an async generator will do.

    It yields ``str`` for text, :class:`~wsserver.Thinking` for thinking, other blocks whole, and
    where it knows them :class:`~wsserver.Usage` (in all so far) and one :class:`~wsserver.End`.
    Consecutive texts are one block, and so are consecutive thoughts up to a signature. A
    :class:`~wsserver.pieces.Piece` with another ``block`` begins another one. An empty ``str`` adds
    nothing, but shows that the model is alive. Returning without ``End`` is an ``end_turn``.

    To stop it, the task that iterates is cancelled and the iterator closed: what it holds open
    must be closed as the exception passes, as ``async with`` and ``finally`` do.

    It may have a ``name``, which clients see, a ``provider``, which traces name, and three methods,
    each an ``async def`` without arguments: ``prepare`` is called once the server listens, ``warm``
    when a client connects and when it sends its first frame, and ``aclose`` when the server that
    made the model is closed.

    Raises:
        ModelError: to tell the client what happened; any other exception is not told. Where the
            messages are too long, ``Code.PROMPT_TOO_LONG`` has it called again with fewer.
    """

    def __call__(self, request: Request, /) -> AsyncIterator[Output]:
        """Start a reply."""
        ...


@runtime_checkable
class PushModel(Protocol):
    """A model whose text comes by callback, which saves waking a task for each piece.

    To stop it, the task that runs it is cancelled. All else is as for a :class:`Model`.
    """

    async def push(self, request: Request, take: Take, /) -> None:
        """Give ``take`` what a :class:`Model` would yield, in the event loop, and then return.

        What ``take`` raises ends the reply, and must be let through.
        """
        ...


def check(model: object) -> None:
    """Check a model for common mistakes.

    Raises:
        ConfigError: the object cannot be a model.
    """
    name = getattr(model, "__name__", repr(model))
    if isinstance(model, PushModel):
        if isinstance(model, type) or not inspect.iscoroutinefunction(model.push):
            raise ConfigError(f"model: {name} must be an object with an `async def push`")
        return
    if not callable(model):
        raise ConfigError(f"model: {name} is not callable")
    if inspect.iscoroutinefunction(model):
        raise ConfigError(f"model: {name} must be an async generator: let it yield its pieces")


def declared_name(model: Model | PushModel) -> str | None:
    """Return the ``name`` of a model; None if it has none."""
    name = getattr(model, "name", None)
    return str(name) if name else None


def name_of(model: Model | PushModel) -> str:
    """Return the name that clients see: the model's own, else that of its function or class."""
    return declared_name(model) or str(getattr(model, "__name__", type(model).__name__))


def provider_of(model: Model | PushModel) -> str:
    """Return the provider of a model, as OpenTelemetry's GenAI conventions call it."""
    return str(getattr(model, "provider", None) or name_of(model))


async def close(model: Model | PushModel) -> None:
    """Release what a model holds, if it says how. An error of its own is logged."""
    aclose = getattr(model, "aclose", None)
    if aclose is None or isinstance(model, type):
        return
    try:
        await aclose()
    except Exception as error:  # noqa: BLE001
        log.error("model not closed", failure=error)


def make(settings: Settings) -> Model | PushModel:
    """Make the model that the settings name.

    The libraries behind it are imported here and not before, as they take longer to start than
    all of the rest.

    Raises:
        ConfigError: there is no such model, or it has no credentials.
    """
    spec = settings.model
    if not spec:
        found = any(os.environ.get(name) for name in _CREDENTIALS)
        spec = DEFAULT_ANTHROPIC_MODEL if found else "demo"
    if spec == "demo":
        from wsserver.models.demo import Demo  # noqa: PLC0415

        return Demo(rate=settings.demo_rate)
    if spec.startswith(("anthropic:", "claude-")):
        from wsserver.models.anthropic import Anthropic  # noqa: PLC0415

        return Anthropic(spec.removeprefix("anthropic:"), settings)
    return _import(spec)


def _import(spec: str) -> Model | PushModel:
    """Import a model of the operator's own.

    Raises:
        ConfigError: the spec names no attribute of a module, or the module cannot be imported.
    """
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute):
        raise ConfigError(f"model: {spec!r} is none of {CHOICES}")
    if not all(part.isidentifier() for part in attribute.split(".")):
        raise ConfigError(f"model: there is no provider {module_name!r}; give {CHOICES}")
    # A program started from a folder expects to find that folder's modules.
    if (cwd := str(os.getcwd())) not in sys.path:  # noqa: PTH109
        sys.path.insert(0, cwd)
    try:
        model = importlib.import_module(module_name)
        for part in attribute.split("."):
            model = getattr(model, part)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            reason = f"there is no module and no provider {missing!r}; give {CHOICES}"
        else:
            reason = f"cannot import {spec!r}: the module {missing!r} is not installed"
        raise ConfigError(f"model: {reason}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"model: cannot import {spec!r}: {reason}") from error
    check(model)
    return cast("Model | PushModel", model)
