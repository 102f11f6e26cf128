"""Profiles: made, and pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import Dtype, model_and_tokenizer, require_positive, require_writable
from moa_search.spans import BLOCK_TOKENS, SINK_TOKENS

if TYPE_CHECKING:
    from moa_search.formats import Profile

__all__ = ["merge_profiles", "profile_model"]


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
    impl: Literal["auto", "triton", "torch"] = "auto",
    tiers: Sequence[int] = (),
    positions: int | None = None,
    transforms: str | Profile | None = None,
    trust_remote_code: bool = False,
) -> Profile:
    """Measure what shortening each attention head's view would cost.

    Under torchrun the processes share the samples, one GPU each, and the result is the same.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        lengths: Tokens per calibration sample; one round of samples for each.
        samples: Calibration samples per length.
        sources: What calibration samples are drawn from, in turn: passkey, multikey, question, copy, lines, lookup or
            tracking in built-in texts, passkey:FILE in other ones, or question-answer records or conversations from a
            JSONL, parquet or CSV file or a Hub dataset, such as data.jsonl?context=passage.
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
        impl: What computes the statistics: triton kernels, torch, or auto, which is Triton on GPUs.
        tiers: Bits that keys and values may be stored in, such as 16 8 4 2; their influence is measured in the same
            passes. None measures spans alone.
        positions: Longest context in tokens that the transforms of keys for 4 bits and fewer are meant for; the model's
            own by default.
        transforms: Profile of this model whose transforms to use, so that both can be merged; none measures them.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

    Returns:
        The profile; its run tells times, memory and what was taken over from a stopped run.

    Raises:
        MoAError: The model, a length or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.calibration import calibrate
    from moa_search.data import require_samples_folder
    from moa_search.data import save_samples as save
    from moa_search.errors import ConfigError
    from moa_search.formats import Profile
    from moa_search.modeling.support import require_context
    from moa_search.parallel import joined
    from moa_search.profiling import discard_results, profile_samples, require_profilable, results_folder

    require_positive(lengths=min(lengths, default=0), samples=samples, block=block, row_buckets=row_buckets)
    if sink < 0:
        raise ConfigError(f"sink is {sink}; it must be at least 0")
    with joined() as workers:
        if workers.count > 1 and device_map is not None:
            raise ConfigError("device_map spreads a model over all GPUs, torchrun gives each process one: choose")
        # The others needn't reach the first one's disk.
        workers.by_first(lambda: require_writable(output))
        if save_samples is not None:
            workers.by_first(lambda: require_samples_folder(save_samples))
        given = workers.from_first(
            workers.by_first(lambda: Profile.load(transforms) if isinstance(transforms, str) else transforms)
        )
        placed = {"device": device, "device_map": device_map, "local_rank": workers.local_rank}
        placed["trust_remote_code"] = trust_remote_code
        network, tokenizer = workers.together(lambda: model_and_tokenizer(model, dtype=dtype, **placed))
        require_profilable(network, impl)
        require_context(network.config, max(lengths))
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
            impl=impl,
            tiers=tiers,
            positions=positions,
            transforms=given,
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

    require_writable(output)
    pooled = merge([entry if isinstance(entry, Profile) else Profile.load(entry) for entry in profiles])
    if output is not None:
        pooled.save(output)
    return pooled
