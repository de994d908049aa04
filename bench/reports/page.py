"""A report as one HTML page that needs nothing beside itself: no script, no font, no network."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from bench.reports.content import Section, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d8d8d8; --soft: #f5f5f5;
  --good: #00705a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #17181a; --line: #3a3c40;
  --soft: #202226; --good: #52d3ad; --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
nav a { margin-right: 1rem; color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8rem 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; }
thead th { background: var(--soft); } .number { text-align: right; white-space: nowrap; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
.doubt { border-left: 3px solid var(--bad); padding-left: 0.8rem; }
figure { margin: 1rem 0; overflow-x: auto; } summary { cursor: pointer; }
"""


def render(sections: Sequence[Section], title: str) -> str:
    """The page."""
    page = Element("html", {"lang": "en"})
    head = SubElement(page, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    SubElement(head, "title").text = title
    SubElement(head, "style").text = _STYLE
    content = SubElement(page, "body")
    SubElement(content, "h1").text = title
    links = SubElement(content, "nav")
    for section in sections:
        SubElement(links, "a", {"href": f"#{section.name}"}).text = section.name
    for section in sections:
        _section(content, section)
    # XML that HTML reads alike: every element has its end, so no cell or cut-off block swallows others.
    return f"<!DOCTYPE html>\n{tostring(page, encoding='unicode', short_empty_elements=False)}\n"


def _section(content: Element, section: Section) -> None:
    block = SubElement(content, "section", {"id": section.name})
    SubElement(block, "h2").text = section.title
    kind = {"class": "doubt"} if section.name == "machine" else {}
    for paragraph in section.text:
        SubElement(block, "p", kind).text = paragraph
    for _, plot in section.plots:
        SubElement(block, "figure").append(plot)
    for table in section.tables:
        _table(block, table)
    if section.rounds is not None:
        details = SubElement(block, "details")
        SubElement(details, "summary").text = "Every round"
        _table(details, section.rounds)


def _table(parent: Element, table: Table) -> None:
    block = SubElement(SubElement(parent, "div", {"class": "wide"}), "table")
    if table.title:
        SubElement(block, "caption").text = table.title
    row = SubElement(SubElement(block, "thead"), "tr")
    for index, cell in enumerate(table.head):
        SubElement(row, "th", _kind(index, table)).text = cell
    rows = SubElement(block, "tbody")
    for cells in table.rows:
        row = SubElement(rows, "tr")
        for index, cell in enumerate(cells):
            kind = {"class": cell} if cell in ("yes", "no") else _kind(index, table)
            SubElement(row, "td", kind).text = cell


def _kind(index: int, table: Table) -> dict[str, str]:
    return {"class": "number"} if index >= table.numbers_from else {}
