"""The model."""

from collections.abc import Mapping
from typing import Any

from wsserver.content import Usage
from wsserver.errors import Code, ModelError
from wsserver.models.base import Request, Take
from wsserver.models.failures import ApiError
from wsserver.models.openai.environment import Environment
from wsserver.models.openai.failures import ChatError
from wsserver.models.openai.reply import ChatReply
from wsserver.models.openai.request import arguments
from wsserver.models.streamed import StreamedModel
from wsserver.settings import Settings

_LIMITS = ("max_completion_tokens", "max_tokens")
"""The keys for the number of output tokens: of OpenAI's newer models, and of all other servers."""


class OpenAI(StreamedModel):
    """A model of a server that speaks Chat Completions.

    ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` have the address and the key. Models differ in the
    parameters that they accept. A model that refuses one gets its next requests without it.

    Raises:
        ConfigError: a variable of the environment is missing or malformed.
    """

    provider = "openai"

    def __init__(self, name: str, settings: Settings) -> None:
        environment = Environment(f"openai:{name}")
        self._limit = _LIMITS[0] if environment.is_openai else _LIMITS[1]
        self._refused: dict[str, set[str]] = {}  # parameters, by model
        super().__init__(name, settings, environment)

    def make_body(self, request: Request) -> dict[str, Any]:
        """Make the body of a request, without the parameters that the model refused.

        Raises:
            ModelError: a block of the prompt has no counterpart in the API.
        """
        refused = self._refused.get(str(request.model), set())
        limit = next((limit for limit in _LIMITS if limit in refused), None)
        limit = self._limit if limit is None else _other(limit)
        body = arguments(request, limit)
        for parameter in refused & body.keys():
            del body[parameter]
        return body

    def make_reply(self, take: Take, limit: int, spent: Usage | None) -> ChatReply:
        """Make the parser of a response."""
        return ChatReply(take, limit, spent)

    def make_error(self, status: int, headers: Mapping[str, str], body: object) -> ChatError:
        """Make an error from a response."""
        return ChatError(status, headers, body)

    def adapt(self, body: dict[str, Any], error: ApiError) -> bool:
        """Leave out or rename a parameter that the model refused, or ask for fewer tokens.

        Raises:
            ModelError: the temperature is outside the range of the model.
        """
        assert isinstance(error, ChatError)
        limit = next(limit for limit in _LIMITS if limit in body)
        if (fewer := error.fitting(body[limit])) is not None:
            body[limit] = fewer
            return True
        if error.code() is not Code.BAD_REQUEST:
            return False
        for parameter in ("temperature", "stream_options", limit):
            if parameter in body and _names(error, parameter):
                break
        else:
            return False
        if parameter == "temperature" and "support" not in error.message:  # the value is refused
            failure = ModelError(Code.BAD_REQUEST, "temperature: the model's API refused it.")
            error.identify(failure)
            raise failure from error
        refused = self._refused.setdefault(body["model"], set())
        if parameter == limit and _other(limit) in refused:  # it accepts neither
            return False
        refused.add(parameter)
        value = body.pop(parameter)
        if parameter == limit:
            body[_other(limit)] = value
        return True


def _other(limit: str) -> str:
    return _LIMITS[1 - _LIMITS.index(limit)]


def _names(error: ChatError, parameter: str) -> bool:
    return error.parameter == parameter or parameter in error.message
