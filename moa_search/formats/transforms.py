"""The fixed transforms of keys that a plan in few bits needs, in one safetensors file beside the plan.

Keys below 8 bits are stored as they were before rotary embedding, less a mean and times a balancing matrix, all
measured once per model by ``moa-profile --tiers`` (`moa_kernels.codes.Transform`). A plan names them by the hash of
their file, so the plans of one profile share one file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moa_search.errors import PlanFormatError, PlanVersionError
from moa_search.formats.files import atomic_write, one_line, require_schema, take_tensor
from moa_search.formats.signature import ModelSignature

SCHEMAS = ("moa-transforms/1", "moa-transforms/2")
"""Without a spectrum, and with one."""
DIGITS = 16

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class KeyTransforms:
    """Of every KV head, native layers' too, where they do nothing.

    Attributes:
        mean: Of keys before rotary embedding, ``[layer, kv_head, head_dim]``.
        balance: The balancing matrices, ``[layer, kv_head, head_dim, head_dim]``.
        frequencies: Of rotary embedding, radians per position of each pair of channels, ``[layer, head_dim / 2]``.
        order: Channels, the pairs' first ones, then their second ones, int32 ``[head_dim]``.
        spectrum: Variance of every channel behind ``balance``, decreasing, ``[layer, kv_head, head_dim]``, which says
            the channels of more bits. None in files from before, which store all channels alike.
    """

    mean: Floats = field(repr=False)
    balance: Floats = field(repr=False)
    frequencies: Floats = field(repr=False)
    order: npt.NDArray[np.int32] = field(repr=False)
    spectrum: Floats | None = field(default=None, repr=False)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Every array by its name."""
        found = {name: getattr(self, name) for name in ("balance", "frequencies", "mean", "order", "spectrum")}
        return {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None}

    def layer(self, layer: int) -> dict[str, npt.NDArray[Any]]:
        """What `moa_kernels.codes.Transform.of_keys` takes, of one layer."""
        return {name: array if name == "order" else array[layer] for name, array in self.tensors().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, npt.NDArray[Any]], model: ModelSignature) -> KeyTransforms:
        """The inverse of `tensors`.

        Raises:
            ValueError: They aren't a model's, or can't be undone.
        """
        layers, width = model.num_hidden_layers, model.head_dim
        heads = (layers, model.num_key_value_heads)
        wanted: dict[str, tuple[tuple[int, ...], Any]] = {
            "balance": ((*heads, width, width), np.float32),
            "frequencies": ((layers, width // 2), np.float32),
            "mean": ((*heads, width), np.float32),
            "order": ((width,), np.int32),
            **({"spectrum": ((*heads, width), np.float32)} if "spectrum" in tensors else {}),
        }
        left = {f"transforms/{name}": tensor for name, tensor in tensors.items()}
        taken = {name: take_tensor(left, f"transforms/{name}", *of) for name, of in wanted.items()}
        if left:
            raise ValueError(f"tensor {min(left)} belongs to no transform")
        signs, sizes = np.linalg.slogdet(tensors["balance"].astype(np.float64))
        if not (np.isfinite(sizes) & (signs != 0)).all():
            layer, head = np.argwhere(~np.isfinite(sizes) | (signs == 0))[0]
            raise ValueError(f"transforms/balance has no inverse at layer {layer}, KV head {head}")
        if not np.array_equal(np.sort(tensors["order"]), np.arange(width)):
            raise ValueError("transforms/order doesn't name every channel once")
        if "spectrum" in taken:
            spectrum = taken["spectrum"]
            wrong = (spectrum <= 0).any(-1) | (np.diff(spectrum) > 0).any(-1)
            if wrong.any():
                layer, head = np.argwhere(wrong)[0]
                raise ValueError(f"transforms/spectrum isn't positive and decreasing at layer {layer}, KV head {head}")
        return cls(**taken)

    @cached_property
    def _bytes(self) -> bytes:
        # One entry of metadata: safetensors writes several in any order.
        return bytes(save(self.tensors(), metadata={"schema": SCHEMAS[self.spectrum is not None]}))

    @cached_property
    def checksum(self) -> str:
        """Hash of the file."""
        return f"sha256:{hashlib.sha256(self._bytes).hexdigest()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyTransforms) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def to_bytes(self) -> bytes:
        """The file."""
        return self._bytes

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
            PlanVersionError: It has a schema of a later version.
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
            tensors, schema = load(raw), _schema_of(raw)
            require_schema(schema, SCHEMAS, path, PlanFormatError, PlanVersionError)
            if schema != SCHEMAS["spectrum" in tensors]:
                raise ValueError(f"{schema} {'has no' if schema == SCHEMAS[0] else 'needs a'} spectrum")
            found = cls.of(tensors, model)
        except PlanFormatError:
            raise
        except (SafetensorError, ValueError) as error:
            raise PlanFormatError(f"{path}: no transforms of this plan's model ({one_line(error)})") from None
        # Kept as it is: another version of safetensors might write other bytes, whose hash no plan names.
        found.__dict__["_bytes"] = raw
        return found


def _schema_of(raw: bytes) -> object:
    """What a file that safetensors has read says in its header."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header.get("__metadata__", {}).get("schema")
