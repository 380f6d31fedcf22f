"""Claude, or any server that speaks the Messages API.

``model`` asks for replies. ``request`` makes the body of a request, ``events`` and ``reply`` read
the response, ``failures`` has the codes of errors. ``templates`` keeps the URL and the headers, and
``sdk`` gets them from Anthropic's SDK; no other module imports the SDK.
"""

from wsserver.models.anthropic.model import Anthropic

__all__ = ["Anthropic"]
