"""FastAPI with Anthropic's SDK."""

import asyncio

from anthropic import AsyncAnthropic
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

app = FastAPI()
client = AsyncAnthropic()


async def reply(websocket: WebSocket, prompt: str) -> None:
    try:
        async with client.messages.stream(
            model="claude-sonnet-4-6",
            max_tokens=8192,
            messages=[{"role": "user", "content": prompt}],
        ) as stream:
            async for text in stream.text_stream:
                await websocket.send_json({"type": "token", "text": text})
        done = {"type": "done", "reason": "end_turn"}
    except asyncio.CancelledError:
        done = {"type": "done", "reason": "stopped"}
    except Exception as error:
        done = {"type": "error", "message": str(error)}
    await websocket.send_json(done)


@app.websocket("/")
async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    task: asyncio.Task[None] | None = None
    try:
        while True:
            frame = await websocket.receive_json()
            if frame.get("type") != "stop":
                task = asyncio.create_task(reply(websocket, frame["prompt"]))
            elif task:
                task.cancel()
    except WebSocketDisconnect:
        if task:
            task.cancel()
