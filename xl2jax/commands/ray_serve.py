"""`xl2jax ray-serve`: the server of `xl2jax serve` as replicas on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from xl2jax.commands.serve import LOOPBACK, AccessArgs, check_access, check_warm_up, is_loopback
from xl2jax.commands.service import ServiceArgs, check_service
from xl2jax.errors import UserError, first_line
from xl2jax.system.terminal import flag_errors

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReplicaArgs:
    """The cluster, and what each replica has of it."""

    address: str | None = None
    """Address of a Ray cluster, or auto for the one of this host; by default RAY_ADDRESS of the environment, and without
    it Ray is started on this host and ended again."""
    replicas: int = 1
    """How many processes load the model. Several need a --cache-dir that they share."""
    num_gpus: float | None = None
    """GPUs of each; by default as many as --tensor says. 0 computes on CPUs."""
    num_cpus: float = 1.0
    """CPU cores of each, which read videos."""


@dataclasses.dataclass(frozen=True)
class Args(ServiceArgs):
    """Answers questions about videos over HTTP with replicas on a Ray cluster."""

    access: tyro.conf.OmitArgPrefixes[AccessArgs] = dataclasses.field(default_factory=AccessArgs)
    cluster: tyro.conf.OmitArgPrefixes[ReplicaArgs] = ReplicaArgs()
    warm_up: int = 128
    """Before a replica takes requests, compiles what questions about a video of so many frames need; 0 compiles it for
    the first questions."""


def main() -> int:
    """Runs the replicas until a signal ends them, and returns the exit status."""
    with flag_errors():
        args = tyro.cli(Args)
    from xl2jax.ray.cluster import check_share, cluster, require_ray, room_for

    require_ray()
    check_service(args)
    check_warm_up(args.warm_up, args.limits.max_frames)
    key, asked, access = check_access(args.access), args.cluster, args.access
    devices = args.split.devices()
    num_gpus = float(devices.tensor) if asked.num_gpus is None else asked.num_gpus
    check_share(num_gpus, asked.num_cpus, asked.replicas, "--replicas", devices.tensor)
    if asked.replicas > 1 and args.keep.cache_dir is None:
        raise UserError("--replicas: several need a --cache-dir that they share, for uploads and watched videos")
    args = _absolute(args)
    from xl2jax.checkpoint.params import stored_config
    from xl2jax.checkpoint.sources import find_checkpoint
    from xl2jax.ray.serving import Access, application
    from xl2jax.serving import server

    devices.check(stored_config(find_checkpoint(args.checkpoint), args.compute.weights))
    with server.listen(access.host, access.port) as listening:  # a taken port is reported before models are loaded
        port = listening.getsockname()[1]
    with contextlib.redirect_stdout(sys.stderr), cluster(asked.address):  # Ray prints what its processes say
        room_for(asked.replicas, num_gpus, asked.num_cpus, "replicas")
        app = application(
            args,
            access=Access(key, LOOPBACK if is_loopback(access.host) else None),
            warm_up=args.warm_up,
            replicas=asked.replicas,
            num_gpus=num_gpus,
            num_cpus=asked.num_cpus,
            grace_seconds=access.grace_seconds,
        )
        _run(app, access.host, port)
    logger.info("the replicas have ended")
    return 0


def _absolute(args: Args) -> Args:
    """Replicas have other working directories."""
    media, keep = args.media, args.keep
    roots = tuple(Path(os.path.abspath(root)) for root in media.media_root)
    folder = None if keep.cache_dir is None else Path(os.path.abspath(keep.cache_dir))
    name = args.checkpoint.rstrip("/").rpartition("/")[2].partition("@")[0]
    return dataclasses.replace(
        args,
        checkpoint=os.path.abspath(args.checkpoint) if os.path.exists(args.checkpoint) else args.checkpoint,
        model_name=args.model_name or name or None,
        media=dataclasses.replace(media, media_root=roots),
        keep=dataclasses.replace(keep, cache_dir=folder),
    )


def _run(app: object, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT. What runs then is finished; a second signal ends it at once."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from xl2jax.ray.serving import NAME

    with _ended_by_signal() as ended:
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
        try:
            serve.run(app, name=NAME, route_prefix="/", logging_config=quiet)
            shown = f"[{host}]" if ":" in host else host
            logger.info("serving on http://%s:%d/v1, with a page at http://%s:%d/", shown, port, shown, port)
            ended.wait()
            logger.info("shutting down: what runs is finished first")
        except (RuntimeError, TimeoutError) as e:
            found = serve.status().applications.get(NAME)
            said = [] if found is None else [deployment.message for deployment in found.deployments.values()]
            raise UserError(f"the replicas did not start ({_cause(said) or first_line(e)})") from None
        finally:
            serve.delete(NAME)


def _cause(said: Sequence[str]) -> str | None:
    """The UserError of a replica in what Ray says about its deployments."""
    lines = [line for message in said for line in message.splitlines() if "UserError: " in line]
    return lines[-1].partition("UserError: ")[2] if lines else None


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets."""
    ended = threading.Event()

    def handle(number: int, frame: object) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
