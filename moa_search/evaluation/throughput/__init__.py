"""Speed and memory of a model dense and under plans, measured side by side in one run."""

from moa_search.evaluation.throughput.gains import split_gains, summarise_throughput
from moa_search.evaluation.throughput.made_up import made_up_plan
from moa_search.evaluation.throughput.measuring import Throughput, measure
from moa_search.evaluation.throughput.ways import KINDS, Way, make_ways

__all__ = [
    "KINDS",
    "Throughput",
    "Way",
    "made_up_plan",
    "make_ways",
    "measure",
    "split_gains",
    "summarise_throughput",
]
