"""Rows of rivals, beside those of plans."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moa_search.data import Sample
from moa_search.data.texts import TextSource
from moa_search.errors import ConfigError, MoAError
from moa_search.evaluation.compare import Variant, densities, held
from moa_search.evaluation.rivals import worker
from moa_search.evaluation.rivals.codes import SCHEMES, coded
from moa_search.evaluation.rivals.exchange import item_of, read_answers, write_items
from moa_search.evaluation.rivals.naming import QUESTIONS, Rival
from moa_search.evaluation.scoring import AnswerScore, generated, readings
from moa_search.evaluation.suite import Evaluator, Grid
from moa_search.formats.files import sha256_of
from moa_search.modeling.loading import weights_hash
from moa_search.modeling.source import find_source
from moa_search.modeling.text import dtype_name, text_config
from moa_search.progress import progress
from moa_search.tasks import Task

FULL = "full"
"""The rival that compresses nothing."""

FULL_TOLERANCE = 0.1
"""Nats by which its mean may differ from dense attention here: other versions of transformers round otherwise."""


@dataclass(frozen=True)
class CodedVariant(Variant):
    """A dense cache in fewer bits.

    Attributes:
        width: Numbers of a key.
        layers: Of the model.
    """

    width: int
    layers: int

    def key(self, length: int) -> str:
        """See `Variant.key`."""
        return f"rival-{self.name}"

    def running(self, model: Any, length: int) -> AbstractContextManager[Any]:
        """See `Variant.running`."""
        return coded(model, SCHEMES[self.name])

    def costs(self, length: int) -> dict[str, float]:
        """See `Variant.costs`."""
        return {**densities(None, length), **held(SCHEMES[self.name].share(self.width), self.layers)}


def coded_variants(rivals: Sequence[Rival], config: Any) -> list[CodedVariant]:
    """Those rivals that run here.

    Args:
        rivals: All.
        config: The model's configuration.
    """
    text = text_config(config)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return [
        CodedVariant(rival.typed, lambda length: None, width, text.num_hidden_layers)
        for rival in rivals
        if rival.is_coded
    ]


@dataclass(frozen=True)
class Elsewhere:
    """The other environment.

    Attributes:
        python: Its Python.
        model: What the user calls the model.
        folder: Where items and answers are kept.
        questions: Settings: the question ``unknown`` or ``known`` when the context is compressed.
    """

    python: str
    model: str
    folder: Path
    questions: Sequence[str]

    def rows(
        self, rivals: Sequence[Rival], evaluator: Evaluator, tasks: Sequence[Task], grid: Grid, dense: pd.DataFrame
    ) -> pd.DataFrame:
        """Rows as `compare_variants` returns them, with ``full`` among the variants.

        Args:
            rivals: That run there.
            evaluator: Has the model and draws the items.
            tasks: What to measure them on.
            grid: Lengths and counts.
            dense: Rows of dense attention here, which ``full`` is compared with.

        Raises:
            ConfigError: An item has no context to compress.
            MoAError: The other environment fails, or computes something else.
        """
        drawn = [
            (task, length, sample, item_of(sample, generated=task.answer_mode(grid.answers) == "generated"))
            for length in grid.lengths
            for task in tasks
            for sample in _with_context(task, evaluator.items(task, length, grid))
        ]
        answers = self._answers(rivals, evaluator, [item for *_, item in drawn])
        rows = []
        for rival, question in self._settings(rivals):
            count: dict[tuple[str, int], int] = {}
            for task, length, sample, item in drawn:
                number = count.setdefault((task.name, length), 0)
                count[task.name, length] += 1
                mode = task.answer_mode(grid.answers)
                answer = answers[rival.typed, question, item["id"]]
                described = {"task": task.name, "length": length, "variant": rival.variant(question)}
                described |= {"density": answer["kept"], "attention_density": 1.0, "kv_share": answer["held"]}
                described |= {"kv_peak": answer["peak"], "extra_passes": answer["extra_passes"]}
                described |= {"metric": task.metric_of(mode), "answers": mode, "item": number}
                rows += [{**described, **vars(score)} for score in readings(task, sample, _scored(sample, answer))]
        found = pd.DataFrame(rows)
        _require_the_same(dense, found)
        return found

    def _settings(self, rivals: Sequence[Rival]) -> list[tuple[Rival, str]]:
        return [(Rival(FULL, FULL), QUESTIONS[0])] + [
            (rival, question)
            for question in QUESTIONS
            for rival in rivals
            if question in rival.questions and (question in self.questions or len(rival.questions) == 1)
        ]

    def _answers(
        self, rivals: Sequence[Rival], evaluator: Evaluator, items: Sequence[Mapping[str, Any]]
    ) -> dict[tuple[str, str, str], dict[str, Any]]:
        dtype = dtype_name(evaluator.model)
        # One file of answers for a model: items are known by what they hold, so longer lists find the old ones there.
        paths = (
            self.folder / f"items-{_short(*(item['id'] for item in items))}.jsonl",
            self.folder / f"answers-{_short(weights_hash(evaluator.model), dtype)}.jsonl",
        )
        needs_texts = any(rival.name == "duo-attention" for rival in rivals)
        write_items(items, _texts(evaluator.tokenizer) if needs_texts else [], paths[0])
        by_question: dict[str, list[str]] = {}
        for rival, question in self._settings(rivals):
            by_question.setdefault(question, []).append(rival.typed)
        with progress(what="Evaluating rivals", unit="item", total=len(items) * len(by_question)) as bar:
            for question, typed in by_question.items():
                self._run(paths, typed, question, dtype, str(evaluator.model.device), bar.update)
        return read_answers(paths[1])

    def _run(
        self,
        paths: tuple[Path, Path],
        typed: Sequence[str],
        question: str,
        dtype: str,
        device: str,
        report: Callable[[int], None],
    ) -> None:
        source = find_source(self.model)
        if source.adapter is not None:
            raise ConfigError(f"rivals: {self.model} is an adapter, which kvpress's environment can't load; merge it")
        command = [self.python, *worker.__path__, "--items", str(paths[0]), "--answers", str(paths[1])]
        command += ["--model", source.name, "--dtype", dtype, "--device", device]
        if "gguf_file" in source.options:
            command += ["--gguf-file", source.options["gguf_file"]]
        command += ["--rivals", *typed, "--questions", question]
        with tempfile.TemporaryFile("w+") as errors:
            try:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            except OSError as error:
                raise ConfigError(f"rivals_python: {self.python} can't be run ({error.strerror})") from None
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    report(line.startswith(worker.DONE))
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()]
        if process.returncode:
            last = lines[-1] if lines else f"exit status {process.returncode}"
            if "No module named 'kvpress'" in last:
                raise ConfigError(f"rivals_python: {self.python} has no kvpress; install it there, or name another")
            raise MoAError(f"rivals: {self.python} failed: {last}")


def _short(*parts: str) -> str:
    return sha256_of(*(part.encode() for part in parts)).removeprefix("sha256:")[:12]


def _with_context(task: Task, samples: Sequence[Sample]) -> Sequence[Sample]:
    if any(len(sample.prompt) <= max(1, sample.question_tokens) for sample in samples):
        raise ConfigError(f"rivals that compress a context can't be measured on {task.name}, whose items have none")
    return samples


def _scored(sample: Sample, answer: Mapping[str, Any]) -> AnswerScore:
    """An answer of the other environment as one of this."""
    counts = sample.counted
    if "generated" in answer:
        return generated(sample, np.array(answer["generated"], dtype=np.int64))
    return AnswerScore(np.array(answer["nll"], dtype=float)[counts], np.array(answer["correct"], dtype=bool)[counts])


def _require_the_same(dense: pd.DataFrame, found: pd.DataFrame) -> None:
    """No figure stands beside another if both environments compute different models."""
    full = found[found["variant"] == FULL]
    for (task, length), theirs in full.groupby(["task", "length"]):
        ours = dense[(dense["task"] == task) & (dense["length"] == length)]
        difference = abs(ours["nll"].mean() - theirs["nll"].mean())
        if difference > FULL_TOLERANCE:
            raise MoAError(
                f"rivals: uncompressed, {task} at {length} tokens loses {theirs['nll'].mean():.3f} nats in kvpress's "
                f"environment and {ours['nll'].mean():.3f} here; both must compute the same model"
            )


def _texts(tokenizer: Any) -> list[str]:
    source, rng = TextSource.library(tokenizer, "calibration"), np.random.default_rng(0)
    return [str(tokenizer.decode(source.cut(worker.DUO_TOKENS, rng)[1])) for _ in range(worker.DUO_SAMPLES)]
