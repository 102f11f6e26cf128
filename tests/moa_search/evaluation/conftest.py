from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> tuple[Any, Any]:
    """A random two-layer Llama and its byte-level tokenizer."""
    from moa_search.modeling.loading import load_model

    return load_model(str(tiny_model_dir), dtype="float32", device="cpu")
