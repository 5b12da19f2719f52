"""The command line. Heavy imports stand inside the commands: ``alkn --help`` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.certificates import certificate
from flows.console import JSON, here, say, show_table
from flows.requesting import request
from flows.stages import stage

if TYPE_CHECKING:
    from alkn.project import Project


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-C", "folder", type=click.Path(path_type=Path), default=".", help="Project folder [default: here].")
@click.version_option(package_name="alkn")
def cli(folder: Path) -> None:
    """Continual unlearning: deletion requests for a language model, from intake to proof.

    Exit status: 0 done, 1 a gate or a check failed, 2 the input is wrong.
    """
    if not folder.is_dir():
        from alkn.errors import InputError

        raise InputError(f"{folder}: no such folder")
    os.chdir(folder)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", help="Folder or hub id of your causal language model [default: trained from scratch].")
@click.option(
    "--retain", type=click.Path(path_type=Path), help="Records that must stay known; the method may learn from them."
)
@click.option("--utility", type=click.Path(path_type=Path), help="Records that utility is measured on; never drawn on.")
@click.option("--holdout", type=click.Path(path_type=Path), help="Comparable records that the model never saw.")
@click.option("--params", type=click.Path(path_type=Path), help="A ready params.yaml to start from, see configs/.")
@click.option("--port", type=click.IntRange(1024, 65535), help="Port of the project's Prefect server.")
@click.option("--share-prefect", is_flag=True, help="Use your own Prefect home and server.")
def init(
    folder: Path, model: str | None, retain: Path | None, utility: Path | None, holdout: Path | None,
    params: Path | None, port: int | None, share_prefect: bool,
) -> None:  # fmt: skip
    """Make a project folder: settings, ledger, data versioning, key."""
    from flows.scaffold import Wanted, make_project

    given = {"retain": retain, "utility": utility, "holdout": holdout}
    splits = {name: path for name, path in given.items() if path is not None}
    project = make_project(folder, Wanted(model, splits, params, port, share_prefect))
    if project.settings().benchmark is not None:
        from tasks.prepare import prepare_data
        from tasks.record import commit_to_git

        prepare_data.fn(project, project.settings())
        commit_to_git(project, project.settings())
    say(f"{folder} is ready. Next: cd {folder}; alkn request add FILE; alkn run")


@cli.command()
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: --set targets.p=0.05")
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it would cost; change nothing.")
@JSON
def run(overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Process what is pending, in the ledger's order, in this process."""
    project = here()
    settings = project.settings(overrides)
    if dry_run:
        _dry_run(project, settings, as_json)
        return
    from alkn.estimate import check_disk
    from flows.server import prefect_api

    with project.chain_lock():
        check_disk(project)
    with prefect_api(project.root):
        from alkn.errors import RequestsRejected
        from flows.continual_unlearn import continual_unlearn

        try:
            decided: Any = continual_unlearn(project_folder=str(project.root), overrides=list(overrides))
        except RequestsRejected as rejected:
            decided = rejected.decided
    _show_report(project, as_json)
    if not decided and not as_json:
        say("nothing was pending")
    if any(not row["accepted"] for row in decided):
        sys.exit(1)


@cli.command()
def serve() -> None:
    """Serve the deployments with their schedules, until stopped."""
    from flows.server import serve_deployments

    serve_deployments(here())


@cli.command()
@click.option(
    "--html", "page", is_flag=False, flag_value="reports/report.html", type=click.Path(path_type=Path, dir_okay=False),
    help="Write one page with everything that is known [default FILE: reports/report.html].",
)  # fmt: skip
@JSON
def report(page: Path | None, as_json: bool) -> None:
    """The chain as a table, or as one page of HTML that needs no network."""
    if page is None:
        _show_report(here(), as_json)
        return
    from flows.reporting import write_page

    answer = write_page(here(), page)
    say(json.dumps(answer) if as_json else f"{answer['html']}: {answer['requests']} requests decided")


@cli.command()
@JSON
def champion(as_json: bool) -> None:
    """Path of the newest accepted model, checked against its manifest."""
    from alkn.manifest import check_step
    from alkn.requests.ledger import load_ledger

    project = here()
    step = project.step(load_ledger(project).newest)
    manifest = check_step(step)
    answer = {"request": step.id, "path": str(step.model), "digest": manifest["outputs"]["model"]}
    say(json.dumps(answer) if as_json else str(step.model))


