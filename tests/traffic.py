"""Traffic for drills: calls without pause through Traefik, and what came of each."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
from msgspec import Struct

from loadtest.load import percentile
from tests.journey import Journey, chat


class Call(Struct, frozen=True):
    """`outcome` is `whole`, `error event`, `cut`, `status 503`, or the name of a transport's error. Monotonic times."""

    request_id: str
    began: float
    seconds: float
    outcome: str


class Traffic:
    """Entering starts `clients` that call one after the other, every second call a stream; leaving waits for the last.

    `calls` grows meanwhile.
    """

    def __init__(self, journey: Journey, clients: int = 8, prompt: str = "tokens=5", **fields: Any) -> None:
        self._journey = journey
        self._prompt = prompt
        self._fields = fields
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        self.calls: list[Call] = []

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        stack = self._journey.stack
        with httpx.Client(base_url=stack.url, verify=stack.tls(), timeout=60) as client:
            streamed = False
            while not self._stopping.is_set():
                streamed = not streamed
                headers = self._journey.headers()
                body = chat(self._prompt, **{"stream": streamed, **self._fields})
                began = time.monotonic()
                outcome = _call(client, headers, body)
                seconds = time.monotonic() - began
                self.calls.append(Call(headers["x-request-id"], began, seconds, outcome))

    def since(self, moment: float) -> list[Call]:
        """The calls that began after that moment."""
        return [call for call in list(self.calls) if call.began > moment]

    def whole(self) -> list[str]:
        """Request ids of the calls that were answered whole."""
        return [call.request_id for call in self.calls if call.outcome == "whole"]

    def outcomes(self) -> set[str]:
        return {call.outcome for call in self.calls}


def p95(calls: list[Call]) -> float:
    """Seconds."""
    return percentile(sorted(call.seconds for call in calls), 950)


def _call(client: httpx.Client, headers: dict[str, str], body: dict[str, Any]) -> str:
    try:
        answer = client.post("/v1/chat/completions", json=body, headers=headers)
    except httpx.RemoteProtocolError:
        return "cut"
    except httpx.TransportError as error:
        return type(error).__name__
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    if not body["stream"]:
        return "whole" if answer.json()["choices"] else "empty"
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    errors = ["error" in json.loads(event) for event in events if event != "[DONE]"]
    if any(errors):
        ends = sum(errors) == 1 and errors[-1] and events[-1] == "[DONE]"
        return "error event" if ends else "events after the error"
    return "whole" if events and events[-1] == "[DONE]" else "cut"
