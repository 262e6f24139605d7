"""Reads a page of ours as a browser would: its tables as text, its elements by name, its packed answers."""

import base64
import gzip
import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """A parsed page.

    `tables`: by id, rows of cells with single spaces; `elements`: (name, attributes); `texts`: what follows an id.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.words = ""
        self._table: list[list[str]] | None = None
        self._in_cell = False
        self._id = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._id = attributes.get("id") or ("" if tag in ("script", "style") else self._id)
        if tag == "table":
            self._table = self.tables.setdefault(attributes.get("id") or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        elif tag in ("td", "th"):
            self._in_cell = False
            if self._table:
                self._table[-1][-1] = " ".join(self._table[-1][-1].split())

    def handle_data(self, data: str) -> None:
        if self._table and self._in_cell:
            self._table[-1][-1] += data
        self.texts[self._id] = self.texts.get(self._id, "") + data
        self.words += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of a name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, id: str) -> dict[str, list[str]]:
        """A table's rows by their first cell; where several are alike, as GGUF forms, the last."""
        return {row[0]: row[1:] for row in self.tables[id][1:]}

    def packed(self) -> Any:
        """The answers as the page's script unpacks them."""
        return json.loads(gzip.decompress(base64.b64decode(self.texts["packed"])))
