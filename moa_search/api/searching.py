"""From a profile to plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import (
    Criterion,
    Searcher,
    model_and_tokenizer,
    require_positive,
    require_profile_fits,
    require_writable_folder,
)
from moa_search.api.options import DEFAULT_DENSITY, load_profile, search_options
from moa_search.api.validating import try_front

if TYPE_CHECKING:
    from moa_search.formats import Plan, Profile
    from moa_search.search import Front

__all__ = ["search_front", "search_plan"]


def search_front(
    profile: str | Profile,
    *,
    density: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    budget_lengths: Sequence[int] | None = None,
    budget: Sequence[str] = (),
    hardware: str | None = None,
    weights_bytes: int | None = None,
    criterion: Criterion = "signed",
    searcher: Searcher = "exact",
    anchor: Literal["position", "prompt"] = "position",
    rules_per_layer: int | None = None,
    length_weights: Sequence[str] = (),
    predict_lengths: Sequence[int] | None = None,
    robust: float = 0.0,
    min_span: int | None = None,
    layer_floor: Sequence[str] = (),
    time_limit_s: float = 60.0,
    front_steps: int | None = None,
    validate: str | None = None,
    output: str | None = None,
    trust_remote_code: bool = False,
) -> Front:
    """Find the best spans for a memory budget.

    Args:
        profile: Profile file; in Python also a Profile.
        density: Largest share of the KV cache to keep: one for all lengths, or one for each; 0.25 if no other budget
            is given.
        densities: Several densities instead: the best plan for each, and the one where keeping more stops paying.
        budget_lengths: Lengths in tokens that the densities hold at, profiled or not; by default the profiled ones
            and, with the last density, the predicted ones and the model's full context.
        budget: Budgets in other units, also beside a density: tokens=512@8192, kv=2GiB@32768x8,
            memory=24GiB@32768x4, decode=12ms@32768x8 or prefill=900ms@32768.
        hardware: For times: a100-80g, h100-sxm, h200, l40s, rtx4090, or a .yaml from moa-search hardware.
        weights_bytes: Size of the model's weights, for budgets that count them; by default as profiled.
        criterion: How effects on the loss are summed up; signed did best on held-out data, elementwise is
            MoA's own, recall needs no gradient.
        searcher: exact chooses a rule per KV head. Baselines: moa searches as MoA does, duo makes heads dense or
            short as DuoAttention does, per-layer has one rule a layer, recall keeps most attention mass, uniform
            has one rule for all, as StreamingLLM does.
        anchor: Where a rule is evaluated; position at every query's own, prompt once at the total length.
        rules_per_layer: Most different rules in one layer, 1 or 2; any number by default.
        length_weights: Weights of the losses in the chosen plan, such as 1024=1 2048=3; equal by default.
        predict_lengths: Lengths never profiled to predict losses at, by extrapolation; they count like profiled ones.
            By default exact looks ahead to twice the longest profiled length, where a budget holds there.
        robust: Standard errors to add to every loss, so that noise isn't mistaken for a bargain.
        min_span: Smallest span in tokens of any head.
        layer_floor: Smallest density of every head of some layers, such as 0-1=1.0 29=0.5.
        time_limit_s: Seconds for each solve; when they run out, the best plan found is kept with its gap.
        front_steps: Steps of the lattice of weights over the lengths; 0 for the chosen plan alone, by default as many
            as take about 15 solves.
        validate: Model to try every plan of the front on, at an unseen, longer length; the best becomes plan.json
            (moa-search validate has more options).
        output: Folder to write plan.json and front/ to.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

    Returns:
        The front with its chosen plan.

    Raises:
        MoAError: The profile, a budget or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.errors import ConfigError
    from moa_search.search import search_densities, search_profile

    require_positive(time_limit_s=time_limit_s)
    if front_steps is not None and front_steps < 0:
        raise ConfigError(f"front_steps is {front_steps}; it must be at least 0")
    if densities and density:
        raise ConfigError("density asks for one plan, densities for one each: give one of them")
    require_writable_folder(output)
    statistics = load_profile(profile)
    network = None
    if validate is not None:  # before the search: a wrong model is told at once, and nothing is written
        network = model_and_tokenizer(validate, trust_remote_code=trust_remote_code)
        require_profile_fits(statistics, network[0])
    options = search_options(
        statistics,
        density=density,
        budget_lengths=budget_lengths,
        budget=budget,
        hardware=hardware,
        weights_bytes=weights_bytes,
        criterion=criterion,
        searcher=searcher,
        anchor=anchor,
        rules_per_layer=rules_per_layer,
        length_weights=length_weights,
        predict_lengths=predict_lengths,
        robust=robust,
        min_span=min_span,
        layer_floor=layer_floor,
        time_limit_s=time_limit_s,
        front_steps=front_steps,
    )
    front = search_densities(statistics, options, list(densities)) if densities else search_profile(statistics, options)
    if output is not None:
        front.save(output)
        if densities:
            from moa_search.inspection.plots import save_density_plot

            save_density_plot(front, Path(output) / "front" / "densities.png")
    if network is not None:
        front, _ = try_front(front, network, folder=None if output is None else Path(output))
    return front


def search_plan(profile: str | Profile, *, density: float = DEFAULT_DENSITY, **options: Any) -> Plan:
    """The chosen plan of `search_front` for one density at every profiled length.

    Args:
        profile: Profile or its file.
        density: Largest share of the KV cache to keep.
        options: Further arguments of `search_front`.

    Raises:
        MoAError: As `search_front`.
    """
    return search_front(profile, density=[density], **{"front_steps": 0, **options}).chosen
