"""Self-contained pages from the templates: style and scripts inside, nothing else may run or be loaded."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from rayscan.report import words


def page(template: str, scripts: Iterable[str], **values: Any) -> str:
    """`rendered` with plotly and these scripts, and a policy that lets no others run."""
    texts = [_plotly(), *(_read(name) for name in scripts)]
    return rendered(template, scripts=[Markup(text) for text in texts], policy=_policy(texts), **values)


def rendered(template: str, **values: Any) -> str:
    """The template with `values`, which it escapes, and the report's style."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rayscan.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["words"] = words
    return environment.get_template(template).render(style=Markup(_read("report.css")), **values)


def _read(name: str) -> str:
    return (resources.files("rayscan.report") / "templates" / name).read_text("utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # slow to import, and only needed here

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _policy(scripts: Iterable[str]) -> str:
    """Content security policy: no network, no script but these. Stricter than allowing inline scripts."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
