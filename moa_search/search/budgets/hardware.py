"""The few numbers of a device that the cost model needs: built in from data sheets, or measured and read from YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moa_search.errors import ConfigError
from moa_search.formats.files import atomic_write, describe_invalid, nearest, one_line


class Hardware(BaseModel):
    """Speeds of one device, and the tiles in which its attention kernels work.

    Attributes:
        name: What tables and plans call it.
        bandwidth_bytes_per_s: Bytes per second between the device's memory and its cores.
        flops_per_s: Dense 16-bit matrix FLOP/s.
        tile_query: Rows of queries that an attention kernel handles together in a prefill.
        tile_key: Keys that it reads together; a tile is read and multiplied whole if one of its pairs is attended.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=100)
    bandwidth_bytes_per_s: float = Field(ge=1e6, le=1e18)
    flops_per_s: float = Field(ge=1e6, le=1e21)
    tile_query: int = Field(default=128, ge=1, le=65536)
    tile_key: int = Field(default=128, ge=1, le=65536)

    @classmethod
    def find(cls, name: str) -> Hardware:
        """A built-in device by its name, or else one from the YAML file of that name.

        Raises:
            ConfigError: It's neither, or the file is no description of a device.
        """
        if name in HARDWARE:
            return HARDWARE[name]
        if Path(name).suffix in (".yaml", ".yml") or os.path.sep in name:
            return cls.load(name)
        raise ConfigError(
            f"hardware '{one_line(name)}' is unknown{nearest(name, HARDWARE)}; give one of {', '.join(HARDWARE)}, "
            "or a .yaml file made by moa-search hardware"
        )

    @classmethod
    def of(cls, device: str | Hardware | None) -> Hardware | None:
        """A device that may be given by its name or file; raises what `find` does."""
        return cls.find(device) if isinstance(device, str) else device

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Hardware:
        """Read a device from YAML with the attributes as keys.

        Raises:
            ConfigError: There is no such file, or it's no description of a device.
        """
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_bytes())
            if not isinstance(content, dict):
                raise ValueError(f"expected the keys {', '.join(cls.model_fields)}")
            return cls.model_validate(content)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {describe_invalid(error, cls.model_fields)}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a YAML file that describes a device ({one_line(error)})") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the YAML file that `load` reads, atomically.

        Raises:
            ConfigError: It can't be written there.
        """
        import yaml

        with atomic_write(path) as file:
            file.write(yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True).encode())


def _known(name: str, bandwidth: float, flops: float, tile_key: int) -> Hardware:
    return Hardware(name=name, bandwidth_bytes_per_s=bandwidth, flops_per_s=flops, tile_query=128, tile_key=tile_key)


HARDWARE: Final = {
    device.name: device
    for device in (
        _known("a100-80g", 2.039e12, 312e12, 64),
        _known("h100-sxm", 3.35e12, 989.4e12, 128),
        _known("h200", 4.8e12, 989.4e12, 128),
        _known("l40s", 0.864e12, 362.05e12, 64),
        _known("rtx4090", 1.008e12, 165.2e12, 64),
    )
}
"""Peak numbers from NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, L40S) and, for the GeForce RTX 4090, the
Ada architecture whitepaper (bfloat16 with float32 accumulation): memory bandwidth, and dense bfloat16 tensor FLOP/s,
half of what data sheets print with sparsity. No kernel reaches either in full, so times come out optimistic;
``moa-search hardware`` measures both. Tiles are typical of FlashAttention's forward pass at head_dim 128."""
