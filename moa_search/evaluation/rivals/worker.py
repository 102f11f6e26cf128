"""Answers items with kvpress's methods and transformers' quantised caches, in an environment of its own.

kvpress 0.5 needs transformers below 5.3 and this library 5.4 or newer, so both never share one: this file imports
nothing of moa_search and is run by the other environment's Python, ``python worker.py --items ITEMS --answers ANSWERS
--model MODEL --rivals ...``. `moa_search.evaluation.rivals.exchange` describes both files. Answers are appended one by
one and those that are there aren't computed again, so a stopped run goes on.

A context is read in one forward pass, as kvpress's own pipeline does, and compressed; then the question and the answer
follow in one more. Where the question is known, it is compressed with the context, but for its last token, so that no
method answers from the whole prompt. Compression doesn't change what that pass computes, so all methods share one: each
method's hook is called with what every layer's attention was given.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ANSWERS_SCHEMA = "moa-answers/1"

DONE = "item"
"""What a line of the output begins with that says how many are done."""

SCORERS = {
    "streaming-llm": "StreamingLLMPress",
    "snapkv": "SnapKVPress",
    "expected-attention": "ExpectedAttentionPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
    "compactor": "CompactorPress",
}
"""Presses that score every token and keep the same number of them in each head."""

SHARE_SCORES = ("streaming-llm", "compactor")
"""Those whose scores depend on the share of tokens that is kept."""

COMPRESSORS = (
    *SCORERS,
    *(f"adakv+{name}" for name in SCORERS),
    "kvzip",
    "kvzip-layer",
    "kvzip-head",
    "duo-attention",
)
"""Methods that keep a share of the tokens."""

CACHES = {"quantized-cache-4": 4, "quantized-cache-2": 2}
"""transformers' QuantizedCache with quanto as its backend, by bits."""

NAMES = ("full", *COMPRESSORS, *CACHES)
"""Of methods; ``full`` compresses nothing, and shows that both environments compute the same."""

DUO_SAMPLES, DUO_TOKENS = 50, 500
"""Texts that DuoAttention on the fly looks at, and tokens of each."""


def main() -> None:
    """Answer every item with every rival."""
    options = _options()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    lines = [json.loads(line) for line in options.items.read_text().splitlines()]
    items = [line for line in lines if "id" in line]
    texts: list[str] = next((line["texts"] for line in lines if "texts" in line), [])
    done = set()
    if options.answers.exists():
        whole = [line for line in options.answers.read_text().splitlines(keepends=True) if line.endswith("\n")]
        options.answers.write_text("".join(whole))  # a line that was cut off is computed again
        done = {(answer["rival"], answer["question"], answer["id"]) for answer in map(json.loads, whole)}
    wanted = {
        (question, item["id"]): [rival for rival in options.rivals if (rival, question, item["id"]) not in done]
        for question in options.questions
        for item in items
    }
    total = sum(bool(missing) for missing in wanted.values())
    if not total:
        return
    if any(rival.partition("@")[0] in COMPRESSORS for rivals in wanted.values() for rival in rivals):
        import kvpress  # noqa: F401  # before the model is loaded, for it may be missing
    methods, number = Methods(options, texts), 0
    with options.answers.open("a") as file:
        for question in options.questions:
            for item in items:
                missing = wanted[question, item["id"]]
                if missing:
                    number += 1
                    for answer in methods.answers(item, missing, question):
                        file.write(json.dumps(answer) + "\n")
                        file.flush()
                    print(f"{DONE} {number} of {total}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer items with kvpress's methods.")
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--gguf-file", help="file in that folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rivals", nargs="+", required=True, help="NAME or NAME@SHARE")
    parser.add_argument("--questions", nargs="+", default=["unknown", "known"], choices=["unknown", "known"])
    return parser.parse_args()


