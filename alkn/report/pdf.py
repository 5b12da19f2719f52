"""The certificate on paper. Same document, same bytes: no clock, no host, fonts that come with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from fpdf import FPDF
from fpdf.enums import TableBordersLayout, TableCellFillMode
from fpdf.fonts import FontFace

from alkn.report import words
from alkn.report.sealing import digest_of_document

INK, PALE, LINE = (32, 33, 36), (110, 115, 122), (205, 209, 214)
GOOD, BAD = (24, 104, 58), (160, 33, 40)
WIDTH = 174.0
"""Of the text, in mm: A4 less two margins of 18."""
FOOT = 16


class _Paper(FPDF):
    """A4 with a foot line that says which document a loose sheet belongs to."""

    def __init__(self, foot: str) -> None:
        super().__init__(format="A4")
        self._foot = foot
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        for family, style, file in (
            ("sans", "", "DejaVuSans.ttf"), ("sans", "B", "DejaVuSans-Bold.ttf"), ("mono", "", "DejaVuSansMono.ttf"),
        ):  # fmt: skip
            self.add_font(family, style, fonts / file)
        self.set_margins(18, 16, 18)
        self.set_auto_page_break(True, FOOT + 6)

    def footer(self) -> None:
        """Which document, which page."""
        self.set_y(-FOOT)
        self.set_draw_color(*LINE)
        self.line(18, self.get_y(), 18 + WIDTH, self.get_y())
        self.set_font("mono", "", 6.2)
        self.set_text_color(*PALE)
        self.cell(WIDTH - 30, 6, self._foot)
        self.set_font("sans", "", 7)
        self.cell(30, 6, f"page {self.page_no()} of {{nb}}", align="R")


def certificate_pdf(document: Mapping[str, Any]) -> bytes:
    """The document for people who sign and file it; every number stands in the JSON too.

    Args:
        document: from :func:`alkn.report.certificate.certificate_of`.
    """
    digest = digest_of_document(document)
    paper = _Paper(f"{document['project']} · {document['request']['id']} · document {digest}")
    issued = datetime.fromisoformat(document["issued"]).replace(tzinfo=UTC)
    paper.set_creation_date(issued)
    paper.set_title(f"{_title(document)}: {document['request']['id']}")
    paper.set_author(document["project"])
    paper.set_creator(document["issuer"]["program"])
    paper.set_producer("fpdf2")
    paper.set_lang("en")
    paper.add_page()
    _head(paper, document)
    _request(paper, document)
    _measured(paper, document)
    _kept(paper, document)
    _attacks(paper, document)
    _gates(paper, document)
    _heading(paper, "What was not measured, and why")
    _bullets(paper, [f"{line['what']}: {line['why']}." for line in document["not_measured"]] or ["Nothing is missing."])
    _heading(paper, "What this does not prove")
    _bullets(paper, document["limits"])
    _digests(paper, document)
    _how_to_check(paper, document, digest)
    return bytes(paper.output())


def _title(document: Mapping[str, Any]) -> str:
    return "Certificate of unlearning" if document["forgotten"] else "Certificate of a rejected request"


def _head(paper: _Paper, document: Mapping[str, Any]) -> None:
    paper.set_text_color(*INK)
    paper.set_font("sans", "B", 19)
    paper.cell(WIDTH, 10, _title(document), new_x="LMARGIN", new_y="NEXT")
    paper.set_font("sans", "", 9)
    paper.set_text_color(*PALE)
    paper.cell(WIDTH, 6, f"Project {document['project']} · issued {document['issued']}", new_x="LMARGIN", new_y="NEXT")
    paper.ln(2)
    good = document["forgotten"]
    paper.set_fill_color(*(GOOD if good else BAD))
    paper.set_text_color(255, 255, 255)
    paper.set_font("sans", "B", 12.5)
    verdict = "FORGOTTEN, as measured below" if good else "NOT FORGOTTEN: the request was rejected"
    paper.cell(WIDTH, 11, f"  {document['request']['id']}   {verdict}", fill=True, new_x="LMARGIN", new_y="NEXT")
    paper.ln(2.5)
    _text(paper, document["statement"], size=9.5)


def _request(paper: _Paper, document: Mapping[str, Any]) -> None:
    request, chain = document["request"], document["chain"]
    method = dict(document["method"].get("method", {}))
    targets = document["method"].get("targets", {})
    rows = [
        ["Records", str(request["records"])],
        ["Received", request["received"]],
        ["Decided", f"{request['decided']} ({words.timely(request)})"],
        ["Started from", chain["previous"]],
        ["Requests before it", ", ".join(chain["earlier"]) or "none"],
        ["Method", " ".join(str(method[name]) for name in ("name", "preset") if name in method) or "–"],
        ["Targets", words.settings(targets)],
    ]
    for name, count in request["overlaps"].items():
        rows.append(["Stands elsewhere too", f"{count} of the records stand in {name} as well"])
    _table(paper, [], rows, widths=(40, 134), bold_first=True)


def _measured(paper: _Paper, document: Mapping[str, Any]) -> None:
    _heading(paper, "The records to be forgotten")
    _text(
        paper,
        "P is the probability of the right answer per token, exact memorization the share of its tokens that the model"
        " would say by itself; both in [0, 1]. The last columns are what to hold them against: the base model, a model"
        " that never saw these records, and comparable records that no model ever saw.",
        size=8, pale=True,
    )  # fmt: skip
    sets = document["metrics"]
    never = sets.get("holdout", {})
    rows = [
        [
            words.name_of(metric), words.number(row.get("before")), words.number(row["value"]),
            words.interval(row.get("interval")), words.number(row.get("base")),
            _reference(row),
            words.number(never.get(metric, {}).get("value")),
        ]
        for metric, row in sets.get("forget", {}).items()
    ]  # fmt: skip
    head = ["metric", "before", "after", "interval", "base", "reference", "never seen"]
    _table(paper, head, rows, widths=(46, 18, 18, 34, 18, 20, 20), right=range(1, 7))
    earlier = {name.partition("/")[2]: row for name, row in sets.items() if name.startswith("earlier/")}
    if earlier:
        _heading(paper, "Earlier requests: has anything come back?")
        _table(
            paper, ["request", "P", "interval", "exact memorization", "interval"],
            [
                [name, *(cell for metric in ("probability", "exact_memorization") for cell in _cells(row, metric))]
                for name, row in earlier.items()
            ],
            widths=(46, 20, 36, 36, 36), right=range(1, 5),
        )  # fmt: skip


def _kept(paper: _Paper, document: Mapping[str, Any]) -> None:
    _heading(paper, "What must stay known, and the model as a whole")
    _text(
        paper,
        "Utility records were never drawn on by any step; retain records were, so they flatter. P of each set; all"
        " other metrics stand in the JSON.",
        size=8, pale=True,
    )  # fmt: skip
    rows = []
    for name, row in document["metrics"].items():
        if name.startswith(("utility/", "retain/")) and "probability" in row:
            p = row["probability"]
            rows.append([
                name, words.number(p.get("before")), words.number(p["value"]), words.interval(p.get("interval")),
                words.number(p.get("base")), _reference(p),
            ])  # fmt: skip
    rows += [
        [
            words.name_of(name), words.number(row.get("before")), words.number(row["value"]), "–",
            words.number(row.get("base")), "–",
        ]
        for name, row in document["metrics"].get("model", {}).items()
    ]  # fmt: skip
    head = ["set", "before", "after", "interval", "base", "reference"]
    _table(paper, head, rows, widths=(60, 21, 21, 34, 18, 20), right=range(1, 6))
    _text(paper, f"Intervals: {document['intervals']}.", size=7.5, pale=True)


def _attacks(paper: _Paper, document: Mapping[str, Any]) -> None:
    _heading(paper, "Attacks: what comes back, and what it costs")
    if not document["attacks"]:
        _text(paper, "No attack was run.", size=9)
    for name, curve in document["attacks"].items():
        paper.set_font("sans", "B", 8.5)
        paper.set_text_color(*INK)
        paper.cell(WIDTH, 6, f"{words.name_of(name)}", new_x="LMARGIN", new_y="NEXT")
        _text(paper, f"Budget: {words.settings(curve.get('budget', {}))}.", size=7.5, pale=True)
        about = words.about(curve)[:2]
        rows = [
            [words.plain(p["at"]), *(words.number(p.get(metric)) for metric, _ in about)]
            for p in curve.get("points", [])
        ]
        heads = [curve.get("unit", "spent"), *(name for _, name in about)]
        _table(paper, heads, rows, widths=(34, 34, 44), right=range(3))


def _gates(paper: _Paper, document: Mapping[str, Any]) -> None:
    _heading(paper, "Gates")
    rows: list[list[str]] = []
    marks: list[bool | None] = []
    for name, gate in document["gates"].items():
        if gate["passed"] is None:
            rows.append([name, f"not asked: {gate['reason']}", "–", "–", "–"])
            marks.append(None)
        for check in gate["checks"]:
            verdict = "passed" if check["passed"] else "FAILED"
            rows.append([name, check["what"], words.number(check["value"]), words.number(check["limit"]), verdict])
            marks.append(check["passed"])
    head = ["gate", "check", "value", "limit", ""]
    _table(paper, head, rows, widths=(32, 76, 24, 22, 20), right=(2, 3), marks=marks)


def _digests(paper: _Paper, document: Mapping[str, Any]) -> None:
    _heading(paper, "Digests")
    digests, code = document["digests"], document["code"]
    rows = [[f"in: {name}", value] for name, value in digests["inputs"].items()]
    rows += [[f"out: {name}", value] for name, value in digests["outputs"].items()]
    rows.append(["manifest.json", digests["manifest"]])
    rows.append(["code", " ".join([code["version"], code.get("commit", ""), code["digest"]])])
    rows.append(["environment", ", ".join(f"{name} {value}" for name, value in document["environment"].items())])
    rows.append(["seed", document["seed"]])
    _table(paper, [], rows, widths=(48, 126), size=6.6, mono=1)


def _how_to_check(paper: _Paper, document: Mapping[str, Any], digest: str) -> None:
    _heading(paper, "Signature")
    _table(
        paper, [],
        [
            ["document", digest],
            ["key", document["issuer"]["key"]],
            ["signed form", document["signed_form"]],
        ],
        widths=(28, 146), size=6.6, mono=1,
    )  # fmt: skip
    _text(
        paper,
        "The signatures (Ed25519) stand in the JSON that was issued with this PDF; this paper alone proves nothing."
        f" To check both, offline:  alkn certificate verify {document['request']['id']}.json --public-key"
        " certificate.pub   The public key is data/certificate.pub of the project's git repository; compare its"
        " fingerprint with the one above over a way of your own.",
        size=8.5,
    )  # fmt: skip


def _reference(row: Mapping[str, Any]) -> str:
    """The first reference model's number; the JSON has all, each with its digest."""
    return words.number(next(iter(row.get("reference", {}).values()), None))


