"""What pyproject.toml can't say: where a C++ compiler is, a wheel carries the CPU kernels, one library per variant.

Such a wheel is tagged ``py3-none-<platform>``: it depends on neither Python's nor torch's binary interface. Without a
compiler, or with ``MOA_CPU_VARIANTS=`` (empty), the wheel is ``py3-none-any``, and the kernels are compiled where it is
used, if there is a compiler. ``MOA_CPU_VARIANTS=v3,v4`` builds some of them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _build_module() -> ModuleType:
    """`moa_kernels.cpu.build`, without its package: that would need torch."""
    path = Path(__file__).parent / "kernels" / "moa_kernels" / "cpu" / "build.py"
    spec = importlib.util.spec_from_file_location("moa_cpu_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _variants() -> list[str]:
    """Names of the libraries to build."""
    build = _build_module()
    known = list(build.VARIANTS.get(platform.machine(), {}))
    if not build.has_compiler():
        return []
    asked = os.environ.get("MOA_CPU_VARIANTS")
    if asked is None:
        return known
    names = [name for name in asked.split(",") if name]
    if unknown := set(names) - set(known):
        raise SystemExit(f"MOA_CPU_VARIANTS names {', '.join(sorted(unknown))}; here there are {', '.join(known)}")
    return names


class BuildWithKernels(build_py):
    """Compiles the variants beside the modules; an editable install compiles at first use instead."""

    def run(self) -> None:
        """Copy modules, then compile."""
        super().run()
        if self.editable_mode:
            return
        build = _build_module()
        folder = Path(self.build_lib) / "moa_kernels" / "cpu" / build.SHIPPED.name
        for name in _variants():
            folder.mkdir(parents=True, exist_ok=True)
            flags, _ = build.VARIANTS[platform.machine()][name]
            build.compile_library(folder / f"moa_cpu-{name}.so", f"-march={flags}".split())


class Kernels(Distribution):
    """Files for a platform, where libraries are among them."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel is for a platform."""
        return bool(_variants())


class AnyPython(bdist_wheel):
    """A platform's wheel fits every Python: the libraries don't use its interface."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python, this platform; or any platform."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(distclass=Kernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython})
