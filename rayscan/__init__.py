"""rayscan: which sources of a network telescope behave alike, and who belongs to one campaign."""

__version__ = "0.1.0"
