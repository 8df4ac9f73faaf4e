"""Markup in which nothing can be forgotten: text is escaped where it becomes part of an element, and only there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ["Html", "hide", "markup", "plain", "spell", "table", "tag"]


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def markup(value: object) -> str:
    """A value as markup; what is not markup already is escaped."""
    return value if isinstance(value, Html) else escape(spell(value))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; a trailing underscore frees an attribute from a Python keyword."""
    opened = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    inside = "".join(markup(child) for child in children)
    return Html(f"<{name}{opened}>" if name == "img" else f"<{name}{opened}>{inside}</{name}>")


def spell(value: object) -> str:
    """A value as people read it: thousands in groups, four digits that tell something, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.4f}" if 0.001 <= size < 10 else f"{value:,.2f}" if 10 <= size < 1e6 else f"{value:.4g}"
    return str(value)


def plain(value: Any) -> str:
    """A setting as it was given: no rounding, no grouping."""
    if value is None:
        return "none"  # as the command line spells it
    return hide(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def hide(text: str) -> str:
    """Without the password of a database address: pages are sent around."""
    return re.sub(r"(://[^/\s:@]*:)[^@\s]+@", r"\1***@", text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], total: Iterable[Sequence[object]] = ()) -> Html:
    """A table whose first column names the row; columns of numbers stand at the right."""
    body, foot = list(rows), list(total)
    numbers = [
        all(isinstance(row[index], int | float | None) for row in body) and any(row[index] is not None for row in body)
        for index in range(len(head))
    ]

    def line(row: Sequence[object], **attributes: object) -> Html:
        cells = [tag("td", cell, **({"class": "number"} if number else {})) for cell, number in zip(row[1:], numbers[1:], strict=True)]
        return tag("tr", tag("th", row[0], scope="row"), *cells, **attributes)

    top = [tag("th", name, scope="col", **({"class": "number"} if number else {})) for name, number in zip(head, numbers, strict=True)]
    lines = [*(line(row) for row in body), *(line(row, class_="total") for row in foot)]
    return tag("div", tag("table", tag("thead", tag("tr", *top)), tag("tbody", *lines)), class_="wide")
