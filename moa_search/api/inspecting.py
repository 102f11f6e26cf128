"""Looking at plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moa_search.api.common import require_lengths, require_writable
from moa_search.api.converting import PlanFormat, export_plan, import_plan
from moa_search.errors import ConfigError

if TYPE_CHECKING:
    from moa_search.formats import ModelSignature, Plan

__all__ = ["inspect_plan"]


def inspect_plan(
    plan: str | Plan,
    *,
    lengths: Sequence[int] = (),
    output: str | None = None,
    model: str | Plan | ModelSignature | Any | None = None,
    fold_lengths: Sequence[int] = (),
    threshold: float | None = None,
    sparsity: float | None = None,
    sink: int | None = None,
    recent: int | None = None,
    save: str | None = None,
    format: PlanFormat = "plan",
    reanchor: bool = False,
) -> Plan:
    """Show a plan, ours or another tool's: spans per layer and KV head, densities and how it was found.

    Args:
        plan: Plan file, MoA's alphas and betas, or DuoAttention's folder or table of scores; in Python also a Plan.
        lengths: Context lengths in tokens to show spans for; by default those the plan was made for.
        output: PNG file for a heat map of the spans.
        model: What other tools' plans were made for, since they don't say: a hub id, a folder, a plan or profile of
            the model, or layers=32,heads=32,kv_heads=8,head_dim=128 to look at it only; a plan of ours is checked.
        fold_lengths: MoA's plans: context lengths in tokens between which the rule of a KV head has to keep what its
            query heads' rules keep; by default everywhere, which may take more memory.
        threshold: DuoAttention's: heads with at least this score are dense (0.5 by default).
        sparsity: DuoAttention's: share of heads that aren't dense, instead of a threshold.
        sink: DuoAttention's: first tokens that the other heads keep; by default what the config.json beside it says.
        recent: DuoAttention's: newest tokens that they keep, likewise.
        save: File to write the plan to; for DuoAttention a folder.
        format: How to write it: ``plan`` as a plan of ours, ``moa`` as MoA's alphas and betas, ``duo`` as
            DuoAttention's folder.
        reanchor: ``moa``: write rules that are evaluated at every position, too; MoA evaluates them once, at the total
            length, so that earlier tokens attend more.

    Returns:
        The plan.

    Raises:
        MoAError: The file is no valid plan, of another model, or the format can't express it.
    """
    from moa_search.inspection import save_heat_map

    require_lengths(lengths=lengths)
    if save is None and (format != "plan" or reanchor):
        raise ConfigError(f"{'reanchor' if reanchor else 'format'}: it is for writing; give save, too")
    loaded = import_plan(
        plan,
        model=model,
        fold_lengths=fold_lengths,
        threshold=threshold,
        sparsity=sparsity,
        sink=sink,
        recent=recent,
    )
    if output is not None:
        require_writable(output)
    if save is not None:
        export_plan(loaded, save, format=format, reanchor=reanchor)
    if output is not None:
        save_heat_map(loaded, output, lengths=list(lengths) or loaded.lengths)
    return loaded
