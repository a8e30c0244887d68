"""A server of one file on the loopback address that misbehaves as it is told."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`ways`: what it does with each request, the last one for all that follow. `ranges`: the
    Range of each request that came."""

    daemon_threads = True

    def __init__(self, data: bytes, ways: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.ways, self.ranges, self.delay = data, list(ways), [], 0.0
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"

    def handle_error(self, request, address) -> None:
        pass  # the client went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        way = server.ways.pop(0) if len(server.ways) > 1 else server.ways[0]
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        self.close_connection = True
        if way.isdigit():
            return self.send_error(int(way))
        if way == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data, start = server.data, 0
        if way == "other":
            data = bytes(255 - byte for byte in data)
        if asked and way != "ignores ranges" and self.headers.get("If-Range") in (None, '"v1"'):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            start = 0 if way == "other range" else start
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        stated = len(data) - start + {"states more": 1000, "states less": -1000}.get(way, 0)
        if way not in ("states nothing", "sends more"):
            self.send_header("Content-Length", str(stated))
        self.send_header("ETag", '"v1"')
        self.end_headers()
        rest = data[start:]
        if way == "sends more":
            rest += b"x" * 10
        if way == "breaks off":
            rest = rest[: max(1, len(rest) // 2)]
        if way == "stalls":
            self.wfile.write(rest[:100])
            self.wfile.flush()
            server.stop.wait(20)
            return None
        if way == "crawls":
            for byte in rest:
                self.wfile.write(bytes([byte]))
                if server.stop.wait(0.02):
                    return None
        for first in range(0, len(rest), 4096):
            self.wfile.write(rest[first : first + 4096])
            if server.delay:
                time.sleep(server.delay)
        return None


@contextmanager
def serve(data: bytes, *ways: str):
    """The running server; `ways` as `Server.ways`, by default it behaves."""
    with Server(data, list(ways) or ["fine"]) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()
