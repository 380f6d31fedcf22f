"""The interface of a model, and the choice of the model that the settings name."""

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
"""A value that a model may yield. A ``str`` is text."""

Take = Callable[[Output], None]

DEFAULT_ANTHROPIC_MODEL = "claude-sonnet-4-6"
CHOICES = (
    "demo, anthropic:MODEL, claude-…, openai:MODEL, or package.module:attribute for a model of "
    "your own"
)

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
    """The argument of a model: the conversation and parameters. The last message is the user's.

    ``model`` is the id that the client chose from the setting ``models``, or else the ``name`` of
    the model object. It is None if there is neither: an API does not know the name of a function.
    """

    messages: tuple[Message, ...]
    model: str | None
    max_tokens: int
    system: str | None = None
    temperature: float | None = None

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        return self.messages[-1].text


class Model(Protocol):
    """A callable from a request to an async iterator, for example an async generator function.

    The iterator yields ``str`` for text, :class:`~wsserver.Thinking` for thinking, and other blocks
    whole. It may yield :class:`~wsserver.Usage` (all tokens so far) and one :class:`~wsserver.End`.
    Consecutive texts form one block, and so do consecutive thoughts up to a signature. A
    :class:`~wsserver.pieces.Piece` with another ``block`` begins another block. An empty ``str``
    adds nothing, but ends a silence. An iterator that ends without ``End`` ends as ``end_turn``.

    To stop a reply, the server cancels the task that iterates, and closes the iterator. The
    iterator has to close its connections at that moment, with ``async with`` or ``finally``.

    A model may have a ``name`` for clients and a ``provider`` for traces. A model whose
    ``writes_titles`` is true also writes the titles of conversations, unless the setting ``titles``
    says otherwise. A model may have three methods, each an ``async def`` without arguments. The
    server calls ``prepare`` when it listens, ``warm`` when a client connects or sends its first
    frame, and ``aclose`` at its own close, if it made the model.

    Raises:
        ModelError: the reply failed, and the client gets the code and the message. Of any other
            exception the client gets only ``internal``. After ``Code.PROMPT_TOO_LONG`` the server
            calls the model again with fewer messages.
    """

    def __call__(self, request: Request, /) -> AsyncIterator[Output]:
        """Start a reply."""
        ...


@runtime_checkable
class PushModel(Protocol):
    """A model that passes its pieces to a callback. No task wakes for each piece.

    To stop a reply, the server cancels the task that runs :meth:`push`. All else is the same as for
    a :class:`Model`.
    """

    async def push(self, request: Request, take: Take, /) -> None:
        """Call ``take`` with each value that a :class:`Model` would yield; return at the end.

        Call ``take`` in the thread of the event loop. An exception of ``take`` ends the reply: do
        not catch it.
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
    if isinstance(model, type):
        if not hasattr(model, "__aiter__"):
            raise ConfigError(f"model: {name} is a class; pass an object, such as {name}()")
        return
    for call in (model, model.__call__):
        if inspect.iscoroutinefunction(call) or inspect.isgeneratorfunction(call):
            raise ConfigError(f"model: {name} must be an async generator: `async def` with `yield`")


def declared_name(model: Model | PushModel) -> str | None:
    """Return the ``name`` of a model; None if it has none."""
    name = getattr(model, "name", None)
    return str(name) if name else None


def name_of(model: Model | PushModel) -> str:
    """Return the name for clients: the model's ``name``, or the name of its function or class."""
    return declared_name(model) or str(getattr(model, "__name__", type(model).__name__))


def provider_of(model: Model | PushModel) -> str:
    """Return ``gen_ai.provider.name`` of OpenTelemetry's GenAI conventions for a model."""
    return str(getattr(model, "provider", None) or name_of(model))


async def close(model: Model | PushModel) -> None:
    """Call the model's ``aclose``, if it has one. An exception is logged."""
    aclose = getattr(model, "aclose", None)
    if aclose is None or isinstance(model, type):
        return
    try:
        await aclose()
    except Exception as error:  # noqa: BLE001
        log.error("model not closed", failure=error)


def make(settings: Settings) -> Model | PushModel:
    """Make the model that the settings name.

    The libraries of a model are imported here, because they take most of the start.

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
        _check_names(settings)
        from wsserver.models.anthropic import Anthropic  # noqa: PLC0415

        return Anthropic(spec.removeprefix("anthropic:"), settings)
    if spec.startswith("openai:"):
        _check_names(settings)
        from wsserver.models.openai import OpenAI  # noqa: PLC0415

        return OpenAI(spec.removeprefix("openai:"), settings)
    return _import(spec)


def _check_names(settings: Settings) -> None:
    """Check that the other models have the names that the API knows.

    Raises:
        ConfigError: a name has the prefix of a provider. The API would refuse the name.
    """
    for setting, names in (("models", settings.models), ("titles", (settings.titles,))):
        for name in names:
            if name.startswith(("anthropic:", "openai:")):
                raise ConfigError(
                    f"{setting}: write {name.partition(':')[2]!r} instead of {name!r}; all models "
                    "of a server are of the API of --model"
                )


def _import(spec: str) -> Model | PushModel:
    """Import a model of the operator.

    Raises:
        ConfigError: the text is not ``module:attribute``, or the module cannot be imported.
    """
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute):
        raise ConfigError(f"model: {spec!r} is no model; choose {CHOICES}")
    if not all(part.isidentifier() for part in attribute.split(".")):
        raise ConfigError(f"model: there is no provider {module_name!r}; choose {CHOICES}")
    # As `python -m` does: find the modules of the current folder.
    if (cwd := str(os.getcwd())) not in sys.path:  # noqa: PTH109
        sys.path.insert(0, cwd)
    try:
        model = importlib.import_module(module_name)
        for part in attribute.split("."):
            model = getattr(model, part)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            reason = f"there is no module and no provider {missing!r}; choose {CHOICES}"
        else:
            reason = f"cannot import {spec!r}: the module {missing!r} is not installed"
        raise ConfigError(f"model: {reason}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"model: cannot import {spec!r}: {reason}") from error
    check(model)
    return cast("Model | PushModel", model)
