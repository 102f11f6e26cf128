"""Compile kernels for GPUs on a machine without one, and read what the assembler made of them.

As a program: ``python compiling.py KERNEL ARCH`` compiles `CASES`[KERNEL] for ``sm_80`` or ``sm_90`` and prints one
JSON object per case. A process of its own, since Triton's interpreter replaces the compiler for a whole process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass
class Case:
    """One kernel, specialised.

    Attributes:
        name: Shown in tests.
        kernel: A ``triton.jit`` function.
        types: Triton type of each argument that isn't a constant, such as ``"*bf16"`` or ``"i32"``.
        constants: Values of ``constexpr`` arguments, and of arguments that are 1 or None.
        aligned: Arguments that 16 divides.
        num_warps: Warps of a program.
        num_stages: Pipeline stages.
        tensor_cores: Whether it must use them.
        max_registers: Per thread, or None.
        spills: Most loads and stores of spilled registers, where they were measured to cost less than smaller tiles.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = True
    max_registers: int | None = None
    spills: int = 0


CASES: dict[str, Callable[[str], Iterator[Case]]] = {}


def prefill_cases(arch: str) -> Iterator[Case]:
    from moa_kernels.launch import padded, table_config
    from moa_kernels.prefill.kernel import merge_kernel, prefill_kernel
    from moa_kernels.prefill.launch import MERGE_ROWS

    tensors = ("query", "key", "value", "output")
    pointers = dict.fromkeys(tensors, "*bf16") | {"lse": "*fp32", "work": "*i32", "spans": "*i32", "shared": "*i32"}
    pointers |= dict.fromkeys(("partial", "totals", "tops"), "*fp32")
    optional = {"starts": "*i32", "ends": "*i32", "sink_logits": "*bf16"}

    def types_of(kernel: Any, extras: bool) -> dict[str, str]:
        known = pointers | {"scale": "fp32"} | optional
        names = [name for name in kernel.arg_names if name.islower() and (extras or name not in optional)]
        return {name: known.get(name, "i32") for name in names}

    def aligned(kernel: Any) -> tuple[str, ...]:
        return tuple(name for name in kernel.arg_names if name in pointers or name.endswith("_stride"))

    for dim in HEAD_DIMS:
        config = table_config("prefill", arch, dim, 2)
        shape = {"HEAD_DIM": dim, "BLOCK_M": config.block_m, "BLOCK_D": padded(dim)}
        for extras in (False, True):  # padding, soft cap, sink logits and shared work, or none of them
            flags = dict.fromkeys(("HAS_STARTS", "HAS_ENDS", "HAS_SINK_LOGITS"), extras)
            constants = shape | flags | ({} if extras else dict.fromkeys(optional))
            yield Case(
                f"prefill-{dim}{'-extras' if extras else ''}",
                prefill_kernel,
                types_of(prefill_kernel, extras),
                constants
                | {"GROUP": 4, "BLOCK_N": config.block_n, "SOFTCAP": 30.0 if extras else 0.0, "SPLIT": extras}
                | {"UPCAST": False, "PRECISION": "tf32", "STAGES": config.num_stages},
                aligned(prefill_kernel),
                config.num_warps,
                config.num_stages,
            )
        if dim not in (64, 128, 256):
            continue  # padded like 128
        yield Case(
            f"prefill-merge-{dim}",
            merge_kernel,
            types_of(merge_kernel, False),
            shape
            | {"ROWS": MERGE_ROWS}
            | dict.fromkeys(optional)
            | dict.fromkeys(("HAS_STARTS", "HAS_ENDS", "HAS_SINK_LOGITS"), False),
            aligned(merge_kernel),
            tensor_cores=False,
        )


CASES["prefill"] = prefill_cases


