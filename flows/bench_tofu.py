"""``make bench-tofu``: the TOFU protocol through the whole pipeline, next to the published prototype's numbers."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from alkn.files import read_json
from alkn.project import Project
from alkn.requests.ledger import load_ledger
from alkn.summary import chain_rows

CONFIG = Path(__file__).parent.parent / "configs" / "tofu.yaml"
DOMAINS = ("retain", "real_authors", "world_facts")
PROTOTYPE = {
    "`rounds`, criterion exact, P ≤ 0.01 (prototype)": ((0.999, 0.999, 0.999), (0.447, 0.783, 0.858)),
    "NPO + retain loss, 300 steps (prototype; exact memorization 0.51 to 0.58)": (
        (0.999, 1.000, 1.000),
        (0.782, 0.929, 0.935),
    ),
    "`reference`, P ≤ 0.15 (prototype)": ((0.085, 0.627, 0.554), (0.103, 0.518, 0.637)),
}
"""Half drawn on and half never drawn on, after five requests, as measured by the prototype (docs/EXPERIMENTS.md)."""


def alkn(*arguments: str, folder: Path) -> None:
    """Run the command line as a user would; it must succeed."""
    subprocess.run([sys.executable, "-m", "flows.cli", "-C", str(folder), *arguments], check=True)


def run_chain(folder: Path, overrides: list[str]) -> None:
    """Make the project in ``folder`` if it is not there, add the five requests and process what is pending."""
    if not (folder / "params.yaml").exists():
        alkn("init", str(folder), "--params", str(CONFIG), folder=Path("."))
        for number in range(1, 6):
            name = f"tofu_{number}"
            alkn("request", "add", f"data/splits/forget/{name}.jsonl", "--id", name, folder=folder)
    settings = [part for override in overrides for part in ("--set", override)]
    alkn("run", *settings, folder=folder)


def table(folder: Path) -> str:
    """The chain's result beside the prototype's, as Markdown."""
    project = Project.at(folder)
    ledger = load_ledger(project)
    lines = [
        "| after | verdict | P | exact mem. | half drawn on | half never drawn on | steps | passes | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in chain_rows(project, ledger):
        sets = read_json(project.step(row["request"]).evaluation)["sets"]
        drawn, never = (
            " / ".join(f"{sets[f'{split}/{domain}']['probability']:.3f}" for domain in DOMAINS)
            for split in ("retain", "utility")
        )
        lines.append(
            f"| {row['request']} | {row['verdict']} | {row['p_after']:.4f} | {row['em_after']:.3f} | {drawn} |"
            f" **{never}** | {row['steps']} | {row['passes']:,} | {row['seconds']:.0f} |"
        )
    rows = [row for row in chain_rows(project, ledger) if "passes" in row]
    lines.append(f"| all | | | | | | | {sum(r['passes'] for r in rows):,} | {sum(r['seconds'] for r in rows):.0f} |")
    for name, halves in PROTOTYPE.items():
        drawn, never = (" / ".join(f"{value:.3f}" for value in half) for half in halves)
        lines.append(f"| {name} | | | | {drawn} | {never} | | | |")
    return "\n".join(lines)


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="project folder to make or go on with [default: a new one]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args()
    if "ALKN_DATA" not in os.environ:
        click.echo("ALKN_DATA is not set: TOFU is read from the hub", err=True)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="alkn-tofu-")) / "tofu"
    run_chain(folder, arguments.set)
    click.echo(table(folder))
    click.echo(f"\nproject: {folder}", err=True)


if __name__ == "__main__":
    main()