@cli.command()
@click.option("--exact", is_flag=True, help="Measure all records of each request, not a sample of the large ones.")
@JSON
def evaluate(exact: bool, as_json: bool) -> None:
    """Every accepted model on every request so far: has anything come back, and what is still known?

    Writes reports/matrix.json. What was measured once is kept, so that asking again costs nothing.
    """
    from alkn.matrix import regression_matrix
    from flows.checking import matrix_tables
    from tasks.progress import progress_bars

    project = here()
    with progress_bars("evaluate") as progress:
        found = regression_matrix(project, project.settings(), exact=exact, progress=progress)
    if as_json:
        say(json.dumps(found.content))
        return
    for title, columns, rows in matrix_tables(found.content):
        show_table(title, columns, rows)
    for name, reason in found.content["missing"].items():
        say(f"not measured: {name}: {reason}")
    for fault in found.told:
        say(f"warning: .alkn/cache/{fault}; measured again", err=True)
    say(f"{found.scored} records measured, {found.kept} known from before; written to reports/matrix.json")


@cli.command()
@click.option("--exact", is_flag=True, help="Measure all records of earlier requests, also where a step took a sample.")
@JSON
def verify(exact: bool, as_json: bool) -> None:
    """Measure and judge the champion again, and check every digest of the chain under it.

    Writes reports/verify.json. Exit status 1: something came back, or is not what was recorded.
    """
    from alkn.verify import verify_champion
    from flows.checking import verify_tables
    from tasks.progress import progress_bars

    with progress_bars("verify") as progress:
        report = verify_champion(here(), exact=exact, progress=progress)
    if as_json:
        say(json.dumps(report))
    else:
        for title, columns, rows in verify_tables(report):
            show_table(title, columns, rows)
        for name, reason in report["missing"].items():
            say(f"not measured: {name}: {reason}")
        verdict = "holds" if report["holds"] else f"does not hold: {len(report['findings'])} findings"
        say(f"{report['champion']} {verdict}; {report['compared']} numbers compared; written to reports/verify.json")
    if not report["holds"]:
        sys.exit(1)


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Where it all goes; made if missing.")
@click.option("--workers", type=click.IntRange(1), help="Cells at a time [default: what the machine has].")
@click.option("--only", multiple=True, metavar="LABEL", help="Only this method; may be given again.")
@click.option("--report-only", is_flag=True, help="Write the report of what is done; make nothing.")
@click.option("--page", type=click.Path(path_type=Path), help="Write the report as a page with its pictures too.")
@JSON
def compare(
    config: Path, folder: Path, workers: int | None, only: tuple[str, ...], report_only: bool, page: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Compare methods over a benchmark's chain and several seeds.

    CONFIG says which, see docs/COMPARE.md. What was stopped goes on where it was.
    """
    from flows.comparing import run_comparison

    outcome = run_comparison(config, folder, workers=workers, only=only, report_only=report_only, page=page)
    if as_json:
        say(json.dumps({"rows": outcome.rows, "failed": outcome.failed, "missing": outcome.missing}))
    else:
        show_table("The comparison", outcome.columns, outcome.cells)
        say(f"report: {folder / 'report' / 'table.md'}")
    for name, reason in outcome.failed.items():
        say(f"error: {name}: {reason}", err=True)
    if outcome.failed:
        sys.exit(1)


@cli.command()
@click.option("--without", help="The chain's first N requests, or ids with commas between [default: all accepted].")
@click.option("--seed", type=click.IntRange(0), default=0, help="Another seed is another reference [default: 0].")
@click.option("--path", type=click.Path(path_type=Path), help="Take this model folder instead of training one.")
@JSON
def reference(without: str | None, seed: int, path: Path | None, as_json: bool) -> None:
    """Make a model that never saw some requests' records, or find it made.

    It is trained like the base model and lies in reference/. Two seeds show how far apart honest models are.
    """
    from alkn.errors import InputError
    from alkn.reference import adopt_reference, make_reference
    from alkn.requests.ledger import load_ledger
    from alkn.settings import load_settings
    from tasks.progress import progress_bars

    project = here()
    if path is not None:
        made = adopt_reference(project, path)
    else:
        requests = _requests_without(load_ledger(project), without)
        if not project.base.manifest.is_file():
            raise InputError("there is no base model yet; 'alkn run' makes it")
        with progress_bars("reference") as progress:
            made = make_reference(
                project, load_settings(project.base.params), without=requests, seed=seed, progress=progress
            )
    told = ("without", "seed", "records", "left_out", "retain", "forgotten")
    facts = {name: made.manifest[name] for name in told if name in made.manifest}
    answer = {"name": made.folder.name, "path": str(made.model), "digest": made.digest, "cached": made.cached, **facts}
    if as_json:
        say(json.dumps(answer))
        return
    for name, value in answer.items():
        say(f"{name:<10} {value}")


def _requests_without(ledger: Any, without: str | None) -> list[str]:
    """The requests that a reference never sees: all accepted, or the first N of the chain, or those named."""
    from alkn.errors import InputError

    if without is None:
        if not ledger.accepted:
            raise InputError("no request is accepted yet; name some: alkn reference --without ID,ID")
        return list(ledger.accepted)
    if not without.isdigit():
        return [name.strip() for name in without.split(",")]
    chain = [*ledger.accepted, *ledger.pending]
    if not 1 <= int(without) <= len(chain):
        raise InputError(
            f"--without {without}: expected 1 to {len(chain)}, the number of accepted and pending requests"
        )
    return chain[: int(without)]


for group in (request, certificate, stage):
    cli.add_command(group)


def main() -> None:
    """Run the command line; what the user can mend is one message and exit status 2 (or 1)."""
    import flows  # noqa: F401 - its import switches telemetry off
    from alkn.errors import AlknError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not {"stage", "step"} <= set(sys.argv):
        _fail("in several processes only 'stage step' can be started", 2)
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except AlknError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        _fail(f"the disk is full: {getattr(error, 'filename', None) or os.getcwd()}", 2)


def _is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room, as libraries that are no Python say it too."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "database or disk is full"))


def _fail(message: str, status: int) -> None:
    for line in message.split("\n"):
        say(f"error: {line}", err=True)
    sys.exit(status)


def _shown(value: float | None, digits: int) -> str:
    """A number, or that there is none: a broken model's could not be computed."""
    return "-" if value is None else f"{value:.{digits}f}"


def _show_report(project: Project, as_json: bool) -> None:
    from alkn.files import write_json
    from alkn.requests.ledger import load_ledger
    from alkn.summary import chain_rows

    rows = chain_rows(project, load_ledger(project))
    write_json(project.root / "reports" / "chain.json", rows)
    if as_json:
        say(json.dumps(rows))
        return
    shown: list[list[Any]] = []
    for row in rows:
        if "p_after" not in row:
            shown.append([row["request"], row["verdict"], row["records"], *["-"] * 6])
            continue
        domains = "  ".join(
            f"{name} {_shown(value, 3)} (base {_shown(row['utility_base'].get(name), 3)})"
            for name, value in row["utility"].items()
        )
        shown.append(
            [
                row["request"], row["verdict"], row["records"], _shown(row["p_before"], 3), _shown(row["p_after"], 4),
                "-" if row["worst_record"] is None else f"no. {row['worst_record']}: {row['worst_p']:.4f}",
                f"{_shown(row['em_before'], 3)} → {_shown(row['em_after'], 3)}", domains or "not measured",
                f"{row['seconds']:.0f} s",
            ]
        )  # fmt: skip
    columns = (
        "request", "verdict", "records", "P before", "P after", "worst record, P", "exact memorization",
        "utility (P, never drawn on)", "time",
    )  # fmt: skip
    show_table("The chain", columns, shown)
    for row in rows:
        if row["verdict"] == "rejected":
            say(f"{row['request']} was rejected: {row['reason']}")


def _dry_run(project: Project, settings: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from alkn.estimate import estimate
    from alkn.requests.ledger import load_ledger

    ledger = load_ledger(project)
    cost = estimate(project, settings, ledger)
    if as_json:
        say(json.dumps({"pending": list(ledger.pending), **asdict(cost)}))
        return
    if not ledger.pending:
        say("nothing is pending")
        return
    rows = [[name, entry.records, entry.due, previous] for (name, entry), previous in _planned(ledger)]
    show_table("Would be unlearned, in this order", ("request", "records", "due", "starting from"), rows)
    seconds = "unknown" if cost.seconds is None else f"about {max(1, round(cost.seconds / 60))} min"
    say(f"time    {seconds} ({cost.source})")
    say(f"memory  about {cost.memory / 2**20:,.0f} MiB at the peak")
    say(f"disk    about {cost.disk / 2**20:,.0f} MiB of {cost.free / 2**20:,.0f} MiB free")


def _planned(ledger: Any) -> list[tuple[tuple[str, Any], str]]:
    names = list(ledger.pending)
    starts = [ledger.newest, *names[:-1]]
    return list(zip(ledger.pending.items(), starts, strict=True))


if __name__ == "__main__":
    main()
