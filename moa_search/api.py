"""What the commands do, as functions: every keyword argument is a flag and a YAML key of the same name.

Heavy libraries are imported inside the functions, so that ``--help`` stays quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.spans import BLOCK_TOKENS, SINK_TOKENS

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import Plan, Profile
    from moa_search.search import Front

__all__ = ["evaluate_model", "inspect_plan", "merge_profiles", "profile_model", "search_front", "search_plan"]

Progress = Callable[[int, int], None]
"""Called with the work done and the work in all."""

Criterion = Literal["squared", "root_squared", "signed", "absolute", "elementwise", "recall"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def profile_model(
    model: str | tuple[Any, Any],
    *,
    lengths: Sequence[int] = (1024, 2048),
    samples: int = 16,
    sources: Sequence[str] = ("passkey", "copy"),
    answers: Literal["model", "dataset"] = "model",
    max_answer_tokens: int = 64,
    chat: Literal["auto", "never"] = "auto",
    save_samples: str | None = None,
    output: str | None = None,
    resume: bool = True,
    dtype: Dtype = "auto",
    device: str = "auto",
    device_map: str | None = None,
    sink: int = SINK_TOKENS,
    block: int = BLOCK_TOKENS,
    row_buckets: int = 32,
    checkpointing: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """Measure what shortening each attention head's view would cost.

    Under torchrun the processes share the samples, one GPU each, and the result is the same.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        lengths: Tokens per calibration sample; one round of samples for each.
        samples: Calibration samples per length.
        sources: What calibration samples are drawn from, in turn: passkey, multikey, question or copy in built-in
            texts, passkey:FILE in other ones, or question-answer records from a JSONL, parquet or CSV file or a Hub
            dataset, such as data.jsonl?context=passage (docs/calibration.md).
        answers: model supervises on the dense model's own greedy answers and leaves out wrong ones; dataset on the
            reference answers.
        max_answer_tokens: Room for the model's own answers to free questions.
        chat: auto puts prompts into the tokenizer's chat template where it has one; never leaves them plain.
        save_samples: Folder to save the calibration samples to as a data set; use it again as source samples:FOLDER.
        output: File to write the profile to (.safetensors); FILE.partial beside it holds an unfinished run.
        resume: Go on from FILE.partial if a run was stopped; false starts anew.
        dtype: Type of the weights; auto is the checkpoint's own on a GPU, and on a CPU bfloat16 where it is native.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one, under torchrun one per process.
        device_map: auto spreads a model that is too large for one GPU over all of them (accelerate).
        sink: First tokens that every head keeps.
        block: Smallest window in tokens, and the granularity of the small ones.
        row_buckets: Equal slices of a sample's rows that are told apart.
        checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        seed: Of the calibration samples.
        progress: Told the work done and in all.

    Returns:
        The profile; its run tells times, memory and what was taken over from a stopped run.

    Raises:
        MoAError: The model, a length or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.architecture import require_context
    from moa_search.calibration import calibrate, require_samples_folder
    from moa_search.calibration import save_samples as save
    from moa_search.errors import ConfigError
    from moa_search.parallel import joined
    from moa_search.profiling import discard_results, profile_samples, require_profilable, results_folder

    _require_positive(lengths=min(lengths, default=0), samples=samples, block=block, row_buckets=row_buckets)
    if sink < 0:
        raise ConfigError(f"sink is {sink}; it must be at least 0")
    with joined() as workers:
        if workers.count > 1 and device_map is not None:
            raise ConfigError("device_map spreads a model over all GPUs, torchrun gives each process one: choose")
        # The others needn't reach the first one's disk.
        workers.by_first(lambda: _require_writable(output))
        if save_samples is not None:
            workers.by_first(lambda: require_samples_folder(save_samples))
        placed = {"device": device, "device_map": device_map, "local_rank": workers.local_rank}
        network, tokenizer = workers.together(lambda: _loaded(model, dtype=dtype, **placed))
        require_profilable(network)
        require_context(network.config, max(lengths))
        calibration_progress, profiling_progress = _split_progress(progress if workers.is_first else None)
        calibration = calibrate(
            network,
            tokenizer,
            sources=sources,
            lengths=lengths,
            samples=samples,
            seed=seed,
            answers=answers,
            max_answer_tokens=max_answer_tokens,
            chat=chat,
            workers=workers,
            progress=calibration_progress,
        )
        if save_samples is not None:
            made = calibration.settings
            workers.by_first(
                lambda: save(calibration.samples, save_samples, tokenizer, split="calibration", settings=made)
            )
        partial = None if output is None else results_folder(output)
        profile = profile_samples(
            network,
            calibration.samples,
            model_name=model if isinstance(model, str) else "",
            sink=sink,
            block=block,
            row_buckets=row_buckets,
            checkpointing=checkpointing,
            seed=seed,
            calibration=calibration.settings,
            workers=workers,
            partial=partial,
            resume=resume,
            progress=profiling_progress,
        )
        if output is not None and partial is not None:
            workers.by_first(lambda: profile.save(output))
            workers.by_first(lambda: discard_results(partial))
    return profile


