"""Requests for an answer that a vendor keeps: what they ask for stands in the method and the path.

Source: OpenAI API reference, Responses.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from app.errors import InvalidRequest, MethodNotAllowed, NotFound
from app.wire import KeptRequest

METHODS = ("GET", "DELETE", "POST")
ROUTES = (("GET", "{id}"), ("DELETE", "{id}"), ("GET", "{id}/input_items"))
"""What is offered, below the route that makes answers."""
_PATH = re.compile(r"([A-Za-z0-9_-]{1,256})(/[a-z_]+)?")
_QUERY = {
    "": re.compile(r"include(\[\d*\])?"),
    "/input_items": re.compile(r"include(\[\d*\])?|limit|order|after"),
}
"""By what is asked for: the parameters that go on to the vendor."""
MOST_PARAMETERS = 100


def read_kept(method: str, path: str, query: str) -> KeptRequest:
    """The request for `path` below the route. Raises InvalidRequest, NotFound, MethodNotAllowed."""
    found = _PATH.fullmatch(path)
    name, part = (found[1], found[2] or "") if found else ("", "")
    if part == "/cancel":
        raise InvalidRequest("There is nothing to cancel: `background` is not offered. Close the stream.", param="id")
    if not name or part not in _QUERY:
        raise NotFound("There is no such route below /v1/responses: GET or DELETE an id, or GET its input_items.")
    offered = [one for one, route in ROUTES if route == "{id}" + part]
    if method not in offered:
        raise MethodNotAllowed(f"This route takes {' and '.join(offered)}.")
    try:
        asked = parse_qsl(query, keep_blank_values=True, max_num_fields=MOST_PARAMETERS)
    except ValueError:
        said = f"The query has more than {MOST_PARAMETERS} parameters: leave some out."
        raise InvalidRequest(said, param="query") from None
    for parameter, value in asked:
        if parameter == "stream" and value == "false":
            continue
        if not _QUERY[part].fullmatch(parameter):
            raise InvalidRequest(f"`{parameter}` is not offered here: leave it out.", param=parameter)
    kept = tuple((parameter, value) for parameter, value in asked if parameter != "stream")
    operation = "delete" if method == "DELETE" else "retrieve"
    return KeptRequest(operation=operation, name=name, items=part == "/input_items", query=kept)


def nothing(body: bytes) -> KeptRequest:
    """A body has no say here."""
    raise NotFound("There is no such route below /v1/responses.")
