"""Correlation clustering of unit vectors, without the graph: `solve`, `objective`, and both at scale.

    labels = solve(embeddings, threshold=0.4)
    objective(embeddings, labels, threshold=0.4)

`solve_blocked` does the same for vectors that no process can hold, `sweep` for many thresholds, `calibrate`
finds a threshold without labels, `follow` turns the clusters of successive periods into campaigns.
"""

from rayscan.clustering.blocks import Solution, serial_map, solve_block, solve_blocked, weights
from rayscan.clustering.calibration import Calibration, calibrate
from rayscan.clustering.campaigns import Campaigns, follow
from rayscan.clustering.moves import Clusters
from rayscan.clustering.objective import canonical, objective
from rayscan.clustering.products import products_on
from rayscan.clustering.solver import solve, sweep

__all__ = [
    "Calibration",
    "Campaigns",
    "Clusters",
    "Solution",
    "calibrate",
    "canonical",
    "follow",
    "objective",
    "products_on",
    "serial_map",
    "solve",
    "solve_block",
    "solve_blocked",
    "sweep",
    "weights",
]
