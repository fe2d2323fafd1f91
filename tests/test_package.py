"""What an installed rayscan must do without any extra."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

import rayscan

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): number for name, number in pairs}


def test_every_dependency_is_pinned_and_the_pin_is_allowed() -> None:
    found = pins()
    extras = [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
    for item in [*PROJECT["dependencies"], *extras]:
        requirement = Requirement(item)
        pinned = found.get(requirement.name.lower().replace("_", "-"))
        assert pinned, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned), item


def test_the_version_is_one() -> None:
    assert version("rayscan") == rayscan.__version__


def test_presets_and_templates_are_in_the_package() -> None:
    package = Path(rayscan.__file__).parent
    assert sorted(p.name for p in (package / "presets").iterdir()) == [
        "default.yaml",
        "paper.yaml",
        "quick.yaml",
    ]
    assert (package / "report" / "templates" / "report.html").exists()
    assert (package / "py.typed").exists()
