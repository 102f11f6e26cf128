"""A front put to the test: its plans run sparsely on samples that neither profile nor search have seen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import model_and_tokenizer, require_writable
from moa_search.errors import ConfigError
from moa_search.options import ValidateOptions, ValidationOptions, takes
from moa_search.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.data import Split
    from moa_search.evaluation.true_loss import TrueLoss
    from moa_search.formats import Plan
    from moa_search.formats.provenance import Budget, Validation
    from moa_search.search import Front

TABLE = "validation.csv"


@takes(ValidateOptions)
def validate_front(folder: str, options: ValidateOptions) -> pd.DataFrame:
    """Run every plan of a front on held-out samples, and choose the one that loses least.

    Writes validation.csv and what each plan lost into its file, and makes the best plan of plan.json's budgets
    plan.json: under a larger budget any plan loses less. A plan.json that isn't of the front joins it. What was
    measured is kept in validation/, so that a stopped run resumes and a second one measures nothing.
    Dense attention comes first, then plan.json, then the others.

    Args:
        folder: Folder that moa-search wrote, with plan.json and front/.
        options: As keywords, each described in `ValidateOptions`.

    Returns:
        One row per plan and length: its ``true_loss`` in nats per answer token, the ``dense_loss`` of the same samples,
        their ``difference`` with the standard error of the paired difference, whether the plan was chosen before and
        is now, and the losses that were predicted, ``loss@LENGTH`` as in front.csv. The choice goes by the mean over
        the lengths; of equals the first is taken.

    Raises:
        MoAError: The folder holds no front, a plan is damaged or of another model, or an option can't be used; see
            `moa_search.errors`.
    """
    from moa_search.search import Front

    front = Front.load(folder)
    require_writable(str(Path(folder) / TABLE))
    network = model_and_tokenizer(options.model, **options.loading)
    return try_front(front, network, options, folder=Path(folder))[1]


def try_front(
    front: Front, model: tuple[Any, Any], options: ValidationOptions, *, folder: Path | None = None
) -> tuple[Front, pd.DataFrame]:
    """Run every plan of a front on held-out samples; the one that loses least is chosen.

    Args:
        front: The front.
        model: Model and tokenizer.
        options: Which samples.
        folder: That the front lies in, where there is one: results are kept in it.

    Returns:
        The front with what its plans lost, and a table as `validate_front` returns it.

    Raises:
        MoAError: As `validate_front`.
    """
    from moa_search.formats import ModelSignature
    from moa_search.formats.files import write_csv

    network, tokenizer = model
    signature = ModelSignature.of(network.config)
    for file, plan in zip(front.files, front.plans, strict=True):
        plan.model.require(signature, file if folder is None else f"{folder / file}")
    truth = held_out_loss(
        network,
        tokenizer,
        sources=options.sources,
        lengths=options.lengths or _default_lengths(front.plans, network.config),
        samples=options.samples,
        seed=options.seed,
        cache_folder=None if folder is None else folder / "validation",
        answers=options.answers,
        chat=options.chat,
    )
    tried = front.replaced(_measure(truth, front, folder), front.chosen_index)
    best = min(_rivals(front), key=lambda index: truth.evaluate(front.plans[index]))
    rows = _rows(truth, front, best)
    tried = tried.replaced(tried.plans, best)
    if folder is not None:
        write_csv(rows, folder / TABLE)
        tried.chosen.save(folder / "plan.json")
    return tried, rows


def held_out_loss(
    model: Any,
    tokenizer: Any,
    *,
    sources: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    split: Split = "validation",
    seed: int = 0,
    cache_folder: str | os.PathLike[str] | None = None,
    answers: Literal["model", "dataset"] = "dataset",
    chat: Literal["auto", "never"] = "never",
) -> TrueLoss:
    """The true loss of a loaded model on samples that calibration doesn't use.

    Args:
        model: The model, dense.
        tokenizer: Its tokenizer.
        sources: What samples are drawn from, in turn.
        lengths: Tokens per sample, answer included.
        samples: Samples per length.
        split: Which documents to use; the splits share none.
        seed: Of the samples.
        cache_folder: Where measured losses are kept; by default in memory only.
        answers: ``dataset``: the data's own; ``model``: the dense model's, where they are right.
        chat: ``auto``: within the tokenizer's chat template, where it has one; ``never``: plain text.

    Raises:
        MoAError: A length is over the model's context, samples can't be built as asked, or the folder can't be
            written.
    """
    from moa_search.calibration import calibrate
    from moa_search.evaluation.loss_cache import LossCache
    from moa_search.evaluation.true_loss import TrueLoss
    from moa_search.modeling.support import require_context

    require_context(model.config, max(lengths, default=0))
    cache = LossCache(cache_folder)
    drawn = calibrate(
        model,
        tokenizer,
        sources=sources,
        lengths=lengths,
        samples=samples,
        seed=seed,
        split=split,
        answers=answers,
        chat=chat,
    )
    return TrueLoss(model, drawn.samples, cache)


def _default_lengths(plans: Sequence[Plan], config: Any) -> list[int]:
    """Twice the longest length that losses were profiled at, if the model's context is as long."""
    from moa_search.modeling.text import context_length

    predicted = [metrics for plan in plans for metrics in plan.predicted if not metrics.extrapolated]
    known = [metrics.length for metrics in predicted if metrics.loss is not None]
    longest = max(known or [metrics.length for metrics in predicted], default=None)
    if longest is None:
        raise ConfigError("lengths: the plans don't say what lengths they are for; give --lengths")
    context = context_length(config)
    return [2 * longest if context is None else min(2 * longest, context)]


