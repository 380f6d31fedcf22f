"""A FastAPI program with a chat at /chat, whose users are those of the program.

    pip install . fastapi uvicorn
    uvicorn --app-dir examples fastapi_app:app

Open http://127.0.0.1:8000/login/ada, and then http://127.0.0.1:8000/chat/.
"""

import secrets

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse

import wsserver

sessions: dict[str, str] = {}  # a real program has them in a database


async def user_of(_: str | None, handshake: wsserver.Handshake) -> wsserver.Principal | None:
    """Return the user of the program's own session cookie."""
    assert handshake.scope is not None
    session = Request(dict(handshake.scope, type="http")).cookies.get("session", "")
    user = sessions.get(session)
    return None if user is None else wsserver.Principal(user)


chat = wsserver.asgi(authenticate=user_of)  # a model of your own, or the setting `model`
app = FastAPI(lifespan=chat.lifespan)
app.mount("/chat", chat)


@app.get("/login/{user}")
async def login(user: str) -> RedirectResponse:
    """Log a user in; a real program asks for more than a name."""
    session = secrets.token_urlsafe()
    sessions[session] = user
    response = RedirectResponse("/chat/")
    response.set_cookie("session", session, httponly=True, samesite="lax")
    return response
