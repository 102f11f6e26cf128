"""Time from the profile of a large model to its front of plans: a made-up profile of Llama-3-70B's shape.

Usage: OMP_NUM_THREADS=1 python benchmarks/measure_front.py [--layers 80] [--heads 8] [--lengths 2048 4096 8192]
           [--samples 16] [--density 0.25] [--steps 6] [--tiers 16 8 4 2] [--json]

The heads behave like real ones (`search_instances`): most look near, a few retrieve, and they differ by orders of
magnitude; what one sample says of them is off by a factor of its own. The profile is written to a file first, and
what is measured is what `moa-search` does with that file, reading it and writing every plan included. Every plan is
checked again in exact integers. CPU seconds are the process's own. With --tiers bits are chosen, too, and --density is
a share of a 16-bit cache's bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from search_instances import BITS_ERROR, Curves

from moa_search.api import search_front
from moa_search.formats import ModelSignature, Plan, Profile
from moa_search.formats.profile_content import (
    MEAN_STATISTICS,
    SAMPLE_STATISTICS,
    LengthHeader,
    LengthProfile,
    ProfileHeader,
)
from moa_search.formats.tiers import PLAIN_BITS, TierLength, TiersHeader, TierStatistics, tier_grid
from moa_search.formats.transforms import KeyTransforms
from moa_search.profiling.grid import ROW_BUCKETS, window_grid

GROUP, HEAD_DIM = 8, 128
SINK = BLOCK = 64
NOISE = 0.5
"""Standard deviation of the logarithm of what one sample says of a head."""


def make_profile(layers: int, heads: int, lengths: Sequence[int], samples: int, seed: int = 0) -> Profile:
    """Statistics of ``layers`` x ``heads`` KV heads at ``lengths``; for `signed` and `squared` per sample."""
    rng = np.random.default_rng(seed)
    curves = Curves(layers * heads, rng)
    scale = rng.lognormal(0, 1.6, layers * heads) * np.repeat(rng.lognormal(0, 0.7, layers), heads)
    entries = {}
    for length in sorted(lengths):
        entry = LengthHeader(
            length=length, windows=window_grid(length, BLOCK), row_buckets=ROW_BUCKETS, samples=samples
        )
        effect = scale * rng.lognormal(0, 0.2, len(scale)) * (length / min(lengths)) ** 0.3
        entries[length] = _statistics(entry, effect[:, None, None] * _missed(entry, curves), layers, rng)
    model = ModelSignature(
        architecture="llama",
        num_hidden_layers=layers,
        num_attention_heads=heads * GROUP,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        config={"max_position_embeddings": 8192},
    )
    header = ProfileHeader(
        model=model,
        model_name="made up",
        dtype="bfloat16",
        sink=SINK,
        block=BLOCK,
        seed=seed,
        lengths=tuple(entry.header for entry in entries.values()),
    )
    return Profile(header, entries)


def with_tiers(profile: Profile, bits: Sequence[int], seed: int = 1) -> Profile:
    """``profile`` with what fewer bits of keys and of values add: by head, of either sign."""
    rng, model = np.random.default_rng(seed), profile.header.model
    coded = tuple(sorted(set(bits) - {PLAIN_BITS}, reverse=True))
    heads = (model.num_hidden_layers, model.num_key_value_heads)
    sensitive = rng.lognormal(0, 1.0, heads)
    by_length = {}
    for entry in profile.header.lengths:
        grid = tier_grid(entry.length)

        def changes(part: float, entry: LengthHeader = entry):
            shape = (entry.samples, *heads, 1, 1)
            return {
                n: {
                    name: (part * BITS_ERROR[n] * sensitive[..., None, None] * rng.normal(size=shape)).astype("f4")
                    for name in SAMPLE_STATISTICS
                }
                for n in coded
            }

        answer_tokens = np.full(entry.samples, 8, dtype=np.float32)
        by_length[entry.length] = TierLength(grid, answer_tokens, changes(1.0), changes(0.5))
    width = model.head_dim
    transforms = KeyTransforms(
        np.zeros((*heads, width), np.float32),
        np.tile(np.eye(width, dtype=np.float32), (*heads, 1, 1)),
        np.ones((heads[0], width // 2), np.float32),
        np.arange(width, dtype=np.int32),
    )
    tiers = TiersHeader(bits=coded, lengths=tuple(x.header for x in by_length.values()))
    header = profile.header.model_dump(by_alias=True) | {"tiers": tiers}
    return Profile(ProfileHeader.model_validate(header), profile.by_length, tiers=TierStatistics(transforms, by_length))


def _missed(entry: LengthHeader, curves: Curves) -> npt.NDArray[np.float64]:
    """Share of its effect that each head misses, ``[head, bucket, window]``; nothing where a window spans its rows."""
    rows = entry.length // entry.row_buckets
    ends = rows * np.arange(1, entry.row_buckets + 1)
    windows = np.array(entry.windows)
    missed = [curves.at(int(end), np.minimum(windows, end)) / entry.row_buckets for end in ends]
    return np.stack(missed, axis=1)


def _statistics(
    entry: LengthHeader, missed: npt.NDArray[np.float64], layers: int, rng: np.random.Generator
) -> LengthProfile:
    grid = (layers, -1, *missed.shape[1:])
    mean = missed.reshape(grid).astype(np.float32)

    def sample(sign: bool) -> npt.NDArray[np.float32]:
        factors = rng.lognormal(0, NOISE, (entry.samples, *mean.shape[:2], 1, 1))
        if sign:
            factors = factors * rng.choice([-1, 1], factors.shape)
        return np.asarray(factors * mean, dtype=np.float32)

    return LengthProfile(
        header=entry,
        loss=np.ones(entry.samples, dtype=np.float32),
        per_sample={name: sample(name == "signed") for name in SAMPLE_STATISTICS},
        mean=dict.fromkeys(MEAN_STATISTICS, mean),
        error=dict.fromkeys(MEAN_STATISTICS, mean * 0.1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--heads", type=int, default=8, help="KV heads of a layer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="profiled, in tokens")
    parser.add_argument("--samples", type=int, default=16, help="at each length")
    parser.add_argument("--density", type=float, default=0.25, help="budget at every length")
    parser.add_argument("--steps", type=int, default=6, help="of the lattice of weights, as moa-search --front-steps")
    parser.add_argument("--tiers", type=int, nargs="+", default=[], metavar="BITS", help="of keys and of values")
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.safetensors"
        profile = make_profile(arguments.layers, arguments.heads, arguments.lengths, arguments.samples)
        profile = with_tiers(profile, arguments.tiers) if arguments.tiers else profile
        profile.save(file)
        megabytes = file.stat().st_size / 1e6
        cpu, wall = time.process_time(), time.monotonic()
        budget = "kv_share" if arguments.tiers else "density"
        front = search_front(
            str(file), front_steps=arguments.steps, output=str(Path(folder) / "out"), **{budget: [arguments.density]}
        )
        row = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - wall, 1)}
        check(front.plans, arguments.lengths, arguments.density)
    gaps = [plan.provenance.gap or 0.0 for plan in front.plans if plan.provenance is not None]
    row |= {"layers": arguments.layers, "heads": arguments.heads, "lengths": arguments.lengths}
    row |= {"peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1), "tiers": arguments.tiers}
    row |= {"profile_mb": round(megabytes), "plans": len(front.plans), "largest_gap": max(gaps)}
    if arguments.json:
        print(json.dumps(row))
        return
    print("\n".join(f"{name:>12}  {value}" for name, value in row.items()))
    for plan in front.plans:
        print("  ".join(f"{metrics.length}: {metrics.loss:.4g}" for metrics in plan.predicted))


def check(plans: Sequence[Plan], lengths: Sequence[int], density: float) -> None:
    """No plan keeps more than asked, none is there twice, and none is beaten by another at every length."""
    losses = [tuple(metrics.loss or 0.0 for metrics in plan.predicted) for plan in plans]
    for plan, mine in zip(plans, losses, strict=True):
        for length in lengths:
            spans = plan.spans(length)
            if not plan.is_plain:
                assert plan.share(length) <= density, "over the budget"
                continue
            assert sum(map(sum, spans)) <= int(density * length * sum(map(len, spans))), "over the budget"
        assert not any(all(x <= y for x, y in zip(other, mine, strict=True)) and other != mine for other in losses)
    assert len({plan.fingerprint for plan in plans}) == len(plans)


if __name__ == "__main__":
    main()