def _measure(truth: TrueLoss, front: Front, folder: Path | None) -> list[Plan]:
    """The plans with what they lost. Dense attention is measured first, then the chosen plan, each distinct plan once.

    Each result is written at once where there is a folder.
    """
    alike: dict[str, list[int]] = {}
    for index in sorted(range(len(front.plans)), key=lambda index: not front.is_chosen(index)):
        alike.setdefault(front.plans[index].fingerprint, []).append(index)
    plans = list(front.plans)
    truth.loss(None)
    for places in progress(alike.values(), what="Validating", unit="plan"):
        truth.loss(plans[places[0]])
        for index in places:
            plans[index] = _validated(truth, plans[index])
            if folder is not None:
                plans[index].save(folder / front.files[index])
    return plans


def _rivals(front: Front) -> list[int]:
    """The plans that plan.json may become: those made for its budgets, or all where there was none."""

    def budgets(index: int) -> tuple[Budget, ...]:
        provenance = front.plans[index].provenance
        return provenance.budgets if provenance else ()

    places = range(len(front.plans))
    allowed = {budgets(index) for index in places if front.chosen_index is None or front.is_chosen(index)}
    return [index for index in places if budgets(index) in allowed]


def _validated(truth: TrueLoss, plan: Plan) -> Plan:
    """The plan with what it lost; entries of other lengths and samples stay."""
    entries: dict[tuple[int, str], Validation] = {(entry.length, entry.data): entry for entry in plan.validated}
    entries |= {(entry.length, entry.data): entry for entry in truth.validations(plan)}
    return plan.model_copy(update={"validated": tuple(entries[key] for key in sorted(entries))})


def _rows(truth: TrueLoss, front: Front, best: int) -> pd.DataFrame:
    import pandas as pd

    dense = truth.loss(None)
    rows = []
    for index, (file, plan) in enumerate(zip(front.files, front.plans, strict=True)):
        losses = truth.loss(plan)
        for length in truth.lengths:
            loss, difference = truth.mean(losses, length), truth.mean(losses - dense, length)
            row = {
                "plan": Path(file).name,
                "length": length,
                "chosen_before": front.is_chosen(index),
                "chosen": index == best,
                "density": plan.density(length),
                "share": plan.share(length),
                "attention_density": plan.attention_density(length),
                "samples": truth.samples_at(length),
                "true_loss": loss.value,
                "true_error": loss.error,
                "dense_loss": truth.mean(dense, length).value,
                "difference": difference.value,
                "difference_error": difference.error,
            }
            rows.append(row | {f"loss@{metrics.length}": metrics.loss for metrics in plan.predicted})
    return pd.DataFrame(rows)
