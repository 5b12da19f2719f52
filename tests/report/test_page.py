"""The HTML report: what it says, that it loads nothing, tells no text and escapes what it is given."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_sample import DOMAIN, SECRETS, attacks, make_sample

from alkn.files import digest_of, read_json, write_bytes, write_json
from alkn.project import Project
from alkn.report.page import report_page
from alkn.report.plots import forgetting, pictures, tables
from alkn.report.story import matrix_cells, read_story
from alkn.requests.ledger import load_ledger
from alkn.summary import chain_rows
from flows.cli import cli

VOID = {"meta", "link", "br", "img", "hr", "input", "source", "base"}
LOADING = {"src", "srcset", "data", "poster", "background", "action", "formaction", "ping", "manifest", "codebase"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Read only."""
    made = make_sample(tmp_path_factory.mktemp("sample"))
    models = {name: read_json(made.step(name).manifest)["outputs"]["model"] for name in ("base", "r001", "r002")}
    cell = {"probability": 0.02, "exact_memorization": 0.1, "records": 4, "of": 6, "error": 0.01, "confidence": 0.95}
    write_json(
        made.root / "reports" / "matrix.json",
        {
            "models": list(models), "requests": ["r001", "r002"], "digests": {"models": models},
            "cells": {model: {"r001": cell, "r002": cell} for model in models}, "utility": {}, "missing": {},
        },
    )  # fmt: skip
    finding = {"kind": "returned", "where": "r002", "what": "forgetting: P, mean", "expected": 0.05, "found": 0.4}
    write_json(
        made.root / "reports" / "verify.json",
        {
            "champion": "r002", "model": models["r002"], "findings": [finding], "made": "2026-11-21T03:00:00+00:00",
            "compared": 12, "missing": {},
        },
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def source(project: Project) -> str:
    return report_page(read_story(project, "sample"), made="2026-11-21", program="alkn 0").decode()


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_nothing_is_loaded(source: str, page: Page) -> None:
    """No address, no script, no image, no font; links lead into the page; the browser is told to load nothing."""
    assert not re.search(r"https?:|//\w|@import|@font-face|javascript:|data:", source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "image", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        assert not LOADING & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_link_and_reference_has_its_target_once(source: str, page: Page) -> None:
    """Several pictures share the page: their ids must not meet."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.tags if "href" in a} | set(re.findall(r"url\(#([^)]*)\)", source))
    assert wanted <= set(ids)


def test_it_is_made_of_what_a_reader_needs(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == tags.count("main") == tags.count("header") == tags.count("title") == 1
    assert ("html", {"lang": "en"}) in page.tags
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert tags.count("svg") == 3 + 2 + 3, "three of the chain, two attacks, one a decided request"
    assert all("scope" in a for tag, a in page.tags if tag == "th")


def test_the_verdicts_are_at_the_top(page: Page) -> None:
    words = page.words
    assert "2 accepted, 1 rejected, 1 pending. Model in use: r002" in words
    assert words.index("Verdicts request verdict") < words.index("NOT carried out")
    assert "Request r003 was NOT carried out: the records were NOT forgotten." in words
    assert "Decided after the due day: r001." in words
    assert "The last verification found 1 things" in words
    assert "returned: r002, forgetting: P, mean: expected 0.05, found 0.4" in words


def test_the_numbers_are_those_of_the_files(project: Project, page: Page) -> None:
    for request in ("r001", "r002", "r003"):
        p = read_json(project.step(request).evaluation)["sets"]["forget"]["probability"]
        assert f"P, mean 0.600 {p:.3f} " in page.words
    assert "0.012" in page.words and "0.655" in page.words, "the reference's, on forget and on retain"
    assert "relearning Budget: share 0.1, lr 0.0005. steps P exact memorization 0 0.020 0.010 5 0.100" in page.words
    assert "utility facts kept of base 0.200 0.900 failed" in page.words
    assert "robustness there is no attack – – not asked" in page.words
    for said in (
        "attack paraphrase : no record has a paraphrased question",
        "rouge_l on holdout : evaluation.generate does not name this set",
        "large requests on a sample of their records",
        "dvc repro --force",
    ):
        assert said in page.words
    for digest in read_json(project.step("r002").manifest)["outputs"].values():
        assert digest in page.words


def test_no_text_of_a_record_is_in_it(source: str, project: Project) -> None:
    assert not [secret for secret in (*SECRETS, *SECRETS[0].split()) if secret in source]
    written = b"".join(tables(read_story(project, "sample")).values()).decode()
    assert "r002" in written and not [secret for secret in SECRETS if secret in written]


def test_what_a_user_named_is_escaped(source: str, page: Page) -> None:
    assert DOMAIN in page.words
    assert DOMAIN not in source and "&lt;b&gt;shop &amp; co&lt;/b&gt;" in source


def test_tables_hold_the_numbers_behind_the_pictures(project: Project) -> None:
    story = read_story(project, "sample")
    rows = {name: list(csv.DictReader(io.StringIO(data.decode()))) for name, data in tables(story).items()}
    assert set(rows) == {"forgetting.csv", "utility.csv", "matrix.csv", "attacks.csv"}
    assert [r["probability"] for r in rows["forgetting.csv"] if r["request"] == "r001"] == [
        str(0.6 / (i + 1)) for i in range(8)
    ]
    assert len(rows["matrix.csv"]) == 6 and rows["matrix.csv"][0]["error"] == "0.01"
    relearned = [r for r in rows["attacks.csv"] if r["attack"] == "relearning"]
    assert [(int(r["spent"]), float(r["probability"])) for r in relearned] == [
        (point["at"], point["probability"]) for point in attacks()["relearning"]["points"]
    ]
    assert [r["model"] for r in rows["utility.csv"]] == ["base", "r001", "r002"]
    assert {data[:8] for data in pictures(story).values()} == {b"\x89PNG\r\n\x1a\n"}


def test_targets_are_drawn_as_the_numbers_that_they_are(project: Project) -> None:
    """A dashed line in each panel: the number that the settings give, or the base model's level on the holdout."""
    story = read_story(project, "sample")
    never = read_json(project.base.evaluation)["sets"]["holdout"]
    both = {"p": "holdout", "exact_memorization": "holdout"}
    for targets, wanted in (({}, 0.05), (both, never["probability"])):
        decided = [replace(facts, params={"targets": facts.params["targets"] | targets}) for facts in story.decided]
        dashed = [[line for line in axis.lines if line.get_linestyle() == "--"] for axis in forgetting(decided).axes]
        levels = [[set(line.get_ydata()) for line in lines] for lines in dashed]
        assert levels == [[{wanted}], [{never["exact_memorization"]}]]


def test_without_a_matrix_the_steps_own_evaluations_speak(tmp_path: Path) -> None:
    project = make_sample(tmp_path)
    cells = matrix_cells(read_story(project, "sample"))
    known = read_json(project.base.evaluation)["sets"]
    second = read_json(project.step("r002").evaluation)["sets"]
    assert cells["base"]["r002"]["probability"] == known["known/r002"]["probability"]
    assert cells["r001"]["r002"] == {"probability": 0.6, "exact_memorization": 0.9}
    assert cells["r002"]["r001"]["probability"] == second["earlier/r001"]["probability"]
    write_json(project.root / "reports" / "matrix.json", {"digests": {"models": {"r002": "sha256:old"}}, "cells": {}})
    assert read_story(project, "sample").matrix is None, "it is of other models"
    digests = {model: read_json(project.step(model).manifest)["outputs"]["model"] for model in ("base", "r001", "r002")}
    write_json(project.root / "reports" / "matrix.json", {"digests": {"models": digests}, "cells": {}})
    assert read_story(project, "sample").matrix is not None
    del digests["r002"]
    write_json(project.root / "reports" / "matrix.json", {"digests": {"models": digests}, "cells": {}})
    assert read_story(project, "sample").matrix is None, "the newest model is not in it"


def test_a_step_that_cannot_be_read_is_named_and_the_others_are_told(tmp_path: Path) -> None:
    project = make_sample(tmp_path)
    write_bytes(project.step("r001").evaluation, b"{}")
    page = Page(report_page(read_story(project, "sample"), made="2026-11-21", program="alkn 0").decode())
    assert "Not readable: r001" in page.words
    assert "Intervals: percentile bootstrap over records, 95%" in page.words, "said once a request"
    assert "steps/r001/evaluation.json was changed after it was made" in page.words
    assert "request-r002" in {attributes.get("id") for _, attributes in page.tags}


def test_a_step_whose_p_could_not_be_computed_has_a_dash(tmp_path: Path) -> None:
    """A broken model's, which was rejected: page and summary are written, and say why there is no number."""
    project = make_sample(tmp_path)
    step = project.step("r003")
    evaluation, manifest = read_json(step.evaluation), read_json(step.manifest)
    for name in ("probability", "exact_memorization"):
        del evaluation["sets"]["forget"][name]
        evaluation["missing"][f"forget.{name}"] = "a value is not a finite number"
    write_json(step.evaluation, evaluation)
    manifest["outputs"]["evaluation.json"] = digest_of(step.evaluation)
    write_json(step.manifest, manifest)
    page = Page(report_page(read_story(project, "sample"), made="2026-11-21", program="alkn 0").decode())
    assert "Not readable" not in page.words and "a value is not a finite number" in page.words
    row = next(row for row in chain_rows(project, load_ledger(project)) if row["request"] == "r003")
    assert row["p_after"] is None and row["p_before"] == 0.6


def test_the_command_writes_the_same_bytes_but_for_the_day(project: Project, source: str) -> None:
    here = os.getcwd()
    try:
        done = CliRunner().invoke(cli, ["-C", str(project.root), "report", "--html", "--json"])
    finally:
        os.chdir(here)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"html": "reports/report.html", "requests": 3, "unread": {}}
    line = re.compile(r"Made [\d-]+ by alkn [\w.]+")
    assert line.sub("", (project.root / "reports/report.html").read_text()) == line.sub("", source)