class Methods:
    """A model, and methods that compress what it keeps of a context."""

    def __init__(self, options: argparse.Namespace, texts: list[str]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
        dtype = getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa", **source)
        self._model = model.to(options.device).eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(options.model, **source)
        self._texts = texts
        self._versions = {name: found for name in ("kvpress", "transformers", "torch") if (found := _version(name))}

    def answers(self, item: dict[str, Any], rivals: list[str], question: str) -> Iterator[dict[str, Any]]:
        """Lines of the answers; see `moa_search.evaluation.rivals.exchange`."""
        import torch

        compressed, rest = list(item["context"]), list(item["question"])
        if question == "known":
            compressed, rest = compressed + rest[:-1], rest[-1:]
        with torch.no_grad():
            read = Read(self._model, compressed)
            scored: dict[str, Any] = {}
            for rival in rivals:
                name, _, share = rival.partition("@")
                torch.manual_seed(0)  # Compactor draws a sketch
                started = time.process_time()
                cache, found = self._compressed(read, name, float(share or 1), scored)
                seconds = time.process_time() - started + found.pop("shared_s", read.seconds + read.spared_s)
                found |= self._answer(cache, len(compressed), rest, item)
                yield {
                    "schema": ANSWERS_SCHEMA,
                    "id": item["id"],
                    "rival": rival,
                    "question": question,
                    **found,
                    "prefill_s": round(seconds, 3),
                    "versions": self._versions,
                }

    def _compressed(self, read: Read, name: str, share: float, scored: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        """A cache as a method leaves it, and what that costs."""
        from transformers import QuantizedCache

        read.forget_masks()
        read.spared_s = 0.0
        if name.startswith("kvzip"):
            return self._kvzip(read, name, share, scored)
        if name in CACHES:
            _unpack_plainly()
            return read.replayed(QuantizedCache("quanto", self._model.config, nbits=CACHES[name]))
        press = None if name == "full" else self._press(name, share, len(read.tokens))
        if press is not None:
            press.post_init_from_model(self._model)
            scorer = getattr(press, "press", press)
            if hasattr(scorer, "score"):
                scorer.score = read.scored_once(name.removeprefix("adakv+"), share, scorer.score)
        return read.replayed(None, None if press is None else press.forward_hook)

    def _answer(self, cache: Any, position: int, question: list[int], item: dict[str, Any]) -> dict[str, Any]:
        """What the model says of an answer that follows a question, or what it answers."""
        import torch

        if "generate" in item:
            given, ids = [], question
            for _ in range(item["generate"]):
                logits = self._forward(cache, position, ids)
                position += len(ids)
                ids = [int(logits[-1].argmax())]
                given += ids
                if self._is_enough(given, item):
                    break
            return {"generated": given}
        answer = item["answer"]
        logits = self._forward(cache, position, question + answer[:-1])[-len(answer) :].float()
        wanted = torch.tensor(answer).to(logits.device, non_blocking=True)
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        nll, correct = torch.stack([losses, (logits.argmax(-1) == wanted).float()]).tolist()
        return {"nll": [round(loss, 6) for loss in nll], "correct": list(map(int, correct))}

    def _is_enough(self, given: list[int], item: dict[str, Any]) -> bool:
        """Whether an answer may end before its item's number of tokens."""
        return False

    def _forward(self, cache: Any, position: int, tokens: list[int]) -> Any:
        """Logits ``[token, vocabulary]`` after tokens that follow what a cache holds."""
        import torch

        before = [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
        ids = torch.tensor([tokens]).to(self._model.device, non_blocking=True)
        at = torch.arange(position, position + len(tokens), device=ids.device)[None]

        def logits() -> Any:
            return self._model(input_ids=ids, past_key_values=cache, position_ids=at).logits[0]

        def cut() -> None:
            for layer, length in zip(cache.layers, before, strict=True):
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

        with _guessing() as failed:
            found = logits()
        if not failed or not torch.stack(failed).any():
            return found
        cut()
        try:
            return logits()
        except ValueError as error:  # kvpress finds no key that all of these queries pass over
            if "fake keys" not in str(error) or len(tokens) == 1:
                raise
        cut()
        return torch.cat([self._forward(cache, position + at, [token]) for at, token in enumerate(tokens)])

    def _press(self, name: str, share: float, tokens: int) -> Any:
        import kvpress

        if name.startswith("adakv+"):
            return kvpress.AdaKVPress(self._press(name.removeprefix("adakv+"), share, tokens))
        if name == "duo-attention":
            return self._duo_attention(share, tokens)
        # Without this epsilon, which kvpress's own board has, its values' norms decide alone where attention is small.
        options = {"epsilon": 1e-2} if name == "expected-attention" else {}
        return getattr(kvpress, SCORERS[name])(compression_ratio=1 - share, **options)

    def _kvzip(self, read: Read, name: str, share: float, scored: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        """KVzip's scores, which all of its variants and shares have in common, and what one of them masks."""
        from kvpress.presses.kvzip_press import KVzipPress

        shared = read.seconds + scored.get("s", 0)
        if not scored:
            started = time.process_time()
            press = KVzipPress()  # of no ratio: nothing is masked yet
            press._context_ids, press._cache = read.ids, read.cache()
            # What follows a context in KVzip's own prompt where there is no chat template; items are plain text.
            press._suffix_ids = self._tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
            watch = Watch(self._model, press._cache)
            with watch:
                press._perform_kvzip_compression(self._model, self._tokenizer)
            press.score_val = press.score_val.cpu()  # where what is masked is chosen: layer by layer, it would wait
            scored |= {"press": press, "watch": watch, "s": time.process_time() - started}
            read.forget_masks()
        press, watch = scored["press"], scored["watch"]
        press.compression_ratio, press.layerwise = 1 - share, name == "kvzip-layer"
        if name == "kvzip-head":
            _mask_per_head(self._model, press.score_val, press.n_sink, 1 - share)
        else:
            press.compress_post(self._model)
        cache, found = read.replayed(None)
        found["peak"] = round(watch.peak / read.dense, 6)
        found["extra_passes"] = round(watch.read / len(read.tokens), 6)
        return cache, {**found, "shared_s": shared}

    def _duo_attention(self, share: float, tokens: int) -> Any:
        """DuoAttention by kvpress's scores of heads on the fly, over texts of ours in place of BookSum's."""
        from kvpress.presses import duo_attention_press

        class Duo(duo_attention_press.DuoAttentionPress):  # type: ignore[misc]
            """Its own 128 + 256 tokens in streaming heads, or a quarter of the share where that is less."""

            def post_init_from_model(self, model: Any) -> None:
                kept = min(384, max(8, int(share * tokens / 4)))
                self.head_compression_ratio = min(1.0, (1 - share) / (1 - kept / tokens))
                super().post_init_from_model(model)
                self.sink_size, self.recent_size = kept // 3, kept - kept // 3

        duo_attention_press.AutoTokenizer = Given(self._tokenizer)
        duo_attention_press.load_dataset = lambda *names, **options: Texts(self._texts)
        return Duo(on_the_fly_scoring=True)


class Given:
    """Stands for a class of transformers whose ``from_pretrained`` gives what is there already."""

    def __init__(self, tokenizer: Any) -> None:
        self.from_pretrained = lambda *names, **options: tokenizer


class Texts:
    """Stands for a data set of one column, ``chapter``."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def to_pandas(self) -> Any:
        """The texts as a frame."""
        import pandas as pd

        return pd.DataFrame({"chapter": self._texts})


class Read:
    """A context that was read once, without compression.

    Attributes:
        tokens: Its token ids.
        ids: The same, ``[1, token]``.
        seconds: CPU time of the pass.
        spared_s: CPU time that the method at work would have taken for scores that were there.
        dense: Bytes of its keys and values.
    """

    def __init__(self, model: Any, tokens: list[int]) -> None:
        import torch
        from transformers import DynamicCache

        self.tokens = tokens
        self.ids = torch.tensor([tokens], device=model.device)
        self._config, self._layers = model.config, _attentions(model)
        self._calls: list[tuple[dict[str, Any], Any]] = []
        self._scores: dict[tuple[str, float, int], tuple[Any, float]] = {}
        self.spared_s = 0.0
        self._positions = torch.arange(len(tokens))
        for layer in self._layers:
            layer.rotary_emb = model.model.rotary_emb  # as presses put it there
        hooks = [layer.register_forward_hook(self._remember, with_kwargs=True) for layer in self._layers]
        started = time.process_time()
        self._cache = DynamicCache(config=model.config)
        model.model(input_ids=self.ids, past_key_values=self._cache)
        self.seconds = time.process_time() - started
        for hook in hooks:
            hook.remove()
        self.dense = _cache_bytes(self._cache)

    def forget_masks(self) -> None:
        """Unmask what a method has masked."""
        for layer in self._layers:
            layer.masked_key_indices = None

    def cache(self) -> Any:
        """A cache of the whole context; what is added to it isn't added to others."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._config)
        for number, layer in enumerate(self._cache.layers):
            cache.update(layer.keys, layer.values, number)
        return cache

    def scored_once(self, name: str, share: float, score: Callable[..., Any]) -> Callable[..., Any]:
        """A press's scores, each layer's worked out once for all methods and shares that have them in common."""
        share = share if name in SHARE_SCORES else 0.0

        def scores(module: Any, *arguments: Any, **options: Any) -> Any:
            key = name, share, int(module.layer_idx)
            if key in self._scores:
                self.spared_s += self._scores[key][1]
            else:
                started = time.process_time()
                self._scores[key] = score(module, *arguments, **options), time.process_time() - started
            return self._scores[key][0].clone()  # AdaKV writes into them

        return scores

    def replayed(self, cache: Any, hook: Any = None) -> tuple[Any, dict[str, float]]:
        """A cache that was filled layer by layer, each compressed by a press's hook as attention leaves it.

        Args:
            cache: An empty one; by default one that keeps all.
            hook: Of a press.

        Returns:
            The cache; and in shares of the whole context the tokens that are ``kept``, the bytes that are ``held`` and
            those at the ``peak``.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self._config) if cache is None else cache
        held = peak = 0
        for number, (layer, (options, output)) in enumerate(zip(self._layers, self._calls, strict=True)):
            whole = self._cache.layers[number]
            cache.update(whole.keys, whole.values, number)
            # Attention has all of this layer's keys and values in hand, whatever the cache makes of them.
            peak = max(peak, held + whole.keys.nbytes + whole.values.nbytes)
            if hook is not None:
                hook(layer, [], {**options, "past_key_values": cache}, output)
            held += _layer_bytes(cache.layers[number])
        counts = [cache.get_seq_length(number) for number in range(len(self._layers))]
        masks = [getattr(layer, "masked_key_indices", None) for layer in self._layers]
        heads = self._config.num_key_value_heads
        self._settle_masks()
        kept = sum(counts) * heads - sum(len(mask[0]) for mask in masks if mask is not None)
        return cache, {
            "kept": round(kept / (len(counts) * heads * len(self.tokens)), 6),
            "held": round(held / self.dense, 6),
            "peak": round(peak / self.dense, 6),
            "extra_passes": 0.0,
        }

    def _settle_masks(self) -> None:
        """Bring what presses have masked to the model's device, in one go."""
        import torch

        masked = [layer for layer in self._layers if getattr(layer, "masked_key_indices", None) is not None]
        if not masked:
            return
        parts = [torch.stack(layer.masked_key_indices[1:]) for layer in masked]  # each [head or token, masked]
        moved = torch.cat(parts, 1).to(self.ids.device, non_blocking=True)
        for layer, part in zip(masked, moved.split([part.shape[1] for part in parts], 1), strict=True):
            layer.masked_key_indices = (torch.zeros_like(part[0]), *part)

    def _remember(self, module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        # Each press asks every layer whether these are the first: on a CPU, so that none waits for a GPU.
        self._calls.append(({**options, "cache_position": self._positions}, (output[0], None)))


class Watch:
    """Bytes of a cache at most, and tokens read, while a model goes on with it.

    Attributes:
        peak: Bytes.
        read: Tokens.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self._layers, self._cache = _attentions(model), cache
        self.peak = self.read = 0

    def __enter__(self) -> Watch:
        # Registered before a press's own hooks: a layer is looked at as attention leaves it.
        self._hooks = [layer.register_forward_hook(self._look, with_kwargs=True) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        self.peak = max(self.peak, _cache_bytes(self._cache))
        if module is self._layers[0]:
            self.read += options["hidden_states"].shape[1]


@contextmanager
def _guessing() -> Iterator[list[Any]]:
    """Have kvpress take its first guess at a key that no query sees, which is enough in most cases, without looking.

    Looking, in every layer, makes the CPU wait for a GPU; once for a pass is enough.

    Yields:
        Of every guess, whether it failed, on the model's device; to be read after the block.
    """
    failed: list[Any] = []
    patch = sys.modules.get("kvpress.attention_patch")
    if patch is None:
        yield failed
        return
    search = patch.search_hyperplane

    def guess(queries: Any, *rest: Any, **options: Any) -> Any:
        """See kvpress's ``search_hyperplane``, of which this is the first round."""
        import torch

        if queries.dtype == torch.float16:
            return search(queries, *rest, **options)
        plane = queries.mean(1)
        failed.append((torch.bmm(queries, plane.unsqueeze(-1)) <= 0).any())
        return -1e5 * plane / plane.norm(dim=-1, keepdim=True) ** 2

    patch.search_hyperplane = guess  # type: ignore[attr-defined]
    try:
        yield failed
    finally:
        patch.search_hyperplane = search  # type: ignore[attr-defined]


def _unpack_plainly() -> None:
    """Let quanto unpack codes on a GPU by its plain code: its own kernel would be compiled first, for minutes."""
    import torch
    from optimum.quanto.library.extensions.extension import get_extension, is_extension_available

    if not is_extension_available("quanto_cuda"):
        return

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        mask = 2**bits - 1
        return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])

    get_extension("quanto_cuda")._lib = SimpleNamespace(unpack=unpack)


def _mask_per_head(model: Any, scores: Any, sink: int, ratio: float) -> None:
    """Mask the same number of tokens in every head, by scores ``[layer, 1, kv_head, token]``."""
    import torch

    scores[..., :sink] = scores.amax() + 1
    pruned = int(scores.shape[-1] * ratio)
    for layer, of_layer in zip(_attentions(model), scores, strict=True):
        indices = torch.topk(-of_layer[0].float(), pruned, dim=-1).indices  # [kv_head, pruned]
        heads = torch.arange(len(indices)).repeat_interleave(pruned)
        layer.masked_key_indices = (torch.zeros_like(heads), heads, indices.flatten())


def _attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _cache_bytes(cache: Any) -> int:
    return sum(map(_layer_bytes, cache.layers))


def _layer_bytes(layer: Any) -> int:
    return sum(_nbytes(part) for part in vars(layer).values())


def _nbytes(part: Any) -> int:
    """Bytes of a tensor; of a quantised one, of its codes, scales and shifts."""
    import torch

    if not isinstance(part, torch.Tensor):
        return 0
    inner = [getattr(part, name, None) for name in ("_data", "_scale", "_shift")]
    if any(isinstance(tensor, torch.Tensor) for tensor in inner):
        return sum(_nbytes(tensor) for tensor in inner)
    return part.nbytes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
