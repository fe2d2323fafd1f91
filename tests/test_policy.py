"""Rules of the house, kept by tests: what may import what, and that nothing goes undocumented."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from rayscan import config
from rayscan.cli import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rayscan"
MODULES = sorted(PACKAGE.rglob("*.py"))

TOP = {
    "__main__",
    "cli",
    "inspect",
    "lease",
    "models",
    "pipeline",
    "planning",
    "progress",
    "stages",
    "status",
    "terminal",
    "tracking",
    "upgrade",
    "vectors",
}
CORE = {"captures", "simulate", "sequences", "model", "clustering", "evaluation", "methods", "report"}
GROUND = {"tables", "storage", "config", "errors", "schema", "keys"}
SCRIPTS = [*(ROOT / "jobs").glob("*.py")]


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    """The top-level part of the package a module belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_every_part_has_its_floor() -> None:
    assert {part(path) for path in MODULES} == TOP | CORE | GROUND | {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upward(path: Path) -> None:
    used = {name.split(".")[1] for name in imports(path) if name.startswith("rayscan.") and "." in name}
    used &= TOP | CORE | GROUND
    mine = part(path)
    if mine in CORE:
        assert not used & TOP, f"core imports {used & TOP}"
        assert not used & {"tables", "storage"}, "the core knows no tables"
    if mine in GROUND:
        assert not used & (TOP | CORE)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ray_stands_under_stages_alone(path: Path) -> None:
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(path))
    assert not uses_ray or part(path) == "stages"


FORBIDDEN_MODULES = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal", "pty", "telnetlib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "tempfile.mktemp",
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickle_and_no_delta_outside_tables(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)}
    assert not used & FORBIDDEN_MODULES
    assert "deltalake" not in used or part(path) in ("tables", "storage")
    assert "subprocess" not in used or path.name == "nfdump.py", "docs/security.md names the one program"


def test_nothing_that_is_read_can_run_code() -> None:
    for path in MODULES:
        for call in (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)):
            name, where = ast.unparse(call.func), f"{path}:{call.lineno}"
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in FORBIDDEN_CALLS, where
            assert given.get("shell", "False") == "False", where
            assert name not in ("np.load", "numpy.load") or given["allow_pickle"] == "False", where


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_are(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "no module docstring"


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = command
    return found


@pytest.mark.parametrize("name", commands(main))
def test_every_command_has_help_and_is_documented(name: str) -> None:
    command = commands(main)[name]
    assert command.help
    assert all(p.help for p in command.params if isinstance(p, click.Option))
    assert CliRunner().invoke(main, [*name.split(), "--help"]).exit_code == 0
    documents = "".join(p.read_text("utf-8") for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert f"rayscan {name}" in documents, f"`rayscan {name}` is in neither README nor docs"


def test_every_setting_has_a_description() -> None:
    schema = config.RunConfig.model_json_schema()
    for section in schema["$defs"].values():
        for name, field in section.get("properties", {}).items():
            assert field.get("description"), f"{section['title']}.{name} has no description"


EXAMPLES = [p for p in sorted((ROOT / "docs").rglob("*.yaml")) if "apiVersion:" not in p.read_text("utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_configurations_load(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    config.load(file=path, env={})


@pytest.mark.parametrize("module", ["rayscan", "rayscan.cli"])
def test_light_imports(module: str) -> None:
    """`--help` must not wait for Ray, torch or Arrow."""
    code = f"import sys, {module}; print(sorted({{'ray', 'torch', 'pyarrow', 'numba'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


BENCHMARKS = [
    p.stem for p in sorted((ROOT / "benchmarks").glob("*.py")) if "def main(" in p.read_text("utf-8")
]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    for variable in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS"):  # some set these for themselves
        monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"benchmarks.{name}").main()


def test_jobs_are_short() -> None:
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < 80
