"""Starts JAX for a command: the memory that XLA may use, and the cache of compiled programs.

Only commands call this. A program that imports the library keeps its own JAX settings.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
from pathlib import Path

import jax

from xl2jax.errors import UserError, first_line

logger = logging.getLogger(__name__)

MEMORY_FRACTION = 0.95
"""Share of a GPU's memory that commands let XLA use. CUDA's context and libraries need the rest."""

PROGRAM_CACHE_BYTES = 4 << 30
"""Limit on the size of the cache of compiled programs. JAX evicts the least recently used ones."""

COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""Options of all programs that run the networks. XLA's Triton matrix products first copy the weights of each scanned
layer, and run bias and GELU as separate kernels. cuBLAS reads the weights in place and fuses both. On an H200 this halves
the time of a decode step and makes the vision tower an eighth faster. The option has no effect on other devices."""

_MEMORY_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def start_backend(*, keep_programs: bool = True) -> jax.Device:
    """Starts JAX's backend for a command, logs what was chosen and returns the default device.

    Settings that the user made (in JAX's environment variables or its configuration) are not changed.

    Raises:
      UserError: the platform that JAX_PLATFORMS names is not available.
    """
    by_user = [name for name in _MEMORY_SETTINGS if name in os.environ]
    if not by_user:
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as e:  # JAX raises AssertionError if a platform has no device
        requested = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or "any"
        reason = first_line(e, "it has no device here")
        raise UserError(
            f"JAX cannot start on the platform {requested} ({reason}); install jax[cuda12] for NVIDIA GPUs, or choose "
            "another with JAX_PLATFORMS (cpu works, unless XLA_FLAGS are wrong)"
        ) from None
    if device.platform == "gpu":
        source = f"set by {', '.join(by_user)}" if by_user else "XLA_CLIENT_MEM_FRACTION changes it"
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        logger.info("device memory: up to %.1f GiB of %s (%s)", limit / 2**30, device.device_kind, source)
    if keep_programs:
        _keep_programs(device)
    return device


def _keep_programs(device: jax.Device) -> None:
    """Lets JAX store compiled programs in the user's cache folder, up to `PROGRAM_CACHE_BYTES`."""
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return  # the user made this setting
    folder = _cache_home() / "xl2jax" / "programs" / (_cpu_kind() if device.platform == "cpu" else device.platform)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as e:
        logger.warning("compiled programs are not kept: %s cannot be written (%s)", folder, e.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", PROGRAM_CACHE_BYTES)
    # Small programs are stored too, so that a second run of the same command compiles nothing.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    logger.info("compiled programs are kept in %s", folder)


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) if home and os.path.isabs(home) else Path("~/.cache").expanduser()


def _cpu_kind() -> str:
    """A name for the instruction sets of this CPU. Machines that share a home folder may differ in them."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        known = flags.group(1) if flags else platform.processor()
    except OSError:
        known = platform.processor()
    return f"cpu-{platform.machine()}-{hashlib.blake2b(known.encode(), digest_size=6).hexdigest()}"


class ProgramCount:
    """Counts the programs that this process compiled and those that it read from the cache."""

    def __init__(self) -> None:
        self.requested = self.from_cache = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.requested += event == "/jax/core/compile/backend_compile_duration"

    def _on_event(self, event: str, **_: str | int) -> None:
        self.from_cache += event == "/jax/compilation_cache/cache_hits"

    @property
    def compiled(self) -> int:
        return self.requested - self.from_cache


@functools.cache
def program_count() -> ProgramCount:
    """The counter of this process, which starts at the first call."""
    return ProgramCount()
