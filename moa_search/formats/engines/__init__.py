"""Files of engines that hold one constant window per layer and no more, each in a module of its own."""

from moa_search.formats.engines.base import Engine
from moa_search.formats.engines.executorch import ExecuTorch
from moa_search.formats.engines.mlx import MLX
from moa_search.formats.engines.onnx_runtime import ONNXRuntime
from moa_search.formats.engines.tensorrt_llm import TensorRTLLM

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (TensorRTLLM(), MLX(), ExecuTorch(), ONNXRuntime())}
"""By the name of their format."""

__all__ = ["ENGINES", "Engine"]
