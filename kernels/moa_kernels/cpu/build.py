"""Where the compiled library is: shipped with the package, or compiled once into the cache."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"

SHIPPED = Path(__file__).parent / "built"
"""Libraries that a wheel for a platform carries, one per variant."""

FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    "-shared", "-fPIC",
)  # fmt: skip

V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

VARIANTS: dict[str, dict[str, tuple[str, frozenset[str]]]] = {
    "x86_64": {
        "v4-bf16": ("x86-64-v4 -mavx512bf16", V4 | {"avx512_bf16"}),
        "v4": ("x86-64-v4", V4),
        "v3": ("x86-64-v3", V3),
        "v2": ("x86-64-v2", frozenset()),
    },
    "aarch64": {"v8": ("armv8-a", frozenset())},
}
"""By machine, best first: what the compiler is told, and the flags of /proc/cpuinfo that a processor needs."""

log = logging.getLogger(__name__)


class UnavailableError(RuntimeError):
    """There is no library for this machine, and none can be compiled; says why."""


def find_library() -> Path:
    """The library for this processor: a shipped one, else one compiled into the cache, now if need be.

    ``$MOA_CPU_TARGET`` names what to compile for in place of this processor (``-march``; more flags may follow),
    ``$MOA_KERNELS_CACHE`` the folder to keep it in.

    Raises:
        UnavailableError: None is shipped and none could be compiled.
    """
    target = os.environ.get("MOA_CPU_TARGET")
    if target is None and (shipped := shipped_library(SHIPPED)) is not None:
        return shipped
    compiler = _compiler()
    if compiler is None:
        raise UnavailableError("no C++ compiler was found (g++, clang++ or $CXX)")
    march = f"-march={target or 'native'}".split()
    path = _cache_folder() / f"moa_cpu-{_key(compiler, march)}.so"
    if not path.exists():
        log.info("compiling the CPU kernels with %s into %s, once", compiler, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            compile_library(path, march, compiler)
        except OSError as error:
            raise UnavailableError(f"{path.parent} can't be written: {error}") from None
    return path


def shipped_library(folder: Path) -> Path | None:
    """The best shipped variant that this processor can run, or None."""
    present = processor_flags()
    for name, (_, needed) in VARIANTS.get(platform.machine(), {}).items():
        path = folder / f"moa_cpu-{name}.so"
        if needed <= present and path.exists():
            return path
    return None


def compile_library(path: Path, machine_flags: list[str], compiler: str | None = None) -> None:
    """Compile the library and put it in place in one step: processes that do so at once don't see a half of it.

    Args:
        path: Where it goes.
        machine_flags: What to compile for, as the compiler understands it.
        compiler: A C++ compiler; the one that is found by default.

    Raises:
        UnavailableError: The compiler failed; says how.
    """
    compiler = compiler or _compiler()
    if compiler is None:
        raise UnavailableError("no C++ compiler was found (g++, clang++ or $CXX)")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        for threads in (["-fopenmp"], []):  # Apple's clang has none: one thread then
            command = [compiler, *FLAGS, *threads, *machine_flags, "-o", str(fresh), str(SOURCE / "library.cpp")]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                raise UnavailableError(f"{compiler} can't be run: {error.strerror}") from None
            if done.returncode == 0:
                os.replace(fresh, path)
                return
            if "fopenmp" not in done.stderr and "lgomp" not in done.stderr:
                break
    errors = (
        [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    )
    raise UnavailableError(f"{compiler} failed: {errors[0].strip()}")


def has_compiler() -> bool:
    """Whether a C++ compiler is found."""
    return _compiler() is not None


@functools.cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, as the kernel names it; empty where it doesn't say."""
    return frozenset(_processor_line().split())


def _processor_line() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2]
    return platform.processor()


def _compiler() -> str | None:
    """The compiler's path."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _cache_folder() -> Path:
    return Path(os.environ.get("MOA_KERNELS_CACHE") or Path.home() / ".cache" / "moa-search")


def _key(compiler: str, march: list[str]) -> str:
    """Changes with the sources, the compiler, the flags and, as folders are shared by machines, the processor."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.iterdir()) if path.suffix in (".h", ".cpp"))
    built = os.stat(os.path.realpath(compiler))
    facts = (compiler, built.st_size, built.st_mtime_ns, FLAGS, march, _processor_line(), sys.platform)
    return hashlib.sha256(sources + repr(facts).encode()).hexdigest()[:16]
