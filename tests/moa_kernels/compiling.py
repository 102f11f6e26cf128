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
from dataclasses import dataclass, field
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
    report: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Callable[[str], Iterator[Case]]] = {}


def influence_cases(arch: str) -> Iterator[Case]:
    """All three kernels as launched for long samples, and at head_dim 128 as for short ones and with all options."""
    from moa_kernels.influence.kernel import aligned_kernel, banded_kernel, row_statistics_kernel
    from moa_kernels.influence.launcher import tiling
    from moa_kernels.launch import padded, table_config

    tensors = ("Q", "K", "V", "GRAD")
    pointers = dict.fromkeys(tensors, "*bf16") | {"ROWS": "*fp32", "PARTIAL": "*fp32"}
    pointers |= dict.fromkeys(("PASSED", "NEXT", "WINDOWS"), "*i32")
    kernels = {"aligned": (aligned_kernel, 64), "banded": (banded_kernel, 1), "rows": (row_statistics_kernel, 1)}
    shapes = [(head_dim, 4096, False) for head_dim in HEAD_DIMS] + [(128, 64, False), (128, 4096, True)]
    for head_dim, bucket_rows, extras in shapes:
        config = table_config("influence", arch, head_dim, 2)
        for name, (kernel, unit) in kernels.items():
            cut = config if name == "rows" else tiling(config, [unit], bucket_rows)
            strides = tuple(argument for argument in kernel.arg_names if argument.startswith("stride_"))
            types = {argument: pointers.get(argument, "i32") for argument in kernel.arg_names} | {"scale": "fp32"}
            constants = {"CAP": 30.0 if extras else None, "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
            constants |= {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "UPCAST": False}
            constants |= {} if extras else {"SINK_LOGITS": None}
            constants |= {} if name == "rows" else {"LANES": cut.lanes(int(arch[3]))}
            types |= {"SINK_LOGITS": "*fp32"}
            types = {argument: kind for argument, kind in types.items() if argument not in constants}
            yield Case(
                f"influence-{name}-{head_dim}-{cut.block_m}x{cut.block_n}{'-extras' if extras else ''}", kernel, types,
                constants, aligned=(*tensors, "ROWS", *strides), num_warps=cut.num_warps, num_stages=cut.num_stages,
                max_registers=cut.max_registers,
            )  # fmt: skip


CASES["influence"] = influence_cases


def compiled(case: Case, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory and counts of instructions."""
    import triton
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
    kernel = triton.compile(source, target=target, options=options)
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
    kernels = str(Path(__file__).parents[2] / "kernels")
    return {**clean, "PYTHONPATH": os.pathsep.join([kernels, clean.get("PYTHONPATH", "")])}


if __name__ == "__main__":
    for case in CASES[sys.argv[1]](sys.argv[2]):
        print(json.dumps(compiled(case, sys.argv[2])), flush=True)
