"""Writes docs/cli.md and docs/settings.md from the program itself: `make docs`. A test compares them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rayscan.cli import main
from rayscan.config import RunConfig, Section, preset_names

HERE = Path(__file__).parent
NOTE = "<!-- Written by `make docs`; edit the program, not this file. -->\n\n"


def cli() -> str:
    """Reference of all commands: what `--help` prints."""
    text = NOTE + "# Commands\n\n"
    text += "The same text as `rayscan COMMAND --help`. Text for people goes to stderr, data to stdout.\n"
    for context in _contexts(main, "rayscan", None):
        text += f"\n## {context.command_path}\n\n```text\n{context.command.get_help(context)}\n```\n"
    return text


def _contexts(command: click.Command, name: str, parent: click.Context | None) -> list[click.Context]:
    """A context for each command, as the command line itself makes them."""
    width = {"terminal_width": 100, "max_content_width": 100}
    context = click.Context(command, parent=parent, info_name=name, **width, **command.context_settings)
    found = [context]
    if isinstance(command, click.Group):
        for key, child in command.commands.items():
            found += _contexts(child, key, context)
    return found


def settings() -> str:
    """Reference of all settings: name, default, meaning."""
    text = NOTE + "# Settings\n\n"
    text += (
        "Given in a YAML file (`--config`), as `--set section.key=value`, or as environment variables\n"
        "`RAYSCAN_<SECTION>__<KEY>`; presets: " + ", ".join(f"`{n}`" for n in preset_names()) + ".\n"
        "Settings marked ° say how work is done, not what comes out: changing them redoes nothing.\n"
    )
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            text += f"\n## {name}\n\n{section.__doc__}\n\n| setting | default | meaning |\n|---|---|---|\n"
            text += "".join(_row(name, key, inner) for key, inner in section.model_fields.items())
        else:
            text += f"\n`{name}` (default `{field.default}`): {field.description}\n"
    return text


def _row(section: str, key: str, field: Any) -> str:
    extra = field.json_schema_extra
    mark = "°" if isinstance(extra, dict) and extra.get("how") else ""
    default = json.dumps(field.default, default=str, ensure_ascii=False)
    meaning = field.description.replace("|", "\\|")
    return f"| `{section}.{key}`{mark} | `{default}` | {meaning} |\n"


DOCUMENTS = {"cli.md": cli, "settings.md": settings}

if __name__ == "__main__":
    for filename, make in DOCUMENTS.items():
        (HERE / filename).write_text(make(), encoding="utf-8")
        print(HERE / filename, file=sys.stderr)
