"""What OpenAI has beside chat and embeddings, by its SDK through Traefik: passed on, measured, charged."""

from __future__ import annotations

import base64
import io

import openai
import pytest

from tests.journey import Journey

SOUND = b"RIFF" + b"\0" * 8_996  # nine seconds at the simulator


def dollars(journey: Journey, request_id: str) -> tuple[dict, float, str]:
    """The row's classes that are not zero, its price in USD, and whether that is known."""
    event = journey.row(request_id)
    classes = {name: count for name, count in event["usage"]["classes"].items() if count}
    return classes, float(event["cost_usd"]["total"]), event["cost_status"]


def test_legacy_completions_streamed_and_not(journey: Journey) -> None:
    client = journey.openai()
    asked = {"model": "gpt-3.5-turbo-instruct", "prompt": "tokens=9", "max_tokens": 50}
    raw = client.completions.with_raw_response.create(**asked)
    whole = raw.parse()
    stream = client.completions.with_raw_response.create(**asked, stream=True)
    chunks = list(stream.parse())
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert all(chunk.usage is None for chunk in chunks)  # nobody asked for it
    one, other = journey.rows([raw.headers["x-request-id"], stream.headers["x-request-id"]]).values()
    assert one["usage"] == other["usage"]
    assert (one["operation"], one["finish_reason"], one["usage"]["output_tokens"]) == ("completions", "stop", 9)
    assert float(one["cost_usd"]["total"]) == pytest.approx((1.5 * whole.usage.prompt_tokens + 2 * 9) / 1e6)


def test_moderations_are_free_and_leave_a_row(journey: Journey) -> None:
    raw = journey.openai().moderations.with_raw_response.create(model="omni-moderation-latest", input=["a", "attack"])
    assert [result.flagged for result in raw.parse().results] == [False, True]
    assert dollars(journey, raw.headers["x-request-id"]) == ({}, 0, "priced")


def test_speech_is_sound_paid_by_the_character(journey: Journey) -> None:
    raw = journey.openai().audio.speech.with_raw_response.create(model="tts-1", voice="alloy", input="Good morning")
    assert raw.content.startswith(b"ID3")
    assert raw.headers["content-type"] == "audio/mpeg"
    assert dollars(journey, raw.headers["x-request-id"]) == ({"characters": 12}, pytest.approx(0.00018), "priced")


def test_transcripts_are_paid_by_the_second_or_by_the_token(journey: Journey) -> None:
    client = journey.openai()
    file = ("speech.wav", io.BytesIO(SOUND), "audio/wav")
    raw = client.audio.transcriptions.with_raw_response.create(model="whisper-1", file=file, language="en")
    assert raw.parse().text.startswith("Word0")
    assert dollars(journey, raw.headers["x-request-id"]) == ({"seconds": 9}, pytest.approx(0.0009), "priced")
    sent = journey.asked("openai")[-1]
    assert sent["headers"]["content-type"].startswith("multipart/form-data; boundary=")
    assert 'filename="speech.wav"' in sent["body"]
    asked = {"model": "gpt-4o-mini-transcribe", "file": ("speech.wav", SOUND)}
    raw = client.audio.transcriptions.with_raw_response.create(**asked)
    stream = client.audio.transcriptions.with_raw_response.create(**asked, stream=True)
    *deltas, done = stream.parse()
    assert "".join(event.delta for event in deltas) == done.text == raw.parse().text
    one, other = journey.rows([raw.headers["x-request-id"], stream.headers["x-request-id"]]).values()
    assert one["usage"] == other["usage"]
    assert one["usage"]["classes"]["audio_input"] == 90


def test_a_transcript_as_text_is_estimated(journey: Journey) -> None:
    answer = journey.http.post(
        "/v1/audio/translations",
        data={"model": "whisper-1", "response_format": "text"},
        files={"file": ("a.mp3", SOUND)},
        headers=journey.headers(),
    )
    assert answer.headers["content-type"].startswith("text/plain")
    row = journey.row(answer.headers["x-request-id"])
    assert (row["operation"], row["usage_source"]) == ("translations", "estimated")
    assert row["usage"]["classes"]["seconds"] == 3


def test_images_are_paid_by_the_token_or_by_the_image(journey: Journey) -> None:
    client = journey.openai()
    raw = client.images.with_raw_response.generate(model="gpt-image-1", prompt="A cedar", n=2)
    assert base64.b64decode(raw.parse().data[1].b64_json).startswith(b"\x89PNG")
    classes, cost, status = dollars(journey, raw.headers["x-request-id"])
    assert (classes["output"], status) == (2 * 1056, "priced")
    assert cost == pytest.approx((5 * classes["input"] + 40 * classes["output"]) / 1e6)
    raw = client.images.with_raw_response.edit(model="gpt-image-1", prompt="At night", image=[("a.png", b"\x89PNG")])
    classes, _, _ = dollars(journey, raw.headers["x-request-id"])
    assert classes["image_input"] == 300
    events = list(client.images.generate(model="gpt-image-1", prompt="A cedar", stream=True, partial_images=1))
    assert events[-1].type == "image_generation.completed"


def test_an_image_without_a_price_is_unpriced_and_charged_at_the_ceiling(journey: Journey) -> None:
    raw = journey.openai().images.with_raw_response.generate(model="dall-e-3", prompt="A cedar")
    assert dollars(journey, raw.headers["x-request-id"]) == ({"images": 1}, 0.25, "unpriced")


def test_a_vendor_that_fails_is_fallen_back_from_with_the_whole_form(journey: Journey) -> None:
    journey.fault("azure", kind="status", status=503)
    raw = journey.openai().audio.transcriptions.with_raw_response.create(model="whisper-chain", file=("a.wav", SOUND))
    assert raw.headers["x-gateway-provider"] == "openai"
    assert raw.parse().text.startswith("Word0")
    journey.clear()
    raw = journey.openai().audio.transcriptions.with_raw_response.create(model="whisper-chain", file=("a.wav", SOUND))
    assert raw.headers["x-gateway-provider"] == "azure"
    assert journey.asked("azure")[0]["path"].endswith("/deployments/whisper-1/audio/transcriptions")


@pytest.mark.parametrize("model", ["one-target", "tts-1"])
def test_an_alias_serves_its_own_route(journey: Journey, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        journey.openai().images.generate(model=model, prompt="A cedar")
    assert raised.value.param == "model"
    assert journey.asked("openai") == []


def test_a_rate_that_is_used_up_is_429(journey: Journey) -> None:
    client = journey.openai().with_options(default_headers={"X-Tenant-Id": "tenant-few-passed"})
    with pytest.raises(openai.RateLimitError):  # noqa: PT012 (whichever call finds the rate used up)
        for _ in range(7):
            client.moderations.create(model="omni-moderation-latest", input="Hi")


def test_an_unreadable_form_is_refused_with_a_row(journey: Journey) -> None:
    answer = journey.http.post("/v1/audio/transcriptions", content=b"--x\r\n", headers=journey.headers())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert journey.row(answer.headers["x-request-id"])["status"] == "refused"
