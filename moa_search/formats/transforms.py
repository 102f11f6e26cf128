"""The fixed transforms of keys that a plan in few bits needs, in one safetensors file beside the plan.

Keys below 8 bits are stored less a fixed mean and times a balancing matrix, both measured once per model by
``moa-profile --tiers`` (`moa_kernels.codes.Transform.balanced`). A plan names them by the hash of their file, so the
plans of one profile share one file.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moa_search.errors import PlanFormatError
from moa_search.formats.files import atomic_write, one_line
from moa_search.formats.signature import ModelSignature
from moa_search.formats.tiers import require_transforms

SCHEMA = "moa-transforms/1"
DIGITS = 16

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class KeyTransforms:
    """Of every KV head, native layers' too, where they are zeros and identities.

    Attributes:
        mean: ``[layer, kv_head, head_dim]``.
        balance: ``[layer, kv_head, head_dim, head_dim]``.
    """

    mean: Floats = field(repr=False)
    balance: Floats = field(repr=False)

    @cached_property
    def _bytes(self) -> bytes:
        # One entry of metadata: safetensors writes several in any order.
        tensors = {"balance": np.ascontiguousarray(self.balance), "mean": np.ascontiguousarray(self.mean)}
        return bytes(save(tensors, metadata={"schema": SCHEMA}))

    @cached_property
    def checksum(self) -> str:
        """Hash of the file."""
        return f"sha256:{hashlib.sha256(self._bytes).hexdigest()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyTransforms) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self._bytes)

    @staticmethod
    def file_name(checksum: str) -> str:
        """Name of the file with this hash, in the plan's folder."""
        return f"transforms-{checksum.removeprefix('sha256:')[:DIGITS]}.safetensors"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file into ``folder`` atomically, unless it is there.

        Returns:
            Its path.

        Raises:
            ConfigError: It can't be written.
        """
        path = Path(folder) / self.file_name(self.checksum)
        if not (path.is_file() and path.read_bytes() == self._bytes):
            with atomic_write(path) as file:
                file.write(self._bytes)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str], checksum: str, model: ModelSignature, source: str) -> KeyTransforms:
        """Read what `save` wrote.

        Args:
            folder: The plan's.
            checksum: The hash that the plan names.
            model: The plan's.
            source: Names the plan in errors.

        Raises:
            PlanFormatError: The file is missing, foreign or altered.
        """
        path = Path(folder) / cls.file_name(checksum)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise PlanFormatError(
                f"{source}: its transforms of keys, {path.name}, can't be read ({error.strerror or error}); "
                "keep that file beside the plan"
            ) from None
        if f"sha256:{hashlib.sha256(raw).hexdigest()}" != checksum:
            raise PlanFormatError(f"{path}: altered since {source} was made; restore it, or search again")
        try:
            tensors = load(raw)
            mean, balance = tensors.pop("mean"), tensors.pop("balance")
            heads, width = (model.num_hidden_layers, model.num_key_value_heads), model.head_dim
            for name, tensor, shape in (("mean", mean, (*heads, width)), ("balance", balance, (*heads, width, width))):
                if tensor.shape != shape or tensor.dtype != np.float32:
                    raise ValueError(f"{name} holds {tensor.dtype} {tensor.shape}, expected float32 {shape}")
            require_transforms(mean, balance)
        except (SafetensorError, KeyError, ValueError) as error:
            raise PlanFormatError(f"{path}: no transforms of this plan's model ({one_line(error)})") from None
        return cls(mean, balance)
