"""Samples that profiling and evaluation run on: prompts whose answer needs text from far away."""

from moa_search.calibration.generators import GENERATORS, build_samples
from moa_search.calibration.samples import Sample, hash_samples
from moa_search.calibration.texts import SPLITS, Split

__all__ = ["GENERATORS", "SPLITS", "Sample", "Split", "build_samples", "hash_samples"]
