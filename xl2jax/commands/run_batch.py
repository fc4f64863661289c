"""`xl2jax run-batch`: answers a file of chat requests in OpenAI's batch format."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Annotated

import tyro

from xl2jax.commands.flags import parse_shard
from xl2jax.commands.service import ServiceArgs, build_service, check_service, spool_folder
from xl2jax.errors import UserError
from xl2jax.system.terminal import flag_errors

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ServiceArgs):
    """Answers a file of chat requests in OpenAI's batch format."""

    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """File of requests, a JSON object a line: custom_id, method, url and body."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File of answers. Those that it holds already are not asked again."""
    shard: str = "1/1"
    """i/n answers every n-th request from the i-th on, so that n runs share a file; each needs its own output."""


def main() -> int:
    """Runs the command and returns its exit status."""
    with flag_errors():
        args = tyro.cli(Args)
    check_service(args)
    shard = parse_shard(args.shard, first=1)
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise UserError("--input and --output name the same file")
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"{args.output}: no such folder")
    from xl2jax.serving.batch import check_input, check_output, run_batch

    check_output(args.output)
    count = check_input(args.input, shard)
    with spool_folder("xl2jax-batch") as spool:
        service = build_service(args, spool)
        answered, failed = run_batch(service, args.input, args.output, shard, count)
    logger.info("%d requests answered, %d of them with an error", answered, failed)
    return 0
