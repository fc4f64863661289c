"""Joins a Ray cluster, or starts one on this machine, and knows how many actors it has room for."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import socket
from collections.abc import Iterator
from typing import Any

from xl2jax.errors import UserError, first_line, require_whole

LOCAL = "local"


def require_ray() -> None:
    """Raises UserError where the extra `ray` is not installed."""
    missing = [name for name in ("ray", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this command needs further packages ({', '.join(missing)}): pip install 'xl2jax[ray]'")


def check_share(num_gpus: float, num_cpus: float, count: int | None, name: str, tensor: int = 1) -> None:
    """Raises UserError unless these are GPUs and CPUs of one actor, and a number of actors or None.

    Ray gives an actor a part of one GPU or several whole ones, over all of which its model is split: `tensor` is how many.
    `name` is that of the number's flag.
    """
    for flag, value in (("--num-gpus", num_gpus), ("--num-cpus", num_cpus)):
        if not (0 <= value < 1e6 and (value <= 1 or value == int(value))):
            raise UserError(f"{flag} must be a whole number, or a share from 0 to 1, not {value:g}")
    if num_gpus == num_cpus == 0:
        raise UserError("--num-gpus and --num-cpus are both 0: an actor needs one of them")
    if num_gpus and math.ceil(num_gpus) != tensor:
        raise UserError(
            f"--num-gpus {num_gpus:g} with --tensor {tensor}: a model uses as many GPUs as it is split over; "
            f"leave --num-gpus out, or give --tensor {math.ceil(num_gpus)}"
        )
    if count is not None:
        require_whole(name, count, 1)


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Joins the cluster at `address`, and leaves it in the end; a Ray that runs in this process already is used as it is.

    None takes RAY_ADDRESS of the environment; without it Ray is started on this machine, and ended again. Ray's reports of
    its use to its makers are off, unless the environment has a setting for them.

    Raises UserError where no cluster can be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        _require_reachable(address)  # Ray itself would try for minutes
        ray.init(address=address, logging_level=logging.WARNING, **options)
    except (ValueError, RuntimeError, OSError, OverflowError) as e:
        where = "started on this machine" if address == LOCAL else f"reached at {address}"
        raise UserError(f"Ray cannot be {where} ({first_line(e)})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Raises OSError where `address` is a host and a port at which nobody listens."""
    host, colon, port = address.rpartition(":")
    if colon and port.isascii() and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def room_for(count: int | None, num_gpus: float, num_cpus: float, what: str) -> int:
    """`count`, or as many actors as the cluster has room for. What other jobs hold counts as room: Ray waits for it.

    Raises UserError where the cluster could never start them.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def fits(node: dict[str, float]) -> int:
        shares = [(node.get("GPU", 0.0), num_gpus), (node.get("CPU", 0.0), num_cpus)]
        return min(math.floor(has / need + 1e-6) for has, need in shares if need)

    room = sum(fits(node) for node in nodes)
    if room < (count or 1):
        has = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("GPU", "CPU")}
        raise UserError(
            f"the cluster has no room for {count or 1} {what} of {num_gpus:g} GPUs and {num_cpus:g} CPUs each: its "
            f"{len(nodes)} nodes have {has['GPU']:g} GPUs and {has['CPU']:g} CPUs, room for {room} (--num-gpus, --num-cpus)"
        )
    return count or room
