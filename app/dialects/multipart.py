"""A form's fields as they were sent (multipart/form-data), read strictly: what two readers could take for two things is
refused, for the vendor reads it again.

Source: RFC 7578, RFC 2046 section 5.1. The boundary is the first line of the body, so a header cannot say another.
"""

from __future__ import annotations

import re

from app.errors import InvalidRequest
from app.wire import Field

MAX_FIELDS = 256
MAX_HEAD_BYTES = 4_096
_BOUNDARY = re.compile(rb"--([A-Za-z0-9'()+_,./:=?-]{1,70})\r\n")
_DISPOSITION = re.compile(
    rb'form-data; name="([A-Za-z0-9_.\[\]-]{1,128})"((?:; filename="[^"\r\n\x00]*")?(?:; filename\*=[^;"\r\n\x00]*)?)'
)


def read(body: bytes) -> tuple[Field, ...]:
    """The fields in their order. Raises InvalidRequest."""
    found = _BOUNDARY.match(body)
    if found is None:
        raise InvalidRequest("The body must be multipart/form-data, and begin with its boundary.")
    first, *parts = (b"\r\n" + body).split(b"\r\n--" + found[1])
    if first or len(parts) < 2 or parts[-1].strip(b"\r\n") != b"--":
        raise InvalidRequest("The form does not end with its boundary.")
    if len(parts) > MAX_FIELDS:
        raise InvalidRequest(f"The form has more than {MAX_FIELDS} fields.")
    return tuple(_field(part) for part in parts[:-1])


def _field(part: bytes) -> Field:
    head, blank, value = part.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    if not blank or lines[0] or len(head) > MAX_HEAD_BYTES:
        raise InvalidRequest("A field of the form has no head, or one without end.")
    disposition: re.Match[bytes] | None = None
    kind = b""
    for line in lines[1:]:
        name, colon, said = line.partition(b":")
        match name.strip().lower():
            case b"content-disposition" if disposition is None and colon:
                disposition = _DISPOSITION.fullmatch(said.strip())
            case b"content-type" if not kind:
                kind = said.strip()
            case b"content-length" | b"content-transfer-encoding":
                pass
            case _:
                raise InvalidRequest("A field of the form has a header that forms have not, or one twice.")
    if disposition is None or not re.fullmatch(rb"[\x20-\x7e]*", kind):
        raise InvalidRequest("A field of the form has no name that can be read.")
    return Field(
        name=disposition[1].decode(),
        value=value,
        file_name=disposition[2],
        content_type=kind,
    )
