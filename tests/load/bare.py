"""What the framework itself reaches: a FastAPI application whose routes do one Redis GET and no more.

`python -m tests.load.bare FILE`, with REDIS_URL set, prints its URL and serves until it is killed.
"""

from __future__ import annotations

import os
import sys

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse
from redis.asyncio import Redis

from service.server import listen

KEY = "load:bare"


def make_app(redis_url: str, file: str) -> FastAPI:
    """`GET /` answers what a key holds; `GET /file` looks at the key and sends the file."""
    app = FastAPI()
    redis = Redis.from_url(redis_url, decode_responses=True)

    @app.get("/")
    async def read() -> dict[str, str]:
        return {"value": str(await redis.get(KEY))}

    @app.get("/file")
    async def send() -> FileResponse:
        await redis.get(KEY)
        return FileResponse(file)

    return app


if __name__ == "__main__":
    listener = listen("127.0.0.1", 0)
    listener.listen(128)  # from now on who asks waits, and is not refused
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    app = make_app(os.environ["REDIS_URL"], sys.argv[1])
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
