"""The model. The SDK sends no request, so it does not repeat attempts."""

from collections.abc import Mapping
from typing import Any

from wsserver.content import Usage
from wsserver.errors import Code, ModelError
from wsserver.models.anthropic.failures import MessagesError
from wsserver.models.anthropic.reply import MessagesReply
from wsserver.models.anthropic.request import arguments
from wsserver.models.anthropic.templates import Templates
from wsserver.models.base import Request, Take
from wsserver.models.failures import ApiError
from wsserver.models.streamed import StreamedModel
from wsserver.settings import Settings

MAX_TEMPERATURE = 1  # that the API accepts


class Anthropic(StreamedModel):
    """A Claude model, or any model of a server that speaks the Messages API.

    All settings that the SDK reads from the environment apply: credentials, ``ANTHROPIC_BASE_URL``
    and others.

    Raises:
        ConfigError: there are no credentials, or they cannot be used.
    """

    provider = "anthropic"

    def __init__(self, name: str, settings: Settings) -> None:
        self._templates = Templates(name)
        self._without_temperature: set[str] = set()  # models that refused a temperature
        super().__init__(name, settings, self._templates)

    async def prepare(self) -> None:
        """Import the SDK.

        Raises:
            ConfigError: the SDK cannot be used as the environment configures it.
        """
        await self._templates.import_sdk()

    def make_body(self, request: Request) -> dict[str, Any]:
        """Make the body of a request; see :func:`arguments`."""
        takes_temperature = request.model not in self._without_temperature
        return arguments(request, self.settings, takes_temperature=takes_temperature)

    def make_reply(self, take: Take, limit: int, spent: Usage | None) -> MessagesReply:
        """Make the parser of a response."""
        return MessagesReply(take, limit, spent)

    def make_error(self, status: int, headers: Mapping[str, str], body: object) -> ApiError:
        """Make an error from a response."""
        return MessagesError(status, headers, body)

    def adapt(self, body: dict[str, Any], error: ApiError) -> bool:
        """Leave out the temperature if the model refused it; return whether it was left out.

        Raises:
            ModelError: the temperature is above the range of the model.
        """
        temperature = body.get("temperature")
        if temperature is None or "temperature" not in error.message:
            return False
        if temperature > MAX_TEMPERATURE:
            failure = ModelError(Code.BAD_REQUEST, "temperature: the model's API refused it.")
            error.identify(failure)
            raise failure from error
        self._without_temperature.add(body["model"])
        del body["temperature"]
        return True
