"""vLLM in this process, with its pool in sight, and the same model under transformers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NAN = float("nan")
Tokens = list[int]


@dataclass
class Answer:
    """What a request came to."""

    tokens: Tokens
    cached: int
    text: str = ""


@dataclass
class Trace:
    """What was seen of the pool while requests ran."""

    running: int = 0
    running_tokens: int = 0
    used_blocks: int = 0
    preempted: int = 0
    steps: int = 0
    seconds: float = 0.0
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def tokens(self) -> list[Tokens]:
        """Answers to the prompts of `Engine.run`, in their order."""
        return [self.answers[str(number)].tokens for number in range(len(self.answers))]


class Engine:
    """The engine; blocks are full of NaN until something is stored, and again as soon as they are free."""

    def __init__(self, folder: str, plan: Path | None, *, poisoned: bool = True, **options: Any) -> None:
        from vllm import LLM

        given = {"max_model_len": 4096, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 2**28} | options
        extra = dict(given.pop("additional_config", {}))  # type: ignore[call-overload]
        if plan is not None:
            extra["moa_plan"] = str(plan)
        self.llm = LLM(folder, dtype="float32", enforce_eager=True, additional_config=extra, **given)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.groups = self.manager.coordinator.kv_cache_config.kv_cache_groups
        self._preempted = 0
        self._count_preemptions()
        if poisoned:
            self._poison()

    @property
    def bytes_per_block(self) -> int:
        """Of one group's heads."""
        group = self.groups[0]
        return len(group.layer_names) * group.kv_cache_spec.page_size_bytes

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()  # one is vLLM's null block

    @contextmanager
    def small_pool(self, blocks: int) -> Iterator[None]:
        """For the block, all but so many of the free blocks are taken away."""
        taken = self.pool.get_new_blocks(self.pool.get_num_free_blocks() - blocks)
        try:
            yield
        finally:
            self.pool.free_blocks(taken)

    def run(self, prompts: Iterable[Sequence[int]], new: int | Sequence[int], **sampling: Any) -> Trace:
        """Answer all prompts at once, greedily unless told otherwise."""
        prompts = [list(prompt) for prompt in prompts]
        lengths = [new] * len(prompts) if isinstance(new, int) else list(new)
        for number, (prompt, count) in enumerate(zip(prompts, lengths, strict=True)):
            self.add(str(number), prompt, count, **sampling)
        return self.drain()

    def add(self, name: str, prompt: Sequence[int], new: int, **sampling: Any) -> None:
        """Queue a request."""
        from vllm import SamplingParams

        params = SamplingParams(**{"temperature": 0.0, "max_tokens": new, "ignore_eos": True, **sampling})
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def drain(self) -> Trace:
        """Step until every request is answered."""
        trace, begin, before = Trace(), time.thread_time(), self._preempted
        while self.engine.has_unfinished_requests():
            self.step(trace)
        trace.seconds, trace.preempted = time.thread_time() - begin, self._preempted - before
        return trace

    def drain_until_first_ends(self) -> Trace:
        """Step until some request is answered, then give up the others: later ones find a pool in another state."""
        trace, begin, before = Trace(), time.thread_time(), self._preempted
        while not trace.answers:
            self.step(trace)
        trace.seconds, trace.preempted = time.thread_time() - begin, self._preempted - before
        return trace

    def step(self, trace: Trace) -> None:
        """One step of the engine."""
        finished = [output for output in self.engine.step() if output.finished]
        running = self.scheduler.running
        tokens = sum(request.num_computed_tokens for request in running)
        trace.steps += 1
        trace.running = max(trace.running, len(running))
        if tokens > trace.running_tokens:
            trace.running_tokens, trace.used_blocks = tokens, self.used_blocks
        for output in finished:
            answer = output.outputs[0]
            trace.answers[output.request_id] = Answer(
                list(answer.token_ids), output.num_cached_tokens or 0, answer.text
            )

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(*arguments: Any, **options: Any) -> Any:
            self._preempted += 1
            return preempt(*arguments, **options)

        self.scheduler._preempt_request = counted

    def _poison(self) -> None:
        layers = self.engine.vllm_config.compilation_config.static_forward_context
        pages = [layers[name].kv_cache for name in self.groups[0].layer_names]  # all groups lie in the same memory
        take, give = self.pool.get_new_blocks, self.pool.free_blocks

        def spoil(blocks: Iterable[Any]) -> None:
            ids = torch.tensor([block.block_id for block in blocks], dtype=torch.long)
            for page in pages if len(ids) else ():
                page[ids] = NAN

        def get_new_blocks(*arguments: Any, **options: Any) -> Any:
            blocks = take(*arguments, **options)
            spoil(blocks)
            return blocks

        def free_blocks(blocks: Iterable[Any], *arguments: Any, **options: Any) -> None:
            blocks = list(blocks)
            give(blocks, *arguments, **options)
            # What is kept for later prefixes stays as it is.
            spoil(b for b in blocks if not b.is_null and b.ref_cnt == 0 and b.block_hash is None)

        self.pool.get_new_blocks, self.pool.free_blocks = get_new_blocks, free_blocks
        spoil([self.pool.null_block, *self.pool.free_block_queue.get_all_free_blocks()])


class Reference:
    """The same model under transformers, and under a plan by `apply_plan`."""

    def __init__(self, folder: str, plan: Path | None) -> None:
        from transformers import AutoModelForCausalLM

        from moa_search import apply_plan

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if plan is not None:
            apply_plan(self.model, plan)

    @torch.no_grad()
    def run(self, prompt: Sequence[int], new: int) -> Tokens:
        """The prompt's continuation, greedy."""
        ids = torch.tensor([list(prompt)])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found: Tokens = output[0, len(prompt) :].tolist()
        return found

    def run_each(self, prompts: Iterable[Sequence[int]], new: int) -> list[Tokens]:
        """The continuation of each prompt, one by one."""
        return [self.run(prompt, new) for prompt in prompts]


def text_tokens(folder: str) -> Tokens:
    """Tokens of this project's documentation."""
    from transformers import AutoTokenizer

    docs = Path(__file__).parents[2] / "docs"
    names = ("results", "runtime", "concepts", "faq", "models", "search", "evaluation")
    text = "\n".join((docs / f"{name}.md").read_text() for name in names)
    tokens: Tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return tokens


def saved_under(folder: str, plan: Path, target: Path) -> Path:
    """A model's folder as `save_pretrained` leaves it under a plan."""
    from transformers import AutoModelForCausalLM

    from moa_search import apply_plan

    model = apply_plan(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), plan)
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(folder) / name, target / name)
    return target
