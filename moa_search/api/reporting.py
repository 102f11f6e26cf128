"""A whole evaluation as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.api.common import model_and_tokenizer, require_plans_fit, require_writable_folder
from moa_search.api.variants import given_plans, searched_plans
from moa_search.errors import ConfigError
from moa_search.options import ReportOptions, takes
from moa_search.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.evaluation.compare import Comparison
    from moa_search.evaluation.rivals import Rival
    from moa_search.evaluation.suite import Evaluator, Grid
    from moa_search.tasks import Task


@takes(ReportOptions)
def report_model(model: str | tuple[Any, Any], options: ReportOptions) -> pd.DataFrame:
    """Run dense attention, plans and baselines over tasks and lengths, and write a page about it.

    Writes report.html, which needs no network, its tables as report.md, items.csv, summary.csv, differences.csv,
    effective.csv, the plans that were searched into plans/ and every measured cell into cells/: the same command goes
    on where it was stopped, and measures nothing twice.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo".
        options: As keywords, each described in `ReportOptions`.

    Returns:
        What effective.csv holds: how far every variant carries on each retrieval task, with its multiples over uniform
        spans.

    Raises:
        MoAError: The model, a plan, the profile or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.evaluation.compare import make_variants
    from moa_search.evaluation.rivals import coded_variants, parse_rivals
    from moa_search.evaluation.suite import Evaluator, Grid
    from moa_search.modeling.support import require_context
    from moa_search.modeling.text import dtype_name
    from moa_search.tasks import require_tasks

    kinds = require_tasks(options.tasks)
    rivals = parse_rivals(options.rivals)
    elsewhere = [rival for rival in rivals if not rival.is_coded]
    if elsewhere:
        _require_environment(model, options)
    counts = _counts(options.lengths, options.samples)
    require_writable_folder(options.output)
    searched = []
    if options.profile is not None:
        searched = searched_plans(options)
    taken = [name for group in searched for name in group] + [rival.typed for rival in rivals]
    given = given_plans(options.plan, taken)
    compared = make_variants([*given, *searched], options.baselines)
    names = [variant.name for variant in compared.variants] + [
        rival.variant(question) for rival in rivals for question in rival.questions
    ]
    against = options.against
    if "against" not in options.model_fields_set:
        against = [name for name in against if name in names]  # the default, where dense attention isn't measured
    for name in against:
        if name not in names:
            raise ConfigError(f"against: variant {name!r} isn't measured; choose from {', '.join(names)}")
    network, tokenizer = model_and_tokenizer(model, **options.loading)
    require_plans_fit(compared.plans, network)
    require_context(network.config, max(options.lengths))
    grid = Grid(counts, tuple(options.depths), options.seed, options.answers)
    compared.variants.extend(coded_variants(rivals, network.config))
    with progress(what="Evaluating", unit="token", total=grid.work(kinds, len(compared.variants))) as bar:
        evaluator = Evaluator(network, tokenizer, Path(options.output) / "cells", bar.update)
        measured = _measure(evaluator, compared, kinds, grid, windows=options.windows, refine=options.refine)
    if elsewhere:
        measured = _with_rivals(measured, elsewhere, evaluator, kinds, grid, options, str(model))
    settings = {
        "model": model if isinstance(model, str) else getattr(network.config, "name_or_path", "") or "a loaded model",
        "dtype": dtype_name(network),
        "device": str(network.device),
        "items": ", ".join(f"{count} at {length}" for length, count in counts.items())
        + (f", at each of {len(options.depths)} depths" if options.depths else ""),
        "answers": "teacher-forced"
        if options.answers == "forced"
        else "generated greedily (perplexity and NLL teacher-forced)",
        "seed": options.seed,
    }
    return _write(Path(options.output), measured, compared, settings, against)


def _require_environment(model: Any, options: ReportOptions) -> None:
    if options.rivals_python is None:
        raise ConfigError("rivals: kvpress's methods run in an environment of their own; give --rivals-python")
    if not isinstance(model, str):
        raise ConfigError("rivals: kvpress's environment loads the model itself; give its name, not a loaded one")
    if "dense" not in options.baselines:
        raise ConfigError("rivals: kvpress's environment is compared with dense attention here; give --baselines dense")


def _with_rivals(
    measured: _Measured,
    rivals: Sequence[Rival],
    evaluator: Evaluator,
    tasks: Sequence[Task],
    grid: Grid,
    options: ReportOptions,
    model: str,
) -> _Measured:
    """The rows with those of rivals that run in another environment."""
    import pandas as pd

    from moa_search.evaluation.rivals import Elsewhere

    dense = measured.grid[measured.grid["variant"] == "dense"]
    there = Elsewhere(str(options.rivals_python), model, Path(options.output) / "rivals", options.questions)
    rows = there.rows(rivals, evaluator, tasks, grid, dense)
    return replace(measured, grid=pd.concat([measured.grid, rows]), items=pd.concat([measured.items, rows]))


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
    none = measured.items["variant"].iloc[0]
    tables = {
        "items": pd.concat([measured.items, measured.window_items]) if len(measured.window_items) else measured.items,
        "summary": summarise(measured.items),
        "differences": pd.concat(differences) if differences else paired_differences(measured.items, none)[:0],
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
