"""`xl2jax serve`: answers questions about videos over HTTP, as OpenAI's chat interface."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
from typing import TYPE_CHECKING

import tyro

from xl2jax.commands.service import ServiceArgs, build_service, check_service, spool_folder
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError, require_whole
from xl2jax.system.terminal import flag_errors

if TYPE_CHECKING:
    from xl2jax.serving.limits import LiveLimits

logger = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True)
class AccessArgs:
    """Who is answered."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that every request must carry; by default the environment variable XL2JAX_API_KEY, if it is set."""
    grace_seconds: float = 60.0
    """On SIGTERM, what runs is finished within this time."""


@dataclasses.dataclass(frozen=True)
class LiveArgs:
    """Live videos (`POST /v1/live`), and what each may ask for."""

    live_sessions: int = 2
    """Live videos that are open at a time; 0 refuses them."""
    live_fps: float = 4.0
    """Most frames a second that are seen of one."""
    live_minutes: float = 60.0
    """Most minutes of it that are remembered, which is also the default."""
    live_dense_minutes: float = 10.0
    """Most minutes of it whose KV is dense on the device, which is also the default."""
    live_host_gib: float = 2.0
    """Most host memory for the dense KV of its older part, which is also the default."""
    live_idle_seconds: float = 300.0
    """One ends when no frame and no question has come for so long."""
    live_hours: float = 24.0
    """One ends so long after it was opened."""


@dataclasses.dataclass(frozen=True)
class Args(ServiceArgs):
    """Answers questions about videos over HTTP, as OpenAI's chat interface."""

    access: tyro.conf.OmitArgPrefixes[AccessArgs] = AccessArgs()
    live: tyro.conf.OmitArgPrefixes[LiveArgs] = LiveArgs()
    warm_up: int = 128
    """Before /ready is 200, compiles what questions about a video of so many frames need; 0 compiles it for the first
    questions. Compiled programs are kept for the next start."""


def main() -> int:
    """Runs the server until a signal ends it, and returns its exit status."""
    with flag_errors():
        args = tyro.cli(Args)
    check_service(args)
    check_warm_up(args.warm_up, args.limits.max_frames)
    key = check_access(args.access)
    check_live(args.live)
    from xl2jax.serving import server

    access = args.access
    listening = server.listen(access.host, access.port)  # a taken port is reported before the model is loaded
    with listening, spool_folder("xl2jax-serve") as spool:
        service = build_service(args, spool, args.warm_up, live_limits_of(args.live))
        service.api_key, service.hosts = key, LOOPBACK if is_loopback(access.host) else None
        shown = f"[{access.host}]" if ":" in access.host else access.host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        logger.info("serving %s on %s/v1, with a page at %s/", service.model, address, address)
        server.run(service, listening, grace_seconds=access.grace_seconds)
    logger.info("the server has ended")
    return 0


def check_warm_up(frames: int, most: int) -> None:
    """Raises UserError where --warm-up is out of range."""
    if frames and not FRAMES_PER_GROUP <= frames <= most:
        raise UserError(f"--warm-up must be 0, or from {FRAMES_PER_GROUP} to --max-frames ({most:,}) frames")


def check_live(live: LiveArgs) -> None:
    """Raises UserError where a flag of live videos is out of range."""
    from xl2jax.inference.live_sizes import LiveMemory, check_rate

    require_whole("--live-sessions", live.live_sessions, 0, 64)
    check_rate(live.live_fps)
    LiveMemory(live.live_dense_minutes, live.live_minutes, live.live_host_gib)
    for name in ("live_idle_seconds", "live_hours"):
        if not 0 < getattr(live, name) < 1e6:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")


def live_limits_of(live: LiveArgs) -> LiveLimits:
    """The flags as limits."""
    from xl2jax.serving.limits import LiveLimits

    return LiveLimits(
        sessions=live.live_sessions,
        fps=live.live_fps,
        minutes=live.live_minutes,
        dense_minutes=live.live_dense_minutes,
        host_gib=live.live_host_gib,
        idle_seconds=live.live_idle_seconds,
        seconds=3600 * live.live_hours,
    )


def check_access(access: AccessArgs) -> str | None:
    """Checks the flags. Returns the API key."""
    key = access.api_key if access.api_key is not None else os.environ.get("XL2JAX_API_KEY")
    if key is not None and (not key.strip() or not key.isascii()):
        raise UserError("the API key is empty or not ASCII")
    if key is None and not is_loopback(access.host):
        raise UserError(f"--host {access.host} can be reached from other machines: give --api-key")
    require_whole("port", access.port, 0, 65_535)
    if not 0 < access.grace_seconds < 1e9:
        raise UserError("--grace-seconds must be above 0")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
