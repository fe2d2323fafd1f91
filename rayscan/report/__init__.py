"""The report's core: summaries and details of clusters as Arrow tables, and the page made of them."""

from rayscan.report.data import ReportData
from rayscan.report.details import details
from rayscan.report.page import render
from rayscan.report.summary import activity, summarise

__all__ = ["ReportData", "activity", "details", "render", "summarise"]
