"""The chat mounted in FastAPI below ``/chat``, for uvicorn."""

from fastapi import FastAPI

import wsserver

chat = wsserver.asgi(allow_anonymous=True)
app = FastAPI(lifespan=chat.lifespan)
app.mount("/chat", chat)
