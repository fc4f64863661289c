"""Which devices of this process run a model."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError, require_whole
from xl2jax.models.sharding import check_split, tensor_mesh


@dataclasses.dataclass(frozen=True)
class Devices:
    """How many devices a model is split over, and how many copies of it there are."""

    tensor: int = 1
    """Devices over which each copy is split."""
    copies: int = 1
    """Copies of the model."""

    def __post_init__(self) -> None:
        require_whole("--tensor", self.tensor, 1)
        require_whole("--copies", self.copies, 1)

    @property
    def count(self) -> int:
        return self.tensor * self.copies

    def check(self, config: VideoXL2Config) -> None:
        """Raises UserError where the model cannot be split over so many devices."""
        check_split(config, self.tensor)

    def meshes(self) -> tuple[Mesh | None, ...]:
        """The mesh of each copy: neighbouring devices of this process. None is the default device.

        Raises UserError where there are not enough devices.
        """
        devices = jax.local_devices()
        if self.count > len(devices):
            flags = f"--tensor {self.tensor}" + (f" with --copies {self.copies}" if self.copies > 1 else "")
            raise UserError(f"{flags} needs {self.count} devices, {len(devices)} are there ({devices[0].device_kind})")
        if self.count == 1:
            return (None,)
        return tuple(tensor_mesh(devices[i * self.tensor : (i + 1) * self.tensor]) for i in range(self.copies))
