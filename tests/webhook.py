"""A receiver of webhooks in Slack's format: takes what it is sent, or refuses as a test scripts it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Webhook:
    """`texts` are the messages that it took. `refusals` are answers for the next attempts: status, and Retry-After."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.refusals: list[tuple[int, str]] = []
        webhook = self

        class Take(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fits = list(body) == ["text"] and self.headers["content-type"] == "application/json"
                status, wait = webhook.refusals.pop(0) if webhook.refusals else (200 if fits else 400, "")
                if status == 200:
                    webhook.texts.append(body["text"])
                self.send_response(status)
                if wait:
                    self.send_header("retry-after", wait)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"ok" if status == 200 else b"no")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Take)
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/T000/B000/canary-webhook"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def of(self, tenant: str) -> list[str]:
        return [text for text in self.texts if text.startswith(f"Tenant {tenant} ")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
