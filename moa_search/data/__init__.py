"""Texts, records and samples: what tasks are made of, whoever uses them."""

from moa_search.data.samples import Sample, hash_samples
from moa_search.data.sources import SourceSpec
from moa_search.data.store import StoredSamples, load_samples, require_samples_folder, save_samples
from moa_search.data.texts import SPLITS, Split

__all__ = [
    "SPLITS",
    "Sample",
    "SourceSpec",
    "Split",
    "StoredSamples",
    "hash_samples",
    "load_samples",
    "require_samples_folder",
    "save_samples",
]
