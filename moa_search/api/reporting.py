"""A whole evaluation as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import (
    Dtype,
    Searcher,
    model_and_tokenizer,
    require_depths,
    require_plans_fit,
    require_positive,
    require_writable_folder,
)
from moa_search.api.variants import given_plans, searched_plans
from moa_search.errors import ConfigError
from moa_search.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.evaluation.compare import Comparison
    from moa_search.evaluation.suite import Evaluator, Grid
    from moa_search.formats import PlanLike, Profile
    from moa_search.tasks import Task

__all__ = ["report_model"]


def report_model(
    model: str | tuple[Any, Any],
    *,
    output: str,
    plan: Sequence[str | PlanLike] = (),
    profile: str | Profile | None = None,
    searchers: Sequence[Searcher] = ("exact", "moa"),
    densities: Sequence[float] = (0.5, 0.25, 0.125),
    budget_lengths: Sequence[int] | None = None,
    baselines: Sequence[str] = ("dense", "uniform"),
    tasks: Sequence[str] = ("passkey", "copy"),
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    samples: Sequence[int] = (20,),
    answers: Literal["forced", "generated"] = "forced",
    depths: Sequence[float] = (),
    against: Sequence[str] = ("dense",),
    windows: bool = True,
    refine: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Run dense attention, plans and baselines over tasks and lengths, and write a page about it.

    Writes report.html, which needs no network, its tables as report.md, items.csv, summary.csv, differences.csv,
    effective.csv, the plans that were searched into plans/ and every measured cell into cells/: the same command goes
    on where it was stopped, and measures nothing twice.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        output: Folder for the page and its tables.
        plan: Plan files; in Python also Plans or their contents.
        profile: Profile to search further plans in, one for each searcher and density.
        searchers: Which search: exact is ours, moa is MoA's; the first is compared with the others.
        densities: Shares of the KV cache that searched plans keep at most.
        budget_lengths: Lengths in tokens that the densities hold at, as for moa-search; those of the items make all
            plans of a density keep as much at each.
        baselines: dense, and uniform: one span for all heads with as much memory as a plan.
        tasks: As for moa-eval.
        lengths: Tokens per item, answer included.
        samples: Items per task and length (per depth where depths are given): one number for all lengths, or one for
            each.
        answers: As for moa-eval.
        depths: As for moa-eval; gives depth by length grids.
        against: Variants that all others are compared with, item by item.
        windows: Whether to measure one constant window of each plan's average span, for the multiple of its effective
            context.
        refine: How often to halve the gap between the last length that passes and the next, for dense and plans.
        dtype: Type of the weights, as for moa-profile.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one.
        seed: Of the items.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

    Returns:
        What effective.csv holds: how far every variant carries on each retrieval task, with its multiples over uniform
        spans.

    Raises:
        MoAError: The model, a plan, the profile or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.evaluation.compare import make_variants
    from moa_search.evaluation.suite import Evaluator, Grid
    from moa_search.modeling.support import require_context
    from moa_search.modeling.text import dtype_name
    from moa_search.tasks import require_tasks

    require_positive(lengths=min(lengths, default=0), samples=min(samples, default=0))
    require_depths(depths)
    kinds = require_tasks(tasks)
    counts = _counts(lengths, samples)
    if refine < 0:
        raise ConfigError(f"refine: {refine} is out of range; it must be at least 0")
    require_writable_folder(output)
    searched = []
    if profile is not None:
        searched = searched_plans(profile, searchers, densities, budget_lengths, Path(output) / "plans")
    given = given_plans(plan, [name for group in searched for name in group])
    compared = make_variants([*given, *searched], baselines)
    names = [variant.name for variant in compared.variants]
    for name in against:
        if name not in names:
            raise ConfigError(f"against: variant {name!r} isn't measured; choose from {', '.join(names)}")
    network, tokenizer = model_and_tokenizer(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    require_plans_fit(compared.plans, network)
    require_context(network.config, max(lengths))
    grid = Grid(counts, tuple(depths), seed, answers)
    with progress(what="Evaluating", unit="token", total=grid.work(kinds, len(names))) as bar:
        evaluator = Evaluator(network, tokenizer, Path(output) / "cells", bar.update)
        measured = _measure(evaluator, compared, kinds, grid, windows=windows, refine=refine)
    settings = {
        "model": model if isinstance(model, str) else getattr(network.config, "name_or_path", "") or "a loaded model",
        "dtype": dtype_name(network),
        "device": str(network.device),
        "items": ", ".join(f"{count} at {length}" for length, count in counts.items())
        + (f", at each of {len(depths)} depths" if depths else ""),
        "answers": "teacher-forced"
        if answers == "forced"
        else "generated greedily (perplexity and NLL teacher-forced)",
        "seed": seed,
    }
    return _write(Path(output), measured, compared, settings, against)


def _counts(lengths: Sequence[int], samples: Sequence[int]) -> dict[int, int]:
    if len(samples) not in (1, len(lengths)):
        raise ConfigError(f"samples: {len(samples)} numbers for {len(lengths)} lengths; give one, or one for each")
    each = list(samples) * len(lengths) if len(samples) == 1 else list(samples)
    return dict(sorted(zip(lengths, each, strict=True)))


@dataclass(frozen=True)
class _Measured:
    """All rows.

    Attributes:
        grid: At the lengths asked for.
        items: These and those at lengths in between.
        window_items: Of constant windows.
        windows: By task and plan, the window in tokens.
        retrieval: Names of the tasks that have an effective context.
    """

    grid: pd.DataFrame
    items: pd.DataFrame
    window_items: pd.DataFrame
    windows: dict[str, dict[str, int]]
    retrieval: list[str]


def _measure(
    evaluator: Evaluator, compared: Comparison, tasks: Sequence[Task], grid: Grid, *, windows: bool, refine: int
) -> _Measured:
    import pandas as pd

    from moa_search.evaluation.suite import measure_grid, measure_windows, refine_grid

    rows = measure_grid(evaluator, compared.variants, tasks, grid)
    items, window_items, of_task = [rows], [rows.iloc[:0]], {}
    uniform = set(compared.uniform.values())
    closely = [variant for variant in compared.variants if variant.name not in uniform]
    retrieval = [task for task in tasks if task.is_retrieval]
    for task in retrieval:
        between = refine_grid(evaluator, closely, task, grid, rows, refine)
        items += [between] if len(between) else []
        if windows and compared.plans:
            tried, of_task[task.name] = measure_windows(evaluator, compared.plans, task, grid, pd.concat(items))
            window_items += [tried] if len(tried) else []
    joined = pd.concat(window_items[1:]) if len(window_items) > 1 else window_items[0]
    return _Measured(rows, pd.concat(items), joined, of_task, [task.name for task in retrieval])


def _write(
    output: Path, measured: _Measured, compared: Comparison, settings: Mapping[str, object], against: Sequence[str]
) -> pd.DataFrame:
    import pandas as pd

    from moa_search.evaluation import paired_differences, summarise
    from moa_search.evaluation.effective import effective_table
    from moa_search.formats.files import atomic_write, write_csv
    from moa_search.inspection.pages import Report, report_markdown, report_page

    effective = effective_table(
        measured.items,
        measured.retrieval,
        uniform=compared.uniform,
        windows=measured.windows,
        window_items=measured.window_items,
    )
    differences = [paired_differences(measured.items, name) for name in against]
    for mine, other in compared.pairs:
        if other not in against:
            pair = measured.items[measured.items["variant"].isin([mine, other])]
            differences.append(paired_differences(pair, other))
    tables = {
        "items": pd.concat([measured.items, measured.window_items]) if len(measured.window_items) else measured.items,
        "summary": summarise(measured.items),
        "differences": pd.concat(differences) if differences else paired_differences(measured.items[:0]),
        "effective": effective,
    }
    for name, table in tables.items():
        write_csv(table, output / f"{name}.csv")
    report = Report(
        settings=settings,
        items=measured.items,
        summary=tables["summary"],
        differences=tables["differences"],
        effective=effective,
        plans=compared.plans,
    )
    report_page(report).save(output / "report.html")
    with atomic_write(output / "report.md") as file:
        file.write(report_markdown(report).encode())
    return effective
