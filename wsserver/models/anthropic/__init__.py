"""Claude, or any server that speaks the Messages API.

``model`` asks for a reply; ``request`` is what it sends, ``events`` and ``reply`` read what comes,
``failures`` names what can go wrong. ``sdk`` is the only module that imports Anthropic's SDK.
"""

from wsserver.models.anthropic.model import Anthropic

__all__ = ["Anthropic"]
