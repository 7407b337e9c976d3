"""The parts of a page that a program writes: between `<!-- NAME -->` and `<!-- end -->`, each on a line of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part's text in its place. Raises ValueError where it has no place for one."""
    for name, text in parts.items():
        place = re.compile(rf"(^<!-- {re.escape(name)} -->\n).*?(^<!-- end -->$)", re.DOTALL | re.MULTILINE)
        page, found = place.subn(lambda at, text=text: f"{at[1]}{text}\n{at[2]}", page)
        if found != 1:
            raise ValueError(f"the page has {found} places <!-- {name} --> … <!-- end -->")
    return page
