"""Samples that profiling and evaluation run on: prompts whose answer needs text from far away."""

from moa_search.calibration.building import Answers, Calibration, Chat, calibrate
from moa_search.calibration.generators import GENERATORS, build_samples
from moa_search.calibration.samples import Sample, hash_samples
from moa_search.calibration.sources import SourceSpec, parse_source
from moa_search.calibration.store import StoredSamples, load_samples, require_samples_folder, save_samples
from moa_search.calibration.texts import SPLITS, Split

__all__ = [
    "GENERATORS",
    "SPLITS",
    "Answers",
    "Calibration",
    "Chat",
    "Sample",
    "SourceSpec",
    "Split",
    "StoredSamples",
    "build_samples",
    "calibrate",
    "hash_samples",
    "load_samples",
    "parse_source",
    "require_samples_folder",
    "save_samples",
]
