"""GPU models: their memory, and the rates that their datasheets state."""

from __future__ import annotations

import dataclasses
import re

from xl2jax.system.backend import MEMORY_FRACTION

_CONTEXT_BYTES = 460 << 20
"""Memory that a CUDA context takes before XLA measures what is free (on an H100, 79.2 of 79.65 GiB remain)."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU model."""

    name: str
    """The word in JAX's `device_kind` that identifies the model."""
    memory_mib: int
    """Memory in MiB, as the driver reports it."""
    matrix_rate: float
    """Dense bfloat16 operations a second."""
    bandwidth: float
    """Bytes of device memory read a second."""

    @property
    def available(self) -> float:
        """Bytes that XLA can use under the commands' memory setting (`start_backend`)."""
        return MEMORY_FRACTION * ((self.memory_mib << 20) - _CONTEXT_BYTES)


DEVICES = {
    "h200": Device("H200", 143_771, 989e12, 4.8e12),
    "h100": Device("H100", 81_559, 989e12, 3.35e12),
    "a100-80g": Device("A100", 81_920, 312e12, 2.0e12),
    "a100-40g": Device("A100", 40_960, 312e12, 1.56e12),
    "l40": Device("L40", 46_068, 181e12, 0.864e12),
    "l4": Device("L4", 23_034, 121e12, 0.3e12),
    "rtx5090": Device("RTX 5090", 32_607, 209e12, 1.79e12),
    "rtx4090": Device("RTX 4090", 24_564, 165e12, 1.0e12),
    "rtx3090": Device("RTX 3090", 24_576, 71e12, 0.936e12),
    "rtx5060ti-16g": Device("RTX 5060 Ti", 16_311, 47e12, 0.448e12),
    "rtx4060ti-16g": Device("RTX 4060 Ti", 16_380, 44e12, 0.288e12),
    "rtx3060-12g": Device("RTX 3060", 12_288, 25e12, 0.36e12),
    "rtx4060": Device("RTX 4060", 8_188, 30e12, 0.272e12),
}


def matrix_rate(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of the GPU that JAX calls `device_kind`, or None for a model not listed."""
    rates = (d.matrix_rate for d in DEVICES.values() if re.search(rf"\b{d.name}\b(?! Ti)", device_kind))
    return next(rates, None)
