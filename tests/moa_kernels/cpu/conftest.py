"""Threads, and a compiler that compiles the same thing once: what several tests build of the library, they share.

It is the real one behind a script. What it gives lies in one folder for all processes of a test run, by a hash of the
arguments, places of sources and output aside; who comes second waits for the first.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator

import pytest
import torch
from moa_kernels.cpu import build

SCRIPT = """#!{python} -SE
import fcntl, hashlib, os, shutil, subprocess, sys

arguments = sys.argv[1:]
place = arguments.index("-o") + 1
facts = repr([argument for argument in arguments if not os.path.isabs(argument)])
kept = os.path.join({store!r}, hashlib.sha256(facts.encode()).hexdigest()[:16] + ".so")
with open(kept + ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.exists(kept):
        arguments[place], wanted = kept, arguments[place]
        code = subprocess.run([{compiler!r}, *arguments]).returncode
        if code:
            sys.exit(code)
        arguments[place] = wanted
shutil.copyfile(kept, arguments[place])
"""


@pytest.fixture(scope="session")
def shared_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script, in a folder of the whole run."""
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    store = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    store.mkdir(exist_ok=True)
    script = store / "c++"
    fresh = store / f"c++-{os.getpid()}"
    fresh.write_text(SCRIPT.format(python=sys.executable, store=str(store), compiler=compiler))
    fresh.chmod(0o755)
    os.replace(fresh, script)
    return str(script)


@pytest.fixture
def one_or_two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One for half of the tests, two for the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 + zlib.crc32(request.node.name.encode()) % 2)
    yield
    torch.set_num_threads(before)
