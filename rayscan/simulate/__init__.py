"""A network telescope with known campaigns: the ground truth for demos, tests and scale.

    campaigns.py   what a campaign is, and the default set of them
    plan.py        which sources exist, when, and how many flows each sends
    traffic.py     the flows of one campaign in one month
    telescope.py   all campaigns together, month by month, and the truth about them
    files.py       Parquet and pcap captures

The traffic is meant to be hard in one way and easy in all others: campaigns share ports, and differ in the
order of targets, in timing and in how often they return. Real background noise is messier than this; figures
reached here say that a method works, not how well it does on a real telescope.
"""

from rayscan.simulate.campaigns import Campaign, default_campaigns
from rayscan.simulate.files import Summary, simulate_to, write_parquet, write_pcap
from rayscan.simulate.telescope import FLOW_COLUMNS, TRUTH, Simulation, simulate

__all__ = [
    "FLOW_COLUMNS",
    "TRUTH",
    "Campaign",
    "Simulation",
    "Summary",
    "default_campaigns",
    "simulate",
    "simulate_to",
    "write_parquet",
    "write_pcap",
]
