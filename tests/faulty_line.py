"""A line to an object store that can be told to fail, and that counts what passes."""

import contextlib
import http.client
import http.server
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>said by the line</Message></Error>'
ANSWERS = {"401": "Unauthorized", "403": "Forbidden", "500": "InternalError", "503": "SlowDown"}
BETWEEN = {"connection", "content-length", "transfer-encoding", "expect", "date", "server"}
"""Headers that concern one connection only."""


class Line:
    """Passes requests on to a server, with their Host, so that signatures stay valid.

    Attributes:
        place: host and port to talk to.
        calls: method and path of each request so far.
        failed: how many of them have met a fault.
        fault: what happens to those that `hits` chooses: "401", "403", "500", "503" (SlowDown), "slow" (after
            `seconds`), "cut" (closed without an answer), "lost" (done, but the answer does not come back), "torn"
            (closed after half of the answer), "short" (half of the answer, as if that were all), "silent" (no answer
            until the line is well again); None: nothing.
    """

    def __init__(self, target: str, port: int = 0):
        self.target, self.calls, self.seconds = target, [], 2.0
        self.failed, self.fault = 0, None
        self.hits: Callable[[str, str], bool] = lambda method, path: True
        self._well = threading.Event()
        handler = type("Handler", (_Handler,), {"line": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.place = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    @contextlib.contextmanager
    def failing(
        self,
        fault: str,
        share: float = 1.0,
        match: str = "",
        method: str = "",
        first: int | None = None,
        only: Callable[[str, str], bool] = lambda method, path: True,
    ) -> Iterator[None]:
        """In the block a share of the requests that match fail, or the first so many of them."""
        number, chance = itertools.count(), random.Random(0)

        def hits(of: str, path: str) -> bool:
            if match not in path or method not in ("", of) or not only(of, path):
                return False
            return chance.random() < share and (first is None or next(number) < first)

        self.hits, self.fault = hits, fault
        self._well.clear()
        try:
            yield
        finally:
            self.heal()

    def heal(self) -> None:
        """Nothing fails any more."""
        self.fault = None
        self._well.set()

    def close(self) -> None:
        self._well.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    line: Line

    def _pass(self) -> None:
        line = self.line
        body = self._body()
        line.calls.append((self.command, self.path))
        fault = line.fault if line.fault and line.hits(self.command, self.path) else None
        line.failed += fault is not None
        if fault in ANSWERS:
            content = ERROR.format(ANSWERS[fault]).encode()
            return self._answer(int(fault), [], content, len(content))
        if fault == "cut":
            return self._cut()
        if fault == "slow":
            time.sleep(line.seconds)
        if fault == "silent":
            line._well.wait()
            return self._cut()
        status, headers, content = self._asked(body)
        if fault == "lost":
            return self._cut()
        half = content[: len(content) // 2] if fault in ("torn", "short") else content
        self._answer(status, headers, half, len(content) if fault == "torn" else len(half))
        if fault == "torn":
            self._cut()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _asked(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the server answers."""
        server = http.client.HTTPConnection(self.line.target)
        with contextlib.closing(server):
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in BETWEEN:
                    server.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                server.putheader("Content-Length", str(len(body)))
            server.endheaders(body)
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, size: int) -> None:
        self.send_response(status)
        if self.command == "HEAD":  # which says how long a GET would be
            size = int(next((value for name, value in headers if name.lower() == "content-length"), size))
        for name, value in headers:
            if name.lower() not in BETWEEN:
                self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def log_message(self, *arguments) -> None:
        pass
