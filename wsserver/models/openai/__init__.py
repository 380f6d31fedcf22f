"""Any server that speaks Chat Completions: OpenAI, OpenRouter, vLLM, Ollama, llama.cpp and others.

``model`` knows the API. ``request`` makes the bodies of requests, ``reply`` parses responses,
``failures`` maps errors to codes, and ``environment`` finds the URL and the key.
"""

from wsserver.models.openai.model import OpenAI

__all__ = ["OpenAI"]
