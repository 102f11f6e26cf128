"""Tables of profiles: how well each length was measured, and which heads lose what."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from moa_search.formats import Profile
from moa_search.formats.tiers import PLAIN_BITS
from moa_search.inspection.printing import Column, Table, column, digits, percent, with_error
from moa_search.inspection.quality import heaviest_heads, profile_quality


def profile_tables(profile: Profile) -> list[Table]:
    """What was measured at each length and, if it was, what fewer bits add."""
    return [profile_frame(profile), *([] if profile.tiers is None else [tier_frame(profile)])]


def profile_frame(profile: Profile) -> Table:
    """Samples, loss, local heads and reliability by length; times where the run is known."""
    frame = pd.DataFrame([dataclasses.asdict(quality) for quality in profile_quality(profile)])
    columns = [
        column("length", "tokens"),
        column("samples"),
        Column("dense loss", lambda row: with_error(row["loss"], row["loss_error"], ".3f", ".3f")),
        column("local_heads", None, percent),
        column("reliability", None, lambda value: f"{max(0.0, value):.2f}"),
    ]
    if profile.run and profile.run.seconds_per_sample:
        frame["seconds_per_sample"] = frame["length"].map(profile.run.seconds_per_sample)
        columns.append(column("seconds_per_sample", "s/sample", digits(1)))
    return Table(frame, columns, "Samples, loss, heads that look nearby only, and reliability of the rest")


def tier_frame(profile: Profile) -> Table:
    """What fewer bits add to the loss, in nats, in heads that see the whole context, all heads together.

    Args:
        profile: With tiers.
    """
    assert profile.tiers is not None
    rows = []
    for length, entry in profile.tiers.by_length.items():
        for bits in entry.keys:
            by_sample = (entry.rounding(*tier).sum((1, 2)) for tier in ((bits, PLAIN_BITS), (PLAIN_BITS, bits)))
            keys, values = (float((entry.answer_tokens * squared).mean()) for squared in by_sample)
            rows.append({"length": length, "bits": bits, "keys": keys, "values": values})
    columns = [
        column("length", "tokens"),
        column("bits"),
        column("keys", None, "{:.3g}".format),
        column("values", None, "{:.3g}".format),
    ]
    return Table(pd.DataFrame(rows), columns, "Loss that keys and values in fewer bits add, whole contexts, all heads")


def head_frame(profile: Profile, length: int, criterion: str, most: int = 8) -> Table:
    """The heads that lose most under a short window, and the share of all heads' losses that they have."""
    losses, _, window = profile.influence(length, criterion=criterion)
    total = float(np.nansum(losses)) or 1.0
    rows = [
        {"layer": layer, "kv_head": head, "loss": float(losses[layer, head]), "share": losses[layer, head] / total}
        for layer, head in heaviest_heads(profile, length, criterion, most)
    ]
    columns = [
        column("layer"),
        column("kv_head", "KV head"),
        column("loss", None, "{:.3g}".format),
        column("share", "of all", percent),
    ]
    return Table(pd.DataFrame(rows), columns, f"{criterion} loss, window {window} of {length}")


def curve_frame(profile: Profile, length: int, heads: Sequence[tuple[int, int]], criterion: str) -> Table:
    """The losses of some heads over the window, one row per window and one column per head."""
    losses = profile.to_frame([criterion])
    losses = losses[losses["length"] == length].set_index(["layer", "kv_head"])
    frame = pd.DataFrame({"window": profile.by_length[length].header.windows})
    columns = [column("window")]
    for layer, head in heads:
        name = f"layer {layer}, KV head {head}"
        frame[name] = losses.loc[(layer, head), criterion].to_numpy()
        columns.append(column(name, name, "{:.4g}".format))
    return Table(frame, columns, f"{criterion.capitalize()} loss at {length} tokens")


def profile_facts(profile: Profile) -> dict[str, str]:
    """What the samples are, how many were dropped, and what the run took."""
    source, facts = profile.header.calibration, {}
    sources, answered = source.get("sources"), source.get("answered")
    if isinstance(sources, list):
        own = "the model's own answers" if source.get("answers") == "model" else "the data's answers"
        chat = ", in its chat template" if source.get("chat") else ""
        made = all(str(name).startswith("samples:") for name in sources)
        facts["samples"] = ", ".join(map(str, sources)) + ("" if made else f"; {own}{chat}")
    dropped = []
    for name, counts in (answered if isinstance(answered, dict) else {}).items():
        assert isinstance(counts, dict)
        tried, kept = counts.get("tried"), counts.get("kept")
        if isinstance(tried, int) and isinstance(kept, int) and tried > kept:
            dropped.append(f"{name}: {tried - kept} of {tried}, answered wrongly by the dense model")
    if dropped:
        facts["dropped"] = "; ".join(dropped)
    if profile.header.native_layers:
        layers = ", ".join(map(str, profile.header.native_layers))
        facts["native"] = f"layers {layers} have a sliding window of their own and aren't searched"
    if profile.header.tiers is not None:
        bits = ", ".join(map(str, (16, *profile.header.tiers.bits)))
        facts["tiers"] = f"{bits} bits"
    run = profile.run
    if run is not None:
        tokens = sum(entry.header.samples * length for length, entry in profile.by_length.items())
        resumed = f", {run.resumed} taken over from a stopped run" if run.resumed else ""
        kind = "GPU memory" if run.on_gpu else "memory"
        peak = "" if run.peak_memory_bytes is None else f"; peak {kind} {run.peak_memory_bytes / 2**30:.1f} GiB"
        facts["run"] = f"{run.measured} samples measured{resumed}; {tokens:,} tokens in all{peak}"
    return facts


def profile_provenance(profile: Profile) -> dict[str, str]:
    """All that a profile says about where it is from."""
    header = profile.header
    facts: dict[str, object] = {
        **profile_facts(profile),
        "type of the weights": header.dtype,
        "sink, block": f"{header.sink}, {header.block} tokens",
        "seed": header.seed,
        "hash of the samples": header.calibration.get("hash"),
        "hash of the weights": header.weights_hash,
        "versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
        "written by": f"moa-search {header.library_version}",
        "checksum": profile.checksum,
        "configuration": json.dumps({**header.model.rope, **header.model.config}, sort_keys=True),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}
