"""HTML as a tree of elements. Text and attributes are escaped where the tree is written, so nothing can forget to."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Child = Element | str | None


def el(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Element:
    """An element. `class_` is the attribute class, `aria_label` is aria-label; None and False leave one out."""
    element = Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            element.set(name.rstrip("_").replace("_", "-"), "" if value is True else str(value))
    for child in children:
        if isinstance(child, str):
            _append_text(element, child)
        elif child is not None:
            element.append(child)
    return element


def _append_text(element: Element, text: str) -> None:
    if len(element):
        element[-1].tail = (element[-1].tail or "") + text
    else:
        element.text = (element.text or "") + text


def document(root: Element) -> bytes:
    """The page, as UTF-8. Characters that HTML does not allow are left out."""
    text = ElementTree.tostring(root, encoding="unicode", method="html")
    return ("<!doctype html>\n" + "".join(c for c in text if c >= " " or c in "\n\t")).encode()
