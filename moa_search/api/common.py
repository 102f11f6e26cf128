"""Choices that several functions share, and checks before the work."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moa_search.errors import ConfigError
from moa_search.options import BudgetOptions, SearchOptions

if TYPE_CHECKING:
    from moa_search.formats import Plan, Profile

logger = logging.getLogger(__name__)

SearchKind = TypeVar("SearchKind", bound=SearchOptions)

DEFAULT_DENSITY = 0.25
"""Share of the KV cache to keep where no budget is named."""


def model_and_tokenizer(model: str | os.PathLike[str] | tuple[Any, Any], **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer, loaded where they are named; ``options`` are those of load_model.

    Of a PeftModel, the transformers model that it adapts, with the adapter at work.

    Raises:
        ConfigError: Something else is given.
        ModelUnsupportedError: An adapter adds virtual tokens.
    """
    from moa_search.modeling.loading import load_model
    from moa_search.modeling.wrappers import adapted_model

    if isinstance(model, str | os.PathLike):
        return load_model(os.fspath(model), **options)
    if not isinstance(model, tuple | list) or len(model) != 2:
        raise ConfigError(f"model: a {type(model).__name__} is given; give a name, a folder, or (model, tokenizer)")
    network, tokenizer = model
    return adapted_model(network), tokenizer


def load_profile(profile: str | Profile) -> Profile:
    """A profile, or what its file holds."""
    from moa_search.formats import Profile

    return profile if isinstance(profile, Profile) else Profile.load(profile)


def with_a_budget(options: SearchKind) -> SearchKind:
    """The options, with `DEFAULT_DENSITY` where they name no budget."""
    return (
        options if options.density or options.kv_share or options.budget else options.replace(density=[DEFAULT_DENSITY])
    )


def note_missing_bits(profile: Profile, options: BudgetOptions) -> None:
    """Say how to get a choice of bits: from a profile that knows of 16 alone, or where no budget counts bytes."""
    from moa_search.formats.tiers import PLAIN_BITS
    from moa_search.search.searching import counts_bytes

    if options.tiers is not None and min(options.tiers) < PLAIN_BITS and not counts_bytes(options):
        logger.warning("tiers: no budget counts bytes, so that 16 bits cost nothing more; give --kv-share")
    if options.kv_share and options.tiers is None and profile.header.tiers is None:
        logger.warning(
            "kv_share: the profile knows no fewer than 16 bits, so spans alone have to keep it; moa-profile --tiers "
            "16 8 4 2 measures fewer"
        )


def require_replaceable(output: str | None) -> None:
    """Refuse to replace a plan.json that took a model to choose; what the search itself finds is soon found again.

    Raises:
        ConfigError: The folder holds one; the message names ``overwrite``.
    """
    from moa_search.errors import PlanFormatError
    from moa_search.formats import Plan

    file = None if output is None else Path(output) / "plan.json"
    if file is None or not file.is_file():
        return
    try:
        plan = Plan.load(file)
    except PlanFormatError:
        return  # damaged, or another version's: nothing to lose
    tuned = plan.provenance is not None and plan.provenance.searcher == "tune"
    if tuned or plan.validated:
        how = "tuned" if tuned else "chosen on held-out samples"
        raise ConfigError(
            f"output: {file} was {how} and would be replaced; name another folder, or give overwrite: true"
        )


def require_plans_fit(plans: Mapping[str, Plan], network: Any) -> None:
    """Refuse plans, by name, that were made for another model than ``network``."""
    from moa_search.formats import ModelSignature

    signature = ModelSignature.of(network.config)
    for name, plan in plans.items():
        plan.model.require(signature, f"plan {name}")


def require_profile_fits(profile: Profile, network: Any) -> None:
    """Refuse another model's profile, and say where it is the same model with other weights (fine-tuned, say).

    Weights are compared only where the model is of the type that it was profiled in.
    """
    from moa_search.formats import ModelSignature
    from moa_search.modeling.loading import weights_hash
    from moa_search.modeling.text import dtype_name

    header = profile.header
    header.model.require(ModelSignature.of(network.config), "the profile")
    profiled = header.weights_hash if header.dtype == dtype_name(network) else None
    if profiled is not None and profiled != weights_hash(network):
        logger.warning(
            "the profile was measured on other weights of this model (fine-tuned?): its plans fit, those from a "
            "profile of these weights may be better"
        )


def require_writable(output: str | None, name: str = "output") -> None:
    """Find out before hours of work, not after, that a result can't be written; ``name`` is the option's."""
    if output is None:
        return
    path = Path(output)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise ConfigError(f"{name}: {output} is a folder; give a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{name}: {output} can't be written, {parent} is no writable folder")


def require_writable_folder(output: str | None) -> None:
    """Find out before the work that a folder for its results can't be made or written."""
    if output is None:
        return
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output: {output} is a file; give a folder")
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output: {output} can't be written, {parent} is no writable folder")
