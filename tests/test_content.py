"""Content of tenants that asked for it: redacted, apart from everything else, and gone when it is deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.config import ConfigError, load
from app.content import MAX_BYTES, Captured, Kept
from app.content_writer import delete, entry, folded, purge, write
from loadtest.stack import Stack
from tests.journey import OTHER_KEY, OVERLAY, Journey, chat, events, pool_providers, until
from tests.limits_parts import not_just_before_midnight

CARD, MAIL, SECRET = "4111 1111 1111 1111", "bob@example.com", "sk-" + "a" * 40


def captured(request: Any = None, answer: bytes = b"{}", *, stream: bool = False, day: str = "2026-01-02") -> Captured:
    return Captured(
        event_id="e1", time=f"{day}T10:00:00Z", request_id="r1", trace_id="0" * 32, tenant="acme", alias="fast",
        model="m", status="success", stream=stream, request=msgspec.json.encode(request), answer=answer,
    )  # fmt: skip


def frames(*texts: str) -> bytes:
    return b"".join(
        b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() for text in texts
    )


# --- what is written --------------------------------------------------------------------------------------------------


def test_secret_that_lies_across_chunks_is_found() -> None:
    parts = frames("my card: 4111 11", "11 1111 11", "11, and more")
    (answer,) = entry(captured(answer=parts, stream=True), [])["answer"].values()
    assert answer == "my card: [card], and more"


def test_streams_of_every_dialect_are_put_together() -> None:
    messages = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}}
        for part in ("a ", "b")
    ]
    responses = [{"type": "response.output_text.delta", "output_index": 1, "delta": part} for part in ("c ", "d")] + [
        {"type": "response.completed", "response": {"output": [{"content": "c d"}]}}
    ]
    for asked, wanted in ((messages, ["a b"]), (responses, ["c d"])):
        text = b"".join(b"event: x\ndata: %b\n\n" % json.dumps(event).encode() for event in asked)
        assert list(folded(text).values()) == wanted


def test_tool_calls_side_by_side_stay_apart() -> None:
    calls = [{"index": number % 2, "function": {"arguments": text}} for number, text in enumerate(("a", "b", "c", "d"))]
    text = b"".join(
        b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}).encode()
        for call in calls
    )
    assert sorted(folded(text).values()) == ["ac", "bd"]


def test_what_was_cut_off_leaves_no_beginning_of_a_secret() -> None:
    kept = Kept()
    kept.add(b"x " * (MAX_BYTES // 2) + SECRET[:20].encode())
    line = entry(captured(answer=b"".join(kept.parts)[: MAX_BYTES + 1]), [])
    assert "sk-" not in str(line["answer"])


def test_body_that_is_no_json_is_redacted_all_the_same() -> None:
    broken = captured(answer=f'{{"content": "{MAIL}'.encode())
    assert MAIL not in str(entry(broken, []))


def test_line_says_whose_it_is_and_what_was_taken_out() -> None:
    line = entry(captured({"messages": [{"content": f"{CARD} {MAIL}"}]}), [])
    assert line["request"] == {"messages": [{"content": "[card] [email]"}]}
    assert line["redacted"] == {"email": 1, "card": 1}
    assert (line["tenant_id"], line["request_id"], line["status"]) == ("acme", "r1", "success")


def test_retention_deletes_what_is_older(tmp_path: Path) -> None:
    for day in ("2026-01-01", "2026-01-30", "2026-01-31"):
        write(tmp_path, "r1", captured(day=day), [])
    assert purge(tmp_path, 1, date(2026, 1, 31)) == 1
    assert sorted(file.name for file in tmp_path.glob("*/*")) == ["2026-01-30.r1.jsonl", "2026-01-31.r1.jsonl"]


def test_deletion_takes_one_tenant_and_no_other(tmp_path: Path) -> None:
    write(tmp_path, "r1", captured(), [])
    write(tmp_path, "r1", msgspec.structs.replace(captured(), tenant="acme2"), [])
    assert delete(tmp_path, "acme") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["acme2"]


@pytest.mark.parametrize("name", ["..", "a/b", "", "."])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tenant's name"):
        delete(tmp_path / "inside", name)


def test_tenant_cannot_ask_for_it_where_nobody_said_where_to(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("tenants: {a: {plan: internal, capture_content: true}}\n")
    with pytest.raises(ConfigError, match=r"tenants.a.capture_content: wants gateway.content.folder"):
        load(Path("config"), "prod", overlays=(overlay,), require_secrets=False)


# --- on the way of real calls -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journey, Path]]:
    """A stack of one replica where tenant-a asked to have its content kept, and tenant-b did not."""
    folder = tmp_path_factory.mktemp("kept")
    content = folder / "content"
    not_just_before_midnight(120)  # a tenant has a file a day

    def overlay(simulator_url: str) -> dict[str, Any]:
        tenants = OVERLAY["tenants"] | {"tenant-a": OVERLAY["tenants"]["tenant-a"] | {"capture_content": True}}
        gateway = OVERLAY["gateway"] | {"content": {"folder": str(content), "phone_regions": ["IN"]}}
        providers = {"providers": pool_providers(folder, simulator_url)}
        return OVERLAY | providers | {"tenants": tenants, "gateway": gateway}

    environ = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    with Stack(folder / "state", replicas=1, overlay=overlay, environ=environ) as stack, Journey(stack) as journey:
        until(lambda: journey.post(chat("tokens=2")).status_code == 200)
        until(lambda: list(content.glob("tenant-a/*.jsonl")))
        until(lambda: journey.query("SELECT to_regclass('ledger') AS made")[0]["made"])
        yield journey, content


def line_of(content: Path, request_id: str) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        lines = [json.loads(line) for file in content.glob("*/*.jsonl") for line in file.read_text().splitlines()]
        return next((line for line in lines if line["request_id"] == request_id), None)

    return until(found)


def test_prompt_and_answer_are_kept_redacted(kept: tuple[Journey, Path]) -> None:
    journey, content = kept
    answer = journey.post(chat(f"tokens=6 mail {MAIL} card {CARD} ring 98765 43210 key {SECRET}"))
    line = line_of(content, answer.headers["x-request-id"])
    assert line["request"]["messages"][0]["content"] == "tokens=6 mail [email] card [card] ring [phone] key [key]"
    assert line["answer"]["choices"][0]["message"]["content"] == answer.json()["choices"][0]["message"]["content"]
    assert line["trace_id"] == journey.row(answer.headers["x-request-id"])["trace_id"]


def test_stream_is_kept_as_its_text(kept: tuple[Journey, Path]) -> None:
    journey, content = kept
    with journey.stream(chat("tokens=6")) as answer:
        chunks = events(answer)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1] if chunk["choices"])
    line = line_of(content, answer.headers["x-request-id"])
    assert text in line["answer"].values()


def test_nothing_is_kept_of_a_tenant_that_did_not_ask(kept: tuple[Journey, Path]) -> None:
    journey, content = kept
    journey.post(chat("canary tokens=3"), authorization=f"Bearer {OTHER_KEY}", x_tenant_id="tenant-b")
    after = journey.post(chat("tokens=3"))
    line_of(content, after.headers["x-request-id"])
    assert [path.name for path in content.iterdir()] == ["tenant-a"]


def test_content_is_in_no_log_row_or_metric(kept: tuple[Journey, Path]) -> None:
    journey, content = kept
    answer = journey.post(chat("canary-prompt tokens=3"))
    line_of(content, answer.headers["x-request-id"])
    row = json.dumps(journey.row(answer.headers["x-request-id"]))
    logs = "".join(path.read_text() for path in journey.stack.log_dir.glob("*.log"))
    seen = row + logs + journey.admin("/metrics").text + journey.admin("/status").text
    assert "canary-prompt" not in seen
    assert answer.json()["choices"][0]["message"]["content"] not in seen


def test_files_are_for_their_owner_alone(kept: tuple[Journey, Path]) -> None:
    _, content = kept
    modes = {path.stat().st_mode & 0o077 for path in [content, *content.rglob("*")]}
    assert modes == {0}


def test_command_deletes_a_tenants_content(kept: tuple[Journey, Path]) -> None:
    journey, content = kept
    answer = journey.post(chat(f"canary-prompt {MAIL} tokens=3"))
    line_of(content, answer.headers["x-request-id"])

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        asked = [sys.executable, "-m", "app.cli", "content", *arguments, "--folder", content]
        return subprocess.run(asked, text=True, capture_output=True, check=True)

    assert command("list").stdout.startswith("tenant-a\t1\t")
    deleted = command("delete", "--tenant", "tenant-a")
    assert deleted.stdout == "Deleted 1 files of tenant-a.\n"
    line = json.loads(deleted.stderr)
    assert (line["action"], line["tenant"], line["files"]) == ("content.delete", "tenant-a", 1)
    assert not list(content.rglob("*"))
    again = journey.post(chat("tokens=3"))  # the tenant still asks for it: what comes after is kept
    line_of(content, again.headers["x-request-id"])
    assert "canary" not in "".join(file.read_text() for file in content.rglob("*.jsonl"))


def test_writer_that_dies_is_started_again(kept: tuple[Journey, Path]) -> None:
    journey, content = kept
    children = subprocess.check_output(["pgrep", "-f", f"app.content_writer {content}"], text=True).split()
    for pid in children:
        os.kill(int(pid), 9)

    def kept_again() -> bool:
        answer = journey.post(chat("after tokens=2"))
        assert answer.status_code == 200
        return "after tokens=2" in "".join(file.read_text() for file in content.rglob("*.jsonl"))

    until(kept_again)
