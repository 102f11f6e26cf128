"""Profiles: made, and pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moa_search.api.common import load_profile, model_and_tokenizer, require_writable
from moa_search.options import MergeOptions, ProfileOptions, takes

if TYPE_CHECKING:
    from moa_search.formats import Profile


@takes(ProfileOptions)
def profile_model(model: str | tuple[Any, Any], options: ProfileOptions) -> Profile:
    """Measure what shortening each attention head's view would cost.

    Under torchrun the processes share the samples, one GPU each, and the result is the same.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo".
        options: As keywords, each described in `ProfileOptions`.

    Returns:
        The profile; its run tells times, memory and what was taken over from a stopped run.

    Raises:
        MoAError: The model, a length or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.calibration import calibrate
    from moa_search.data import require_samples_folder
    from moa_search.data import save_samples as save
    from moa_search.errors import ConfigError
    from moa_search.modeling.support import require_context
    from moa_search.parallel import joined
    from moa_search.profiling import discard_results, profile_samples, require_profilable, results_folder
    from moa_search.tasks import parse_source

    for source in options.sources:
        parse_source(source)  # before a model is loaded
    with joined() as workers:
        if workers.count > 1 and options.device_map is not None:
            raise ConfigError("device_map spreads a model over all GPUs, torchrun gives each process one: choose")
        # The others needn't reach the first one's disk.
        workers.by_first(lambda: require_writable(options.output))
        samples_folder, output, transforms = options.save_samples, options.output, options.transforms
        if samples_folder is not None:
            workers.by_first(lambda: require_samples_folder(samples_folder))
        given = workers.from_first(workers.by_first(lambda: None if transforms is None else load_profile(transforms)))
        placed = {**options.loading, "device_map": options.device_map, "local_rank": workers.local_rank}
        network, tokenizer = workers.together(lambda: model_and_tokenizer(model, **placed))
        require_profilable(network, options.impl)
        require_context(network.config, max(options.lengths))
        calibration = calibrate(
            network,
            tokenizer,
            sources=options.sources,
            lengths=options.lengths,
            samples=options.samples,
            seed=options.seed,
            answers=options.answers,
            max_answer_tokens=options.max_answer_tokens,
            chat=options.chat,
            workers=workers,
        )
        if samples_folder is not None:
            made = calibration.settings
            workers.by_first(
                lambda: save(calibration.samples, samples_folder, tokenizer, split="calibration", settings=made)
            )
        partial = None if options.output is None else results_folder(options.output)
        profile = profile_samples(
            network,
            calibration.samples,
            model_name=model if isinstance(model, str) else "",
            sink=options.sink,
            block=options.block,
            row_buckets=options.row_buckets,
            checkpointing=options.checkpointing,
            seed=options.seed,
            calibration=calibration.settings,
            workers=workers,
            partial=partial,
            resume=options.resume,
            impl=options.impl,
            tiers=options.tiers,
            transforms=given,
        )
        if output is not None and partial is not None:
            workers.by_first(lambda: profile.save(output))
            workers.by_first(lambda: discard_results(partial))
    return profile


@takes(MergeOptions)
def merge_profiles(profiles: Sequence[str | Profile], options: MergeOptions) -> Profile:
    """Pool profiles of one model, made with the same settings from different samples.

    Args:
        profiles: Profile files.
        options: As keywords, each described in `MergeOptions`.

    Returns:
        The profile of all their samples.

    Raises:
        MoAError: A file is no profile, or they can't be pooled; the message says why.
    """
    from moa_search.formats.merge import merge

    require_writable(options.output)
    pooled = merge([load_profile(entry) for entry in profiles])
    if options.output is not None:
        pooled.save(options.output)
    return pooled
