from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

KVPRESS = '''
"""Stands for kvpress, whose transformers is too old for this environment: keeps a context's first and last tokens."""


class SnapKVPress:
    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio

    def post_init_from_model(self, model):
        pass

    def forward_hook(self, module, arguments, options, output):
        layer = options["past_key_values"].layers[module.layer_idx]
        count = layer.keys.shape[2]
        assert options["hidden_states"].shape[1] == count
        kept = list(range(4)) + list(range(count - round(count * (1 - self.compression_ratio)) + 4, count))
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        return output
'''


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python with one of kvpress's methods."""
    package = tmp_path_factory.mktemp("packages") / "kvpress"
    package.mkdir()
    (package / "__init__.py").write_text(KVPRESS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
        yield sys.executable
