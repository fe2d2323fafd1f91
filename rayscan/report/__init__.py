"""One self-contained HTML page: what was read, which clusters there are, and how far to trust them."""

from rayscan.report.page import ReportData, render
from rayscan.report.summary import activity, summarise

__all__ = ["ReportData", "activity", "render", "summarise"]
