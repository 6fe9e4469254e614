"""The page's requests, by Starlette and uvicorn (extra `web`). Nothing is fetched from elsewhere or sent there."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from talking.answering import Answerer, Asked, read_asked
from talking.models import choices
from talking.pictures import MAX_BYTES

PAGE = Path(__file__).parent / "page"
FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "drawing.js": "text/javascript"}
MAX_CHAT_BYTES = 8 << 20
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class TooLarge(ValueError):
    """A request has more bytes than it may."""


class OwnPageOnly:
    """Refuses what other sites' pages send here, and puts `HEADERS` on every answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        headers = Request(scope).headers
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return await refused(f"{origin} is another page", 403)(scope, receive, send_with_headers)
        return await self.app(scope, receive, send_with_headers)


def refused(text: str, status: int = 400) -> Response:
    return JSONResponse({"error": text}, status)


async def body_of(request: Request, most: int) -> bytes:
    """The request's body. Raises TooLarge before more than `most` bytes are in memory."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise TooLarge(f"larger than {most >> 20} MB")
    return bytes(data)


class Requests:
    """What the page asks, each by a method.

    Args:
        defaults: `max_new_tokens` and `temperature` that the page begins with.
    """

    def __init__(self, answerer: Answerer, defaults: dict):
        self.answerer, self.defaults = answerer, defaults
        self.running: set[asyncio.Task] = set()
        self.turn = asyncio.Lock()  # one answer at a time

    async def page(self, request: Request) -> Response:
        """A file of the page itself."""
        name = request.path_params.get("name", "")
        if name not in FILES:
            return refused("no such file", 404)
        return Response((PAGE / (name or "index.html")).read_bytes(), media_type=FILES[name])

    async def models(self, request: Request) -> Response:
        """The models that there are now."""
        answerer = self.answerer
        try:
            found = await asyncio.to_thread(choices, answerer.given)
        except ValueError as error:
            return refused(str(error))
        now = answerer.loaded.choice.name if answerer.loaded else None
        names = [choice.name for choice in found]
        return JSONResponse({"given": answerer.given, "models": names, "loaded": now, "defaults": self.defaults})

    async def picture(self, request: Request) -> Response:
        """A picture as a model sees it: one that is uploaded, or of before by its id."""
        model = request.query_params.get("model", "")
        try:
            id = request.path_params.get("id")
            if id is None:
                id = await asyncio.to_thread(self.answerer.pictures.add, await body_of(request, MAX_BYTES))
            return JSONResponse(await asyncio.to_thread(self.answerer.show, id, model))
        except TooLarge as error:
            return refused(str(error), 413)
        except Exception as error:  # whatever a file makes the decoder raise
            return refused(" ".join(str(error).split()))

    async def ask(self, request: Request) -> Response:
        """A question, answered by a stream of events."""
        try:
            asked = read_asked(json.loads(await body_of(request, MAX_CHAT_BYTES)))
        except TooLarge as error:
            return refused(f"the chat is {error}", 413)
        except (ValueError, RecursionError) as error:  # no JSON, or no question
            return refused(str(error))
        return StreamingResponse(self.events(asked), media_type="application/x-ndjson")

    async def events(self, asked: Asked) -> AsyncIterator[bytes]:
        """A line of JSON an event. The answer stops when nobody reads them any more."""
        loop, queue, stop = asyncio.get_running_loop(), asyncio.Queue(), Event()

        def put(event: dict | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        task = loop.create_task(self.work(asked, put, stop))
        self.running.add(task)  # a task that nobody holds may be lost
        task.add_done_callback(self.running.discard)
        try:
            while (event := await queue.get()) is not None:
                yield json.dumps(event).encode() + b"\n"
        finally:
            stop.set()

    async def work(self, asked: Asked, put: Callable[[dict | None], None], stop: Event) -> None:
        """Answers a question once those before it have their answers; `put` gets its events, and None at the end."""
        try:
            if self.turn.locked():
                put({"event": "waiting"})
            async with self.turn:
                await asyncio.to_thread(self.answerer.answer, asked, put, stop)
        finally:
            put(None)


def make_app(answerer: Answerer, defaults: dict, hosts: list[str]) -> Starlette:
    """The application.

    Args:
        defaults: of `Requests`.
        hosts: names that it may be asked under; `*`: any.
    """
    to = Requests(answerer, defaults)
    routes = [
        Route("/", to.page),
        Route("/models", to.models),
        Route("/pictures", to.picture, methods=["POST"]),
        Route("/pictures/{id}", to.picture),
        Route("/ask", to.ask, methods=["POST"]),
        Route("/{name}", to.page),
    ]
    guards = [Middleware(OwnPageOnly), Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    return Starlette(routes=routes, middleware=guards)


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address, port 0: any free one. Raises OSError: there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: cannot be listened on: {error}") from error


def serve(answerer: Answerer, defaults: dict, host: str, listener: socket.socket) -> None:
    """Serves the page until Ctrl-C.

    Args:
        host: that the listener was made for.
    """
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}/  (Ctrl-C ends)", flush=True)
    hosts = ["*"]
    if is_own(host):
        hosts = ["localhost", "127.0.0.1", "::1", "[::1]", host]  # no name that another site's page could point here
    else:
        print("note: whoever reaches this machine at that port can use the model", flush=True)
    app = make_app(answerer, defaults, hosts)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


def is_own(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
