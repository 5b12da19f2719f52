"""The chain in a few lines of Markdown, where a page has no place."""

from __future__ import annotations

from collections.abc import Iterator

from alkn.report import words
from alkn.report.certificate import request_of
from alkn.report.story import Story


def chain_markdown(story: Story) -> str:
    """A table of the decided requests and what is in use: ids, dates and numbers."""
    return "\n".join(_lines(story)) + "\n"


def _lines(story: Story) -> Iterator[str]:
    newest = story.ledger.newest
    yield f"Model in use: **{newest}**, `{story.digests.get(newest, '–')}`"
    yield ""
    yield "| request | verdict | records | due | decided | P before → after | exact memorization | worst attack, P |"
    yield "|---|---|---|---|---|---|---|---|"
    for facts in story.decided:
        asked, row = request_of(facts), facts.evaluation["sets"]["forget"]
        points = [p["probability"] for n, c in (facts.attacks or {}).items() if n != "missing" for p in c["points"]]
        cells = (
            facts.id, f"**{asked['verdict']}**" if not facts.accepted else asked["verdict"], str(asked["records"]),
            asked["due"] or "–", f"{asked['decided']}{' (late)' if asked['late'] else ''}",
            f"{words.number(facts.before['probability'])} → {words.number(row.get('probability'))}",
            f"{words.number(facts.before['exact_memorization'])} → {words.number(row.get('exact_memorization'))}",
            words.number(max(points, default=None)),
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    for facts in story.rejected:
        yield f"\n{facts.id} was **not** forgotten: {facts.entry.reason}"
    for request, why in story.unread.items():
        yield f"\n{request} could not be read: {why}"
