"""Claude, or any server that speaks the Messages API.

``model`` sends requests. ``request`` makes their bodies, ``events`` and ``reply`` parse the
responses, and ``failures`` maps errors to codes. ``sdk`` gets the URL and the headers from
Anthropic's SDK, and ``templates`` caches them. No other module imports the SDK.
"""

from wsserver.models.anthropic.model import Anthropic

__all__ = ["Anthropic"]