def merge_profiles(profiles: Sequence[str | Profile], *, output: str | None = None) -> Profile:
    """Pool profiles of one model, made with the same settings from different samples.

    Args:
        profiles: Profile files; in Python also Profiles.
        output: File to write the pooled profile to (.safetensors).

    Returns:
        The profile of all their samples.

    Raises:
        MoAError: A file is no profile, or they can't be pooled; the message says why.
    """
    from moa_search.formats import Profile
    from moa_search.formats.merge import merge

    _require_writable(output)
    pooled = merge([entry if isinstance(entry, Profile) else Profile.load(entry) for entry in profiles])
    if output is not None:
        pooled.save(output)
    return pooled


def search_front(
    profile: str | Profile,
    *,
    density: Sequence[float] = (0.25,),
    budget_lengths: Sequence[int] | None = None,
    criterion: Criterion = "signed",
    searcher: Literal["exact", "uniform"] = "exact",
    time_limit_s: float = 60.0,
    front_steps: int = 6,
    output: str | None = None,
    progress: Progress | None = None,
) -> Front:
    """Find the best spans for a memory budget.

    Args:
        profile: Profile file; in Python also a Profile.
        density: Largest share of the KV cache to keep: one for all lengths, or one for each.
        budget_lengths: Lengths in tokens that the densities hold at, profiled or not; by default the profiled ones
            and, with the last density, the model's full context.
        criterion: How effects on the loss are summed up; signed did best on held-out data (docs/results.md),
            elementwise is MoA's own, recall needs no gradient.
        searcher: exact chooses a rule per KV head; uniform gives every head the same one, as StreamingLLM does.
        time_limit_s: Seconds for each solve; when they run out, the best plan found is kept with its gap.
        front_steps: Steps of the lattice of weights over the profiled lengths.
        output: Folder to write plan.json and front/ to.
        progress: Told the solves done and in all.

    Returns:
        The front; its first plan is the chosen one.

    Raises:
        MoAError: The profile, a budget or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.formats import Profile
    from moa_search.search import search_profile
    from moa_search.search.output import write_front

    _require_positive(time_limit_s=time_limit_s, front_steps=front_steps)
    if budget_lengths is not None:
        _require_positive(budget_lengths=min(budget_lengths, default=0))
    statistics = Profile.load(profile) if isinstance(profile, str | os.PathLike) else profile
    front = search_profile(
        statistics,
        list(density),
        budget_lengths=budget_lengths,
        criterion=criterion,
        searcher=searcher,
        time_limit_s=time_limit_s,
        front_steps=front_steps,
        progress=progress,
    )
    if output is not None:
        write_front(front, output)
    return front


def search_plan(profile: str | Profile, *, density: float = 0.25, **options: Any) -> Plan:
    """The chosen plan of `search_front` for one density at every profiled length.

    Args:
        profile: Profile or its file.
        density: Largest share of the KV cache to keep.
        options: Further arguments of `search_front`.

    Raises:
        MoAError: As `search_front`.
    """
    return search_front(profile, density=[density], **options).chosen


def evaluate_model(
    model: str | tuple[Any, Any],
    *,
    plan: Sequence[str | Plan] = (),
    baselines: Sequence[str] = ("dense", "uniform"),
    tasks: Sequence[str] = ("passkey", "copy"),
    lengths: Sequence[int] = (1024,),
    samples: int = 10,
    output: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Score the model dense, under plans and under uniform spans, on held-out items.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        plan: Plan files; in Python also Plans.
        baselines: dense, and uniform: one span for all heads with as much memory as the plan.
        tasks: passkey (exact match) and copy (token accuracy); both also give the answer's NLL.
        lengths: Tokens per item, answer included.
        samples: Items per task and length.
        output: CSV file for the scores of every item.
        dtype: Type of the weights, as for moa-profile.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one.
        seed: Of the items.
        progress: Told the tokens done and in all.

    Returns:
        One row per variant and item; `moa_search.evaluation.summarise` gives means with intervals.

    Raises:
        MoAError: The model, a plan or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.architecture import require_context
    from moa_search.errors import ConfigError
    from moa_search.evaluation import compare_variants, make_variants
    from moa_search.evaluation.tasks import require_tasks
    from moa_search.formats import ModelSignature, Plan
    from moa_search.formats.files import atomic_write

    _require_positive(lengths=min(lengths, default=0), samples=samples)
    require_tasks(tasks)
    _require_writable(output)
    plans: dict[str, Plan] = {}
    for index, entry in enumerate(plan):
        loaded = entry if isinstance(entry, Plan) else Plan.load(entry)
        plans[_plan_name(entry, loaded, index, plans)] = loaded
    variants = make_variants(plans, baselines, lengths)
    if not variants:
        raise ConfigError("nothing to evaluate: give --plan, or --baselines dense")
    network, tokenizer = _loaded(model, dtype=dtype, device=device)
    signature = ModelSignature.of(network.config)
    for name, loaded in plans.items():
        loaded.model.require(signature, f"plan {name}")
    require_context(network.config, max(lengths))
    items = compare_variants(
        network,
        tokenizer,
        variants,
        tasks=tasks,
        lengths=lengths,
        count=samples,
        seed=seed,
        progress=progress,
    )
    if output is not None:
        with atomic_write(output) as file:
            file.write(items.to_csv(index=False).encode())
    return items


def inspect_plan(plan: str | Plan, *, lengths: Sequence[int] = (), output: str | None = None) -> Plan:
    """Show a plan: spans per layer and KV head, densities and how it was found.

    Args:
        plan: Plan file; in Python also a Plan.
        lengths: Context lengths in tokens to show spans for; by default those the plan was made for.
        output: PNG file for a heat map of the spans.

    Returns:
        The plan.

    Raises:
        MoAError: The file is no valid plan.
    """
    from moa_search.formats import Plan
    from moa_search.inspection import default_lengths, save_heat_map

    if lengths:
        _require_positive(lengths=min(lengths))
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    if output is not None:
        _require_writable(output)
        save_heat_map(loaded, output, lengths=list(lengths) or default_lengths(loaded))
    return loaded


def _loaded(model: str | tuple[Any, Any], **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer; ``options`` are those of load_model."""
    from moa_search.models import load_model

    return load_model(model, **options) if isinstance(model, str) else model


