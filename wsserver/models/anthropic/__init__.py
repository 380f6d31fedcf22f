"""Claude, or any server that speaks the Messages API.

``model`` knows the API. ``request`` makes the bodies of requests, ``reply`` parses responses, and
``failures`` maps errors to codes. ``sdk`` gets the URL and the headers from Anthropic's SDK, and
``templates`` caches them. No other module imports the SDK.
"""

from wsserver.models.anthropic.model import Anthropic

__all__ = ["Anthropic"]
