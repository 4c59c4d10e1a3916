"""The local page of `tapfm view`: 127.0.0.1 alone, GET alone, nothing from elsewhere.

    /                              the page; /page/... its script and style
    /run.js                        the run: its slides, by error
    /slides/N/slide.js             a slide: size and resolution
    /slides/N/tiles.js             its tiles: corners, weights, predictions
    /slides/N/zoom/L/X_Y.jpg       a deep zoom tile
    /slides/N/tile/T.jpg           the picture of one tile

Slides are asked for by number, so no path comes from a request. A page of another origin cannot
read it: requests under another host's name are refused.
"""

from __future__ import annotations

import socket
import sys
from collections import OrderedDict
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from threading import Lock

from openslide import OpenSlideError

from slides.errors import SettingsError, SlideError
from tapfm.viewer.contents import Contents, as_script, read_contents, tiles_of
from tapfm.viewer.pyramid import Pyramid, open_slide

HOST = "127.0.0.1"
OPEN = 4  # slides at once
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)


class Slides:
    """The run's slides, a few of them open."""

    def __init__(self, contents: Contents):
        self.contents, self.lock = contents, Lock()
        self.open: OrderedDict[int, Pyramid] = OrderedDict()
        self.tiles: dict[int, dict] = {}

    def pyramid(self, number: int) -> Pyramid:
        """Return a slide, opened.

        Raises:
            SlideError: it cannot be opened, or its file is unknown.
        """
        with self.lock:
            if number not in self.open:
                self.open[number] = open_slide(self.contents, number)
            self.open.move_to_end(number)
            while len(self.open) > OPEN:  # closed once no request holds it
                self.open.popitem(last=False)
            return self.open[number]

    def of(self, number: int) -> dict:
        """Return the tiles of a slide, read once."""
        if number not in self.tiles:
            contents = self.contents
            self.tiles = {number: tiles_of(contents.slides[number], contents.predictions)}
        return self.tiles[number]

    def slide(self, number: int) -> str:
        """Return what the page needs to paint a slide, or the reason why it cannot."""
        try:
            facts = asdict(self.pyramid(number).facts())
        except SlideError as error:
            facts = {"fault": str(error)}
        return as_script("view.receive", number, facts)

    def weighed(self, number: int) -> str:
        """Return the tiles of a slide, or the reason why there are none."""
        try:
            found = self.of(number)
        except SettingsError as error:
            found = {"fault": str(error)}
        return as_script("view.tiles", number, found)


def make_app(contents: Contents):
    """Return the web application (Starlette) of a run.

    Raises:
        SettingsError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import PlainTextResponse, Response
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ImportError as error:
        raise _missing(error) from error
    slides, count = Slides(contents), len(contents.slides)
    page = files("tapfm.viewer").joinpath("page")

    def guarded(make, media: str):
        def answer(request):
            given = request.path_params
            if given.get("number", 0) >= count:
                return PlainTextResponse("no such slide", 404)
            try:
                return Response(make(**given), media_type=media, headers=headers)
            except (ValueError, IndexError):
                return PlainTextResponse("no such tile", 404)
            except (SlideError, OpenSlideError, SettingsError) as error:
                return PlainTextResponse(str(error), 500)

        return answer

    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}

    def single(number: int, tile: int) -> bytes:
        found = slides.of(number)
        return slides.pyramid(number).single(found["x"][tile], found["y"][tile], found["side"])

    def zoom(number: int, level: int, column: int, row: int) -> bytes:
        return slides.pyramid(number).tile(level, column, row)

    script, picture = "text/javascript", "image/jpeg"
    run = as_script("view.start", contents.page())
    index = page.joinpath("index.html").read_bytes()
    at = "/slides/{number:int}"
    routes = [
        Route("/", guarded(lambda: index, "text/html")),
        Route("/run.js", guarded(lambda: run, script)),
        Route(f"{at}/slide.js", guarded(slides.slide, script)),
        Route(f"{at}/tiles.js", guarded(slides.weighed, script)),
        Route(f"{at}/zoom/{{level:int}}/{{column:int}}_{{row:int}}.jpg", guarded(zoom, picture)),
        Route(f"{at}/tile/{{tile:int}}.jpg", guarded(single, picture)),
        Mount("/page", StaticFiles(directory=str(page))),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


def run_view(run: Path, split: str, port: int, static: Path | None, side: int) -> int:
    """Show a run until it is interrupted, or write the page as files; return 0.

    Args:
        run: folder of a run.
        split: `val` or `test`.
        port: 0 is any that is free.
        static: folder for the page as files; None serves it.
        side: longest side of the pictures in files, pixels.

    Raises:
        SettingsError: as `read_contents`; a package is missing, or the port is taken.
    """
    contents = read_contents(run, split)
    if static is not None:
        from tapfm.viewer.static import write_page

        print(f"{write_page(contents, static, side)}: open it in a browser")
        return 0
    app = make_app(contents)
    try:
        import uvicorn
    except ImportError as error:
        raise _missing(error) from error
    with listen(port) as listening:
        where = f"http://{HOST}:{listening.getsockname()[1]}/"
        print(f"{where} shows {len(contents.slides)} slides of {contents.title}; Ctrl-C ends it")
        sys.stdout.flush()
        config = uvicorn.Config(app, log_level="warning", lifespan="off")
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine's own address alone.

    Raises:
        SettingsError: the port is taken.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise SettingsError(
            f"view: port {port} cannot be used ({error.strerror}). Give another --port, or 0."
        ) from error
    listening.listen()
    return listening


def _missing(error: ImportError) -> SettingsError:
    return SettingsError(
        f"view: {error.name} is not installed. Run: pip install 'tapfm[view]', or write files with "
        "--static."
    )
