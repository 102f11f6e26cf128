"""Tile sizes, warps and pipeline stages of each kernel, per architecture and head dimension.

Looked up in this order: `overridden`, the file that ``python -m moa_kernels.tune`` writes for a device, `TABLE`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moa_kernels.backends import interpreting

COMPILER_OPTIONS = {"enable_fp_fusion": True}
"""Passed with every launch: Triton 3.9 warns where it's left out, later versions change its default."""


@dataclass(frozen=True)
class LaunchConfig:
    """How to launch one kernel.

    Attributes:
        block_m: Query rows of a tile.
        block_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles in flight.
        max_registers: Per thread; fewer let more programs share a multiprocessor. None leaves it to the assembler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


TABLE: dict[tuple[str, str, int], LaunchConfig] = {}
"""By kernel, architecture and padded head dimension, for 16-bit elements. Filled below by `_fill`."""

_overrides: dict[str, LaunchConfig] = {}


def padded(head_dim: int) -> int:
    """The head dimension of tiles: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension isn't contiguous: kernels take any other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_config(kernel: str, device: torch.device, head_dim: int, itemsize: int) -> LaunchConfig:
    """The settings to launch a kernel with.

    Args:
        kernel: ``"prefill"``, ``"decode"``, ``"coded_decode"``, ``"influence"`` or ``"coded_influence"``.
        device: Where it runs.
        head_dim: Of keys.
        itemsize: Bytes per element; tiles of 4-byte elements hold half as many keys.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    if device.type != "cuda" or interpreting():
        return TABLE[kernel, "interpreter", padded(head_dim)]
    tuned = _tuned(_device_name(device)).get(f"{kernel}-{padded(head_dim)}-{itemsize}")
    if tuned is not None:
        return tuned
    return table_config(kernel, _arch(torch.cuda.get_device_capability(device)), head_dim, itemsize)


def table_config(kernel: str, arch: str, head_dim: int, itemsize: int) -> LaunchConfig:
    """The entry of `TABLE` for an architecture, ``"sm_80"``, ``"sm_86"`` or ``"sm_90"``."""
    config = TABLE[kernel, arch, padded(head_dim)]
    if itemsize <= 2:
        return config
    return replace(config, block_n=max(16, config.block_n // 2), num_stages=min(config.num_stages, 2))


@contextlib.contextmanager
def overridden(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Launch a kernel with other settings inside the ``with`` block."""
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


def cache_file(device: torch.device) -> Path:
    """Where tuned settings of a device lie: ``$MOA_KERNELS_CACHE``, else ``~/.cache/moa-search``, by its name."""
    return _cache_file(_device_name(device))


def save_tuned(device: torch.device, kernel: str, head_dim: int, itemsize: int, config: LaunchConfig) -> None:
    """Remember settings for a device, a kernel and a head dimension, on disk."""
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[f"{kernel}-{padded(head_dim)}-{itemsize}"] = asdict(config)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    scratch.replace(path)
    forget_tuned()


def forget_tuned() -> None:
    """Read the files of tuned settings again at the next launch."""
    _tuned.cache_clear()


def _arch(capability: tuple[int, int]) -> str:
    """Newest entry of the table that a device can follow; consumer chips have less shared memory."""
    major, minor = capability
    if major == 9 or (major >= 10 and major != 12):
        return "sm_90"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cache_file(device_name: str) -> Path:
    folder = os.environ.get("MOA_KERNELS_CACHE") or Path.home() / ".cache" / "moa-search"
    name = "".join(letter if letter.isalnum() else "-" for letter in device_name)
    return Path(folder) / f"kernels-{name}.json"


@functools.cache
def _tuned(device_name: str) -> dict[str, LaunchConfig]:
    path = _cache_file(device_name)
    if not path.exists():
        return {}
    try:
        return {key: LaunchConfig(**settings) for key, settings in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} isn't a file of tuned settings ({error}); delete it or tune again") from None


def _fill(kernel: str, rows: Mapping[int, tuple[int, ...]], arch: str) -> None:
    for head_dim, numbers in rows.items():
        TABLE[kernel, arch, head_dim] = LaunchConfig(*numbers)


# block_m, block_n, num_warps, num_stages, max_registers, such that tests/moa_kernels/test_compile.py finds no spills.
_fill("prefill", dict.fromkeys((16, 32, 64), (128, 128, 8, 2)) | {128: (128, 64, 8, 3), 256: (64, 32, 8, 3)}, "sm_90")
_fill("prefill", dict.fromkeys((16, 32, 64), (64, 64, 4, 3)) | {128: (64, 64, 4, 2), 256: (64, 32, 8, 2)}, "sm_80")
_fill("prefill", dict.fromkeys((16, 32, 64), (64, 32, 4, 2)) | {128: (64, 32, 4, 2), 256: (64, 32, 8, 2)}, "sm_86")
# decode: block_m is the most rows of a tile; fewer are padded to a power of two, at least 16.
_fill("decode", dict.fromkeys((16, 32, 64, 128), (32, 64, 4, 3)) | {256: (32, 32, 4, 3)}, "sm_90")
_fill("decode", dict.fromkeys((16, 32, 64, 128), (32, 64, 4, 3)) | {256: (32, 32, 4, 2)}, "sm_80")
_fill("decode", dict.fromkeys((16, 32, 64, 128), (32, 64, 4, 2)) | {256: (32, 32, 4, 2)}, "sm_86")
# coded_decode: Hopper's matrix units take 64 keys; at 128, some spilled registers cost less than smaller blocks.
for _arch_ in ("sm_90", "sm_80", "sm_86"):
    _fill("coded_decode", dict.fromkeys((16, 32, 64), (16, 64, 4, 3)), _arch_)
    _fill("coded_decode", {128: (16, 32, 8, 3), 256: (16, 32, 8, 2)}, _arch_)
_fill("coded_decode", {128: (16, 64, 4, 3)}, "sm_90")
# 128 registers, so that one program's products run beside the other's arithmetic.
_fill("influence", dict.fromkeys((16, 32, 64, 128), (128, 32, 8, 3, 128)) | {256: (128, 32, 8, 2)}, "sm_90")
_fill("influence", dict.fromkeys((16, 32, 64, 128), (64, 32, 4, 3)) | {256: (64, 16, 4, 2)}, "sm_80")
_fill("influence", dict.fromkeys((16, 32, 64, 128), (64, 32, 4, 2)) | {256: (32, 16, 4, 2)}, "sm_86")
# Half as many instructions a key for sums as with tiles of 32 outweigh a second program beside the first.
_fill("coded_influence", dict.fromkeys((16, 32, 64, 128), (128, 64, 8, 2)) | {256: (128, 32, 8, 2)}, "sm_90")
_fill("coded_influence", dict.fromkeys((16, 32, 64, 128), (64, 32, 4, 3)) | {256: (64, 16, 4, 2)}, "sm_80")
_fill("coded_influence", dict.fromkeys((16, 32, 64, 128), (64, 32, 4, 2)) | {256: (32, 16, 4, 2)}, "sm_86")
for _kernel in ("prefill", "decode", "coded_decode", "influence", "coded_influence"):
    _block_m = 16 if _kernel.endswith("decode") else 32
    _fill(_kernel, dict.fromkeys((16, 32, 64, 128, 256), (_block_m, 32, 4, 2)), "interpreter")
