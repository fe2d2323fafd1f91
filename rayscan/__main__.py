"""`python -m rayscan` is `rayscan`."""

from rayscan.cli import main

main()
