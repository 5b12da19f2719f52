"""What goes into git and DVC: projects below a repository's top, in the folder one stands in, behind their record."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alkn.project import Project


def git_in(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_project_below_a_repositorys_top_is_committed(tmp_path: Path) -> None:
    """Its own files, and nothing else that is staged."""
    from tasks import git

    git_in(tmp_path, "init", "--quiet")
    project = tmp_path / "models" / "shop"
    (project / "data").mkdir(parents=True)
    for name in ("params.yaml", "data/ledger.yaml", "other.txt"):
        (project / name).write_text("a: 1\n")
    (tmp_path / "params.yaml").write_text("somebody else's\n")
    git_in(tmp_path, "add", "params.yaml")
    git.commit_records(project)
    committed = git_in(tmp_path, "show", "--name-only", "--format=%s").split("\n")
    assert committed[0] == "Record the chain"
    assert sorted(filter(None, committed[1:])) == ["models/shop/data/ledger.yaml", "models/shop/params.yaml"]
    git.commit_records(project)
    assert len(git_in(tmp_path, "log", "--format=%h").split()) == 1, "nothing changed, nothing is committed"


def project_in(folder: Path) -> Project:
    """As ``alkn init`` makes one; imported here, because Prefect and DVC set up loggers on whatever is captured."""
    from flows.scaffold import Wanted, make_project

    return make_project(folder, Wanted(model=None, splits={}, params=None, port=None, share_prefect=True))


@pytest.mark.parametrize("name", [".", "new"])
def test_a_project_is_made_in_the_folder_that_one_stands_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder stays the same one: a shell may stand in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = (tmp_path / "here").stat().st_ino
    project = project_in(Path(name))
    assert (tmp_path / "here").stat().st_ino == before
    place = tmp_path / "here" if name == "." else tmp_path / "here" / "new"
    assert yaml.safe_load((place / "params.yaml").read_text())["project"]["name"] == place.name
    assert project.root.resolve() == place and (place / ".dvc").is_dir() and (place / "dvc.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"], "nothing is left beside it"


def test_splits_whose_record_was_cut_off_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew for other settings, and the run ended before DVC had them: dvc.lock is of the old ones."""
    from tasks import versioning
    from tasks.prepare import prepare_data

    project = project_in(tmp_path / "p")
    values = yaml.safe_load(project.params.read_text())

    def prepared(requests: int, record: Callable[[Project, str], None] | None = None) -> None:
        values["benchmark"] = {"name": "people", "requests": requests}
        project.params.write_text(yaml.safe_dump(values))
        with monkeypatch.context() as patch:
            if record is not None:
                patch.setattr(versioning, "record_stage", record)
            prepare_data.fn(project, Project.at(project.root).settings())

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    prepared(2)
    assert not versioning.is_of_other_inputs(project, "data")
    with pytest.raises(KeyboardInterrupt):
        prepared(1, cut_off)
    assert "data" in versioning.recorded_stages(project) and versioning.is_of_other_inputs(project, "data")
    prepared(1)
    assert not versioning.is_of_other_inputs(project, "data")
    # Damage is none of that: dvc.lock keeps what 'dvc checkout' brings back.
    lock, path = (project.root / "dvc.lock").read_bytes(), project.splits / "utility.jsonl"
    path.write_text("")
    prepared(1)
    assert (project.root / "dvc.lock").read_bytes() == lock
