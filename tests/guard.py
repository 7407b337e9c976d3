"""A guardrail's service: says no to what a test forbids, and can be slow, wrong or silent."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FORBIDDEN = "forbidden"


class Guard:
    """`asked` has every question. A text with FORBIDDEN in it is blocked. `answers` are scripted: status and body.

    While `silent` is set it answers nothing.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[tuple[int, bytes]] = []
        self.silent = False
        self._released = threading.Event()
        guard = self

        class Judge(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["content-length"])))
                guard.asked.append(question)
                guard.headers.append({name.lower(): value for name, value in self.headers.items()})
                if guard.silent:
                    guard._released.wait(60)
                status, body = guard.answers.pop(0) if guard.answers else (200, guard.verdict(question))
                self.send_response(status)
                if status == 302:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A gateway that waits no longer closes the connection."""

        self._server = Server(("127.0.0.1", 0), Judge)
        self.url = f"http://127.0.0.1:{self._server.server_port}/check"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def verdict(self, question: dict[str, Any]) -> bytes:
        text = question["context"] + question["text"]
        said = {"action": "block", "reason": f"it says {FORBIDDEN}"} if FORBIDDEN in text else {"action": "allow"}
        return json.dumps(said).encode()

    def texts(self, stage: str) -> list[str]:
        return [question["text"] for question in self.asked if question["stage"] == stage]

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
