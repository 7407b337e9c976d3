"""A Converse answer as a chat completion."""

from __future__ import annotations

import msgspec

from app.errors import VendorBroke
from app.providers.bedrock.content import unredacted
from app.providers.bedrock.models import reasoning_format
from app.providers.bedrock.wire import (
    ANSWER_TOOL,
    FINISH_REASONS,
    MALFORMED,
    UNREADABLE,
    Block,
    ConverseAnswer,
    Reasoning,
    annotation_of,
    model_of,
    tier_of,
    usage_of,
)
from app.providers.chat_shape import WrittenChoice, WrittenMessage, WrittenToolCall, completion
from app.providers.translator import Answer, Stamp
from app.wire import ABSENT

_answer = msgspec.json.Decoder(ConverseAnswer)


def response(body: bytes, stamp: Stamp) -> Answer:
    try:
        answer = _answer.decode(body)
        if answer.output.message is None:
            raise VendorBroke("the vendor's answer has no message")
        message = _message(answer.output.message.content, stamp.model)
    except UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not a Converse answer") from error
    usage, model = usage_of(answer.usage), model_of(answer.trace)
    finish_reason = finish_reason_of(answer.stop_reason, calls=message.tool_calls is not msgspec.UNSET)
    written = completion(stamp, model, [WrittenChoice(0, message, finish_reason)], usage)
    return Answer(
        body=written,
        model=model,
        usage=usage,
        finish_reason=finish_reason,
        text_bytes=0 if usage else len(msgspec.json.encode(message)),
        service_tier=tier_of(answer.service_tier),
    )


def finish_reason_of(stop_reason: str, *, calls: bool) -> str:
    """OpenAI's word. A schema's tool is no call to the client. Raises VendorBroke for what the model garbled."""
    if stop_reason in MALFORMED:
        raise VendorBroke(f"the vendor says that the model's output is malformed ({stop_reason})")
    word = FINISH_REASONS.get(stop_reason, "stop")
    return "stop" if word == "tool_calls" and not calls else word


def _message(blocks: list[Block], model: str) -> WrittenMessage:
    text: list[str] = []
    reasoning: list[str] = []
    details: list[dict[str, object]] = []
    calls: list[WrittenToolCall] = []
    annotations: list[dict[str, object]] = []
    for block in blocks:
        if block.text is not None:
            text.append(block.text)
        elif block.citations_content is not None:
            text += [cited.text for cited in block.citations_content.content]
            annotations += map(annotation_of, block.citations_content.citations)
        elif block.reasoning_content is not None:
            reasoned = block.reasoning_content.reasoning_text
            if reasoned is not None:
                reasoning.append(reasoned.text)
            whole = detail(_whole(block.reasoning_content), len(details), model)
            details.append(whole | {"format": reasoning_format(model)})
        elif (use := block.tool_use) is not None and not use.is_bedrocks_own:
            arguments = "{}" if use.input == ABSENT else bytes(use.input).decode()
            if use.name == ANSWER_TOOL:
                text.append(arguments)
            else:
                function = {"name": use.name, "arguments": arguments}
                calls.append(WrittenToolCall(id=use.tool_use_id, type="function", function=function))
    return WrittenMessage(
        role="assistant",
        content="".join(text) if text else None,
        refusal=None,
        reasoning_content="".join(reasoning) or msgspec.UNSET,
        reasoning_details=details or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
        annotations=annotations or msgspec.UNSET,
    )


def _whole(reasoning: Reasoning) -> Reasoning:
    """A block's reasoning in the form of a delta."""
    if reasoning.reasoning_text is None:
        return reasoning
    return Reasoning(text=reasoning.reasoning_text.text, signature=reasoning.reasoning_text.signature)


def detail(reasoning: Reasoning, index: int, model: str) -> dict[str, object]:
    """One of `reasoning_details`, or a delta of it: what it takes to send the reasoning back."""
    if reasoning.redacted_content is not None:
        written: dict[str, object] = {
            "type": "reasoning.encrypted",
            "data": unredacted(reasoning.redacted_content, model),
        }
    else:
        written = {"type": "reasoning.text"}
        if reasoning.text is not None:
            written["text"] = reasoning.text
        if reasoning.signature is not None:
            written["signature"] = reasoning.signature
    return written | {"index": index}
