"""The import rules of DESIGN.md and a few others, read from the source by its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("alkn", "tasks", "flows")
SIBLINGS = ("methods", "metrics", "attacks", "gates", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it, as a full name; of ``from a import b`` both a and a.b."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offenders(where: str, *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    """``file: module`` for each forbidden import of the files under ``where``."""
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if inside(module_of(path), where) and path.relative_to(ROOT).as_posix() not in but
        for name in imports(path)
        if inside(name, *forbidden)
    ]


def test_the_rules_see_the_code() -> None:
    """What is known to be imported is found, so that an empty list means something."""
    assert len(FILES) > 30
    assert offenders("alkn.core.training", "torch.optim", "alkn.core.scoring")
    assert offenders("tasks.tracking", "mlflow") and offenders("tasks.versioning", "dvc")
    assert offenders("alkn.registry", "pydantic") and offenders("flows", "tasks") and offenders("tasks", "alkn")


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    (tmp_path / "alkn" / "core").mkdir(parents=True)
    path = tmp_path / "alkn" / "core" / "x.py"
    path.write_text("from .. import registry\nfrom .y import z\nfrom . import w\nimport a.b as c\n")
    assert set(imports(path)) == {
        "alkn",
        "alkn.registry",
        "alkn.core",
        "alkn.core.y",
        "alkn.core.y.z",
        "alkn.core.w",
        "a.b",
    }


def test_the_library_needs_no_server() -> None:
    """alkn never imports prefect, mlflow or dvc, nor what is built on it."""
    assert offenders("alkn", "prefect", "mlflow", "dvc", "tasks", "flows") == []


def test_imports_go_one_way() -> None:
    assert offenders("tasks", "flows") == []


def test_one_file_tracks_and_one_versions() -> None:
    """mlflow in tasks/tracking.py only, dvc in tasks/versioning.py only."""
    for package, file in (("mlflow", "tasks/tracking.py"), ("dvc", "tasks/versioning.py")):
        for where in PACKAGES:
            assert offenders(where, package, but=(file,)) == []


def test_core_stands_alone() -> None:
    """Nothing of alkn but core itself and the errors."""
    found = [
        line
        for line in offenders("alkn.core", "alkn")
        if not inside(line.split(": ")[1], "alkn.core", "alkn.errors") and line.split(": ")[1] != "alkn"
    ]
    assert found == []
    assert not offenders("alkn.core", "transformers", "accelerate", "pydantic", "yaml", "pandas")


@pytest.mark.parametrize("package", SIBLINGS)
def test_plugins_do_not_import_one_another(package: str) -> None:
    others = [f"alkn.{name}" for name in SIBLINGS if name != package]
    assert offenders(f"alkn.{package}", *others) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_pickle_and_no_print(path: Path) -> None:
    """torch.load and pickle nowhere; print only where flows/ talks to a person."""
    assert not [name for name in imports(path) if inside(name, "pickle", "dill", "cloudpickle", "joblib", "shelve")]
    calls = [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert "torch.load" not in calls and "torch.save" not in calls
    assert not [name for name in imports(path) if name in ("torch.load", "torch.save")]
    if not inside(module_of(path), "flows"):
        assert "print" not in calls
