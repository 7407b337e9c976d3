"""The supervisor of `gateway up --detach`: `python -m loadtest.stack JSON`, an object with the fields of UpOptions."""

import sys
from typing import Any

import msgspec

from . import UpOptions, up


def path(kind: type[Any], text: Any) -> Any:
    """Lets msgspec read paths."""
    return kind(text)


sys.exit(up(msgspec.convert(msgspec.json.decode(sys.argv[1]), UpOptions, dec_hook=path)))
