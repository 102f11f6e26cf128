"""Choices that several functions share, and checks before the work."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.errors import ConfigError

if TYPE_CHECKING:
    from moa_search.formats import Plan, Profile

__all__ = [
    "Criterion",
    "Dtype",
    "Searcher",
    "model_and_tokenizer",
    "require_depths",
    "require_lengths",
    "require_plans_fit",
    "require_positive",
    "require_profile_fits",
    "require_writable",
    "require_writable_folder",
]

logger = logging.getLogger(__name__)

Criterion = Literal["squared", "root_squared", "signed", "absolute", "elementwise", "recall"]
Searcher = Literal["exact", "moa", "duo", "per-layer", "recall", "uniform"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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


def require_positive(**values: float) -> None:
    """Refuse options that aren't over 0, by name."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}: {value:g} is out of range; it must be over 0")


def require_depths(depths: Sequence[float]) -> None:
    """Refuse places in a text that lie outside it."""
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ConfigError(f"depths: {depth:g} is out of range; it must be from 0, the start, to 1, the end")


def require_lengths(**values: Sequence[int]) -> None:
    """Refuse context lengths that nobody has, by option; none at all are fine."""
    from moa_search.search.budgets.specs import MAX_LENGTH

    for name, lengths in values.items():
        if lengths:
            require_positive(**{name: min(lengths)})
            if max(lengths) > MAX_LENGTH:
                raise ConfigError(f"{name}: {max(lengths)} is out of range; it must be at most {MAX_LENGTH}")


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