def _cells(row: Mapping[str, Any], metric: str) -> list[str]:
    value = row.get(metric, {})
    return [words.number(value.get("value")), words.interval(value.get("interval"))]


def _heading(paper: _Paper, text: str) -> None:
    if paper.will_page_break(26):  # no heading at the foot of a page
        paper.add_page()
    paper.ln(3.5)
    paper.set_font("sans", "B", 11)
    paper.set_text_color(*INK)
    paper.cell(WIDTH, 7, text, new_x="LMARGIN", new_y="NEXT")


def _text(paper: _Paper, text: str, *, size: float, pale: bool = False) -> None:
    paper.set_font("sans", "", size)
    paper.set_text_color(*(PALE if pale else INK))
    paper.multi_cell(WIDTH, size * 0.52, text, align="L", new_x="LMARGIN", new_y="NEXT")
    paper.ln(1.2)


def _bullets(paper: _Paper, lines: Sequence[str]) -> None:
    paper.set_font("sans", "", 8.5)
    paper.set_text_color(*INK)
    for line in lines:
        paper.cell(4.5, 4.5, "•")
        paper.multi_cell(WIDTH - 4.5, 4.5, line, align="L", new_x="LMARGIN", new_y="NEXT")
        paper.ln(0.6)


def _table(
    paper: _Paper,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    widths: Sequence[float],
    right: Sequence[int] = (),
    size: float = 8,
    mono: int | None = None,
    bold_first: bool = False,
    marks: Sequence[bool | None] = (),
) -> None:
    """A table with thin lines; ``marks`` colours a row's last cell, ``mono`` is a column of digests."""
    if not rows:
        return
    paper.set_font("sans", "", size)
    paper.set_text_color(*INK)
    paper.set_draw_color(*LINE)
    paper.set_fill_color(255, 255, 255)
    paper.set_line_width(0.15)
    with paper.table(
        col_widths=tuple(widths), width=sum(widths), align="L", line_height=size * 0.58, padding=(0.5, 1.2),
        text_align=tuple("RIGHT" if i in right else "LEFT" for i in range(len(widths))),
        borders_layout=TableBordersLayout.HORIZONTAL_LINES, first_row_as_headings=bool(head),
        headings_style=FontFace(emphasis="BOLD", color=PALE), cell_fill_mode=TableCellFillMode.NONE,
    ) as table:  # fmt: skip
        if head:
            table.row(list(head))
        for number, cells in enumerate(rows):
            row = table.row()
            for column, text in enumerate(cells):
                style = FontFace(family="mono") if column == mono else None
                if bold_first and column == 0:
                    style = FontFace(color=PALE)
                if marks and column == len(cells) - 1 and marks[number] is not None:
                    style = FontFace(emphasis="BOLD", color=GOOD if marks[number] else BAD)
                row.cell(text, style=style)
    paper.ln(1.5)