def decode_cases(arch: str) -> Iterator[Case]:
    """One new token under GQA 4; eight under GQA 8, all options on, which fill tiles of rows; float32; many pairs."""
    from moa_kernels.decode.kernel import merge_kernel, split_kernel
    from moa_kernels.decode.launch import MERGED_AT_ONCE, rows_and_warps
    from moa_kernels.launch import padded, table_config

    pointers = dict.fromkeys(("layout", "spans", "ends"), "*i32") | {"lens": "*i64"}
    pointers |= dict.fromkeys(("sink_logits", "lse", "partial", "tops", "totals"), "*fp32")
    tensors = ("query", "keys", "values", "output")
    variants = [(head_dim, "bf16", 4, 1, 128) for head_dim in HEAD_DIMS]
    variants += [(head_dim, "bf16", 8, 8, 128) for head_dim in HEAD_DIMS]
    variants += [(head_dim, "fp32", 4, 1, 128) for head_dim in (64, 128, 256)]
    variants += [(128, "bf16", 4, 1, 8192)]
    for head_dim, dtype, group, new, pairs in variants:
        itemsize = 4 if dtype == "fp32" else 2
        config = table_config("decode", arch, head_dim, itemsize)
        block_m, num_warps = rows_and_warps(config, group * new, itemsize)
        types = pointers | dict.fromkeys(tensors, f"*{dtype}") | {"scale": "fp32"}
        strides = [name for name in split_kernel.arg_names if name.endswith("_stride")]
        types |= dict.fromkeys(("sliding_window", "pairs", "num_kv_heads", *strides), "i32")
        constants = {
            "TARGET_TILES": 792, "PLANS": max(pairs // 1024, 1), "BLOCK_P": min(pairs, 1024), "GROUP": group,
            "NEW": new, "HEAD_DIM": head_dim, "SOFTCAP": 30.0 if new > 1 else 0.0, "HAS_SINK_LOGITS": new > 1,
            "UPCAST": False,
            "BLOCK_M": block_m,
            "BLOCK_N": config.block_n, "BLOCK_D": padded(head_dim),
        }  # fmt: skip
        note = f"decode-{head_dim}-{dtype}-{group}x{new}-{pairs}"
        yield Case(
            note, split_kernel, types, constants, aligned=(*tensors, "partial", *strides),
            num_warps=num_warps, num_stages=config.num_stages, tensor_cores=dtype != "fp32",
        )  # fmt: skip
        if new == 1 and pairs == 128:
            names = [name for name in merge_kernel.arg_names if name.islower()]
            constants = {
                "ROWS": group * new, "NEW": new, "HEAD_DIM": head_dim, "HAS_SINK_LOGITS": True,
                "BLOCK_T": MERGED_AT_ONCE, "BLOCK_D": padded(head_dim),
            }  # fmt: skip
            yield Case(
                f"merge-{head_dim}-{dtype}", merge_kernel, {name: types[name] for name in names}, constants,
                aligned=("partial", "output"), tensor_cores=False,
            )  # fmt: skip


def append_cases(arch: str) -> Iterator[Case]:
    """A decoding step and a prefill of 16-bit keys and values, with padding."""
    from moa_kernels.append.kernel import append_kernel
    from moa_kernels.append.launch import DECODE_TOKENS, PREFILL_TOKENS
    from moa_kernels.launch import padded

    names = [name for name in append_kernel.arg_names if name.islower()]
    states = ("keys", "values", "new_keys", "new_values")
    strides = tuple(name for name in names if name.endswith("_stride"))
    types = dict.fromkeys(names, "i32") | dict.fromkeys(states, "*i16") | {"layout": "*i32"}
    types |= {"lens": "*i64", "counts": "*i64"}
    for head_dim in HEAD_DIMS:
        for tokens in (DECODE_TOKENS, PREFILL_TOKENS):
            constants = {"HAS_COUNTS": True, "KEY_DIM": head_dim, "VALUE_DIM": head_dim, "BLOCK_T": tokens}
            constants |= {"BLOCK_K": padded(head_dim), "BLOCK_V": padded(head_dim)}
            yield Case(
                f"append-{head_dim}-{tokens}", append_kernel, types, constants, aligned=(*states, *strides),
                tensor_cores=False,
            )  # fmt: skip


CASES["decode"] = decode_cases
CASES["append"] = append_cases


CODED = [
    (128, "bf16", 4, 1, "4-4"),
    (64, "bf16", 4, 1, "4-4"),
    (128, "bf16", 4, 1, "8-4 2-2"),
]
"""Head dimension, type, query heads per KV head, new tokens, and the layer's tiers."""


def coded_decode_cases(arch: str) -> Iterator[Case]:
    """Tiers alone and many in one launch; few rows, and so many that they fill several tiles."""
    from moa_kernels.coded.decode_kernel import merge_kernel, split_kernel
    from moa_kernels.coded.launch import MERGED_AT_ONCE, OVERHEAD_BYTES, RADIX, tier_mask
    from moa_kernels.launch import padded, table_config

    pointers = dict.fromkeys(("layout", "spans", "ends", "order"), "*i32") | {"lens": "*i64", "codes": "*i64"}
    floats = ("back_sizes", "means", "angles", "partial", "tops", "totals", "sink_logits", "plain", "coded", "lse")
    pointers |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(("back", "key_scales", "value_scales"), "*fp16")
    pointers |= dict.fromkeys(("key_codes", "value_codes"), "*u8")
    tensors = ("query", "plain_keys", "plain_values", "key_sinks", "value_sinks")
    aligned = (*tensors, "key_codes", "value_codes", "back", "means", "angles", "partial", "key_codes_stride")
    for head_dim, dtype, group, new, tiers in CODED:
        config = table_config("coded_decode", arch, head_dim, 2)
        block_m = min(config.block_m, max(16, group * new))
        types = pointers | dict.fromkeys(tensors, f"*{dtype}") | {"scale": "fp32"}
        shape = {"GROUP": group, "NEW": new, "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
        constants = {
            "TIERS": tier_mask(tuple(map(int, tier.split("-"))) for tier in tiers.split()),  # type: ignore[misc]
            "TARGET_TILES": 792, "PLANS": 1, "OVERHEAD": OVERHEAD_BYTES, "BLOCK_P": 128, "ITEMSIZE": 2,
            "SOFTCAP": 30.0 if new > 1 else 0.0, "RADIX": RADIX, "UPCAST": False, "STAGES": config.num_stages,
            "BLOCK_M": block_m, "BLOCK_N": config.block_n,
        }  # fmt: skip
        yield Case(
            f"coded-decode-{head_dim}-{dtype}-{group}x{new}-{tiers}", split_kernel,
            {name: types.get(name, "i32") for name in split_kernel.arg_names if name.islower()}, shape | constants,
            (*aligned, "value_codes_stride"), config.num_warps * (2 if block_m > 16 else 1), config.num_stages,
            spills=80 if head_dim == 128 and arch == "sm_90" else 0,
        )  # fmt: skip
        if tiers == "4-4":
            names = [name for name in merge_kernel.arg_names if name.islower()]
            yield Case(
                f"coded-merge-{head_dim}", merge_kernel, {name: types.get(name, "i32") for name in names},
                shape | {"HAS_SINK_LOGITS": True, "BLOCK_T": MERGED_AT_ONCE}, ("partial", "plain", "coded"),
                tensor_cores=False,
            )  # fmt: skip


def coded_append_cases(arch: str) -> Iterator[Case]:
    """A decoding step, with padding."""
    from moa_kernels.coded.append_kernel import append_kernel
    from moa_kernels.coded.launch import RADIX, ROWS_AT_ONCE
    from moa_kernels.launch import padded

    names = [name for name in append_kernel.arg_names if name.islower()]
    types = dict.fromkeys(names, "i32") | dict.fromkeys(("lens", "counts", "codes"), "*i64") | {"layout": "*i32"}
    types |= dict.fromkeys(("key_into", "value_into", "mean", "angles", "digit_sizes"), "*fp64")
    types |= {"order": "*i32", "digits": "*i64"}
    types |= dict.fromkeys(("key_codes", "value_codes"), "*u8") | dict.fromkeys(("key_scales", "value_scales"), "*fp16")
    states = ("new_keys", "new_values", "plain_keys", "plain_values", "key_sinks", "value_sinks")
    types |= dict.fromkeys(states, "*bf16")
    for width in HEAD_DIMS:
        constants = {"HAS_COUNTS": True, "WIDTH": width, "ITEMSIZE": 2, "RADIX": RADIX, "BLOCK_D": padded(width)}
        constants |= {"BLOCK_E": padded(width) // 8, "BLOCK_R": ROWS_AT_ONCE}
        yield Case(
            f"coded-append-{width}", append_kernel, types, constants, (*states, "key_into", "value_into"),
            tensor_cores=False,
        )  # fmt: skip


def states_cases(arch: str) -> Iterator[Case]:
    """New tokens as codes give them back, and what a cache holds."""
    from moa_kernels.coded.launch import RADIX, ROWS_AT_ONCE
    from moa_kernels.coded.states_kernel import see_kernel, stored_kernel
    from moa_kernels.launch import padded

    states = ("keys", "values", "seen_keys", "seen_values", "out_keys", "out_values", "plain_keys", "plain_values")
    states += ("key_sinks", "value_sinks")
    pointers = dict.fromkeys(states, "*bf16") | dict.fromkeys(("positions", "codes", "lens"), "*i64")
    pointers |= dict.fromkeys(("key_into", "value_into", "mean", "angles", "digit_sizes"), "*fp64")
    pointers |= dict.fromkeys(("key_back", "value_back"), "*fp32") | {"layout": "*i32"}
    pointers |= {"order": "*i32", "digits": "*i64"}
    pointers |= dict.fromkeys(("key_codes", "value_codes"), "*u8")
    pointers |= dict.fromkeys(("key_scales", "value_scales"), "*fp16")
    for width in (64, 80, 128):
        shape = {"WIDTH": width, "RADIX": RADIX, "BLOCK_D": padded(width), "BLOCK_E": padded(width) // 8}
        for kernel, more in ((see_kernel, {}), (stored_kernel, {"ITEMSIZE": 2})):
            names = [name for name in kernel.arg_names if name.islower()]
            yield Case(
                f"{kernel.__name__}-{width}", kernel, {name: pointers.get(name, "i32") for name in names},
                shape | {"BLOCK_R": ROWS_AT_ONCE} | more, ("key_back", "value_back"),
                tensor_cores=False,
            )  # fmt: skip


CASES["coded_decode"] = coded_decode_cases
CASES["coded_states"] = states_cases
CASES["coded_append"] = coded_append_cases


def influence_cases(arch: str) -> Iterator[Case]:
    """All three kernels as for long samples; at head_dim 128 as for short ones, and with each option, too."""
    from moa_kernels.influence.kernel import aligned_kernel, banded_kernel, row_statistics_kernel
    from moa_kernels.influence.launch import lanes, tiling
    from moa_kernels.launch import padded, table_config

    tensors = ("query", "key", "value", "grad_out")
    pointers = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(("rows", "moved", "partial"), "*fp32")
    pointers |= dict.fromkeys(("passed", "following", "windows"), "*i32")
    kernels = {"aligned": (aligned_kernel, 64), "banded": (banded_kernel, 1), "rows": (row_statistics_kernel, 1)}
    shapes = [(head_dim, 4096, None, False, False) for head_dim in HEAD_DIMS]
    shapes += [(128, 64, None, False, False), (128, 4096, 30.0, False, False), (64, 4096, None, True, False)]
    shapes += [(128, 4096, None, True, False), (128, 4096, None, False, True)]
    for head_dim, bucket_rows, softcap, has_logits, has_moved in shapes:
        config = table_config("influence", arch, head_dim, 2)
        for name, (kernel, unit) in kernels.items():
            if has_moved and name == "rows":
                continue
            cut = config if name == "rows" else tiling(config, [unit], bucket_rows, capped=softcap is not None)
            strides = tuple(argument for argument in kernel.arg_names if argument.endswith("_stride"))
            types = {argument: pointers.get(argument, "i32") for argument in kernel.arg_names} | {"scale": "fp32"}
            constants = {
                "SOFTCAP": softcap or 0.0,
                "HAS_SINK_LOGITS": has_logits,
                "HEAD_DIM": head_dim,
                "BLOCK_D": padded(head_dim),
            }
            constants |= {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "UPCAST": False}
            constants |= {} if has_logits else {"sink_logits": None}
            if name != "rows":
                constants |= {"LANES": lanes(cut.block_m, int(arch[3])), "HAS_MOVED": has_moved}
                constants |= {} if has_moved else {"moved": None}
            types |= {"sink_logits": "*fp32"}
            types = {argument: kind for argument, kind in types.items() if argument not in constants}
            option = "-softcap" * (softcap is not None) + "-logits" * has_logits + "-moved" * has_moved
            yield Case(
                f"influence-{name}-{head_dim}-{cut.block_m}x{cut.block_n}{option}", kernel, types,
                constants, aligned=(*tensors, "rows", *strides), num_warps=cut.num_warps, num_stages=cut.num_stages,
                max_registers=cut.max_registers,
            )  # fmt: skip


CASES["influence"] = influence_cases


def coded_influence_cases(arch: str) -> Iterator[Case]:
    """Three codecs a side; at head_dim 128 one, and each option, too."""
    from moa_kernels.coded_influence.kernel import coded_rows_kernel as kernel
    from moa_kernels.influence.launch import lanes
    from moa_kernels.launch import padded, table_config

    tensors = ("query", "keys", "values", "grad_out")
    strides = tuple(name for name in kernel.arg_names if name.endswith("_stride"))
    pointers = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(("rows", "sink_logits"), "*fp32") | {"scale": "fp32"}
    shapes = [(head_dim, 4, None, False) for head_dim in (64, 96, 128, 256)]
    shapes += [(128, 2, None, False), (128, 4, 30.0, False), (128, 4, None, True)]
    for head_dim, pairs, softcap, has_logits in shapes:
        config = table_config("coded_influence", arch, head_dim, 2)
        constants = {
            "SOFTCAP": softcap or 0.0, "HAS_SINK_LOGITS": has_logits, "HEAD_DIM": head_dim,
            "BLOCK_D": padded(head_dim), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PAIRS": pairs,
            "PADDED": 1 << (pairs - 1).bit_length(), "LANES": lanes(config.block_m, int(arch[3])), "UPCAST": False,
        }  # fmt: skip
        constants |= {} if has_logits else {"sink_logits": None}
        names = [name for name in kernel.arg_names if name not in constants]
        option = "-softcap" * (softcap is not None) + "-logits" * has_logits
        yield Case(
            f"coded-influence-{head_dim}-{pairs}{option}", kernel, {name: pointers.get(name, "i32") for name in names},
            constants, aligned=(*tensors, "rows", *strides), num_warps=config.num_warps,
            num_stages=config.num_stages, max_registers=config.max_registers,
        )  # fmt: skip


CASES["coded_influence"] = coded_influence_cases


def pages_cases(arch: str) -> Iterator[Case]:
    """The vLLM plug-in's: prefill and decoding steps of Llama-3's shape and others, the merge, the store."""
    import torch
    from moa_kernels.launch import padded

    from moa_vllm.kernel import attend_kernel, merge_kernel, store_kernel
    from moa_vllm.launch import STEP, settings_for

    tables = dict.fromkeys(("pages", "tables", "table_strides", "slots"), "*i64")
    pointers = tables | dict.fromkeys(("partial", "tops", "totals"), "*fp32")
    pointers |= dict.fromkeys(("starts", "lengths", "rules", "shares", "parts"), "*i32")
    pointers |= dict.fromkeys(("output", "query", "keys", "values"), "*bf16") | {"scale": "fp32"}

    def types_of(kernel: Any) -> dict[str, str]:
        return {name: pointers.get(name, "i32") for name in kernel.arg_names if name.islower()}

    def aligned(kernel: Any) -> tuple[str, ...]:
        strides = [name for name in kernel.arg_names if name.endswith("_stride")]
        return (*strides, *(name for name in ("output", "query", "keys", "values") if name in kernel.arg_names))

    for dim in HEAD_DIMS:
        shape = {"HEAD_DIM": dim, "BLOCK_D": padded(dim)}
        for name, decoding in (("prefill", False), ("decoding", True)):
            settings = settings_for(dim, torch.bfloat16, decoding=decoding)
            constants = {"GROUP": 4, "PAGE": 16, "QUERIES": settings.queries, "ROWS": max(16, 4 * settings.queries)}
            constants |= shape | {"TILE": settings.tile, "SPLIT": decoding, "PRECISION": "tf32"}
            yield Case(
                f"pages-{name}-{dim}", attend_kernel, types_of(attend_kernel), constants, aligned(attend_kernel),
                num_warps=settings.warps, num_stages=settings.stages,
            )  # fmt: skip
        yield Case(
            f"pages-merge-{dim}", merge_kernel, types_of(merge_kernel),
            shape | {"GROUP": 4, "MOST": 256, "STEP": STEP},
            aligned(merge_kernel), tensor_cores=False,
        )  # fmt: skip
        yield Case(
            f"pages-store-{dim}", store_kernel, types_of(store_kernel), shape | {"PAGE": 16},
            aligned(store_kernel), tensor_cores=False,
        )  # fmt: skip


CASES["pages"] = pages_cases


def compiled(case: Case, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory and counts of instructions."""
    import triton
    from moa_kernels.launch import COMPILER_OPTIONS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.types) | set(case.constants))
    assert not missing, f"{case.name}: arguments {sorted(missing)} are unaccounted for"
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.max_registers}
    kernel = triton.compile(source, target=target, options=options | COMPILER_OPTIONS)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, assembly = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?SHARED:(\d+).*?LOCAL:(\d+)", usage)
    assert found, usage
    counts = {name: len(re.findall(rf"\b{name}\b", assembly)) for name in ("HGMMA", "HMMA", "LDL", "STL", "LDGSTS")}
    return {
        "case": case.name,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[4]),
        "shared": int(kernel.metadata.shared),
        "spills": counts["LDL"] + counts["STL"],
        "tensor_core_instructions": counts["HGMMA"] + counts["HMMA"],
        "asynchronous_copies": counts["LDGSTS"],
        "needs_tensor_cores": case.tensor_cores,
        "most_spills": case.spills,
    }


def reports(kernel: str, arch: str) -> list[dict[str, Any]]:
    """What `compiled` says of every case, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, kernel, arch],
        capture_output=True, text=True, env=_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _environment() -> dict[str, str]:
    import os

    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(Path(__file__).parents[2] / name) for name in ("kernels", "vllm-plugin", ".")]
    return {**clean, "PYTHONPATH": os.pathsep.join([*folders, clean.get("PYTHONPATH", "")])}


if __name__ == "__main__":
    for case in CASES[sys.argv[1]](sys.argv[2]):
        print(json.dumps(compiled(case, sys.argv[2])), flush=True)