def _plan_name(entry: Any, plan: Plan, index: int, taken: dict[str, Plan]) -> str:
    """The shortest name that tells a plan from those before: its file's, its folder's, else a number."""
    candidates = [f"plan {index + 1}"]
    if isinstance(entry, str | os.PathLike):
        path = Path(entry)
        candidates = [path.stem, f"{path.parent.name}/{path.stem}", str(path)]
        if path.stem == "plan":  # moa-search names every chosen plan so; its folder says which
            candidates.insert(0, path.absolute().parent.name)
    elif plan.provenance is not None and plan.provenance.criterion:
        candidates.insert(0, plan.provenance.criterion)
    return next((name for name in candidates if name not in taken), f"plan {index + 1}")


def _split_progress(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """One bar for two stages: answering the samples, then profiling them, which takes about three times as long."""
    if progress is None:
        return None, None
    return lambda done, total: progress(done, 4 * total), lambda done, total: progress(total + 3 * done, 4 * total)


def _require_positive(**values: float) -> None:
    from moa_search.errors import ConfigError

    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}: {value:g} is out of range; it must be over 0")


def _require_writable(output: str | None) -> None:
    """Find out before hours of work, not after, that a result can't be written."""
    from moa_search.errors import ConfigError

    if output is None:
        return
    path = Path(output)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise ConfigError(f"output: {output} is a folder; give a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output: {output} can't be written, {parent} is no writable folder")
