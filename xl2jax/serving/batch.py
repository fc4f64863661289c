"""Answers the lines of a file in OpenAI's batch format, through the same interface as a server's requests.

A killed run goes on where it was: lines whose `custom_id` is in the output are not asked again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import httpx2
from pydantic import Field
from tqdm import tqdm

from xl2jax.errors import UserError
from xl2jax.serving.app import make_app
from xl2jax.serving.service import Service
from xl2jax.system.json_lines import append_line, finished_lines, locked_lines
from xl2jax.system.schema import Schema, parse_json, require_regular, unreadable

logger = logging.getLogger(__name__)

_MAX_LINE = 256 << 20


class _Line(Schema):
    """A request of the input."""

    custom_id: Annotated[str, Field(min_length=1, max_length=1024)]
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"]
    body: dict[str, Any]


class _Done(Schema):
    """What is read of a line of the output."""

    custom_id: str


def check_input(path: Path, shard: tuple[int, int]) -> int:
    """How many lines of a shard there are. Raises UserError for a line that is no request, or a `custom_id` twice."""
    seen: set[str] = set()
    for line in _read(path):
        if line.custom_id in seen:
            raise UserError(f"{path}: the custom_id {line.custom_id!r} is there twice")
        seen.add(line.custom_id)
    if not seen:
        raise UserError(f"{path}: holds no request")
    return len(range(shard[0], len(seen), shard[1]))


def check_output(path: Path) -> None:
    """Raises UserError for a file of answers that cannot be read or that holds something else."""
    for _ in finished_lines(path, _Done, repair=False):
        pass


def run_batch(service: Service, source: Path, target: Path, shard: tuple[int, int], count: int) -> tuple[int, int]:
    """Appends an answer to `target` for each line of `source`: (answered, of which failed) in this run.

    `shard` (i, n) takes the lines i, i + n, i + 2 n and so on, counted from 0; `count` is their number.

    Raises UserError where `target` cannot be written, holds something else, or is written by another process.
    """
    lines = (line for number, line in enumerate(_read(source)) if number % shard[1] == shard[0])
    try:
        with (
            locked_lines(target, "give each run an --output of its own") as out,
            tqdm(total=count, desc="answer", unit="request") as bar,
        ):
            done = {line.custom_id for line in finished_lines(target, _Done, repair=True)}
            todo = (line for line in lines if line.custom_id not in done)
            bar.update(len(done))
            service.engine.start()
            try:
                return asyncio.run(_answer_all(service, todo, out, bar))
            finally:
                service.engine.stop()
    except OSError as e:
        raise UserError(f"{target}: cannot be written ({e.strerror})") from None


async def _answer_all(service: Service, todo: Iterator[_Line], out: IO[bytes], bar: Any) -> tuple[int, int]:
    answered = failed = 0

    async def work(http: httpx2.AsyncClient) -> None:
        nonlocal answered, failed
        for line in todo:  # shared by all workers: each takes the next line
            response = await http.post(line.url, json={**line.body, "stream": False}, timeout=None)
            body = response.json()
            row = {
                "id": f"batch_req_{secrets.token_hex(12)}",
                "custom_id": line.custom_id,
                "response": {"status_code": response.status_code, "request_id": secrets.token_hex(12), "body": body},
                "error": None if response.is_success else body["error"],
            }
            append_line(out, row)
            answered, failed = answered + 1, failed + (not response.is_success)
            bar.update(1)

    transport = httpx2.ASGITransport(make_app(service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
        # Twice as many as are decoded at a time: the videos of the next ones are watched meanwhile.
        workers = min(2 * service.limits.answers, service.limits.queue)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work(http))
        except ExceptionGroup as failures:  # the output cannot be written, say, which all would find
            raise failures.exceptions[0] from None
    return answered, failed


def _read(path: Path) -> Iterator[_Line]:
    try:
        require_regular(path)
        with open(path, "rb") as f:
            number = 0
            while text := f.readline(_MAX_LINE + 1):
                number += 1
                if len(text) > _MAX_LINE:
                    raise UserError(f"{path}: line {number}: has more than {_MAX_LINE:,} bytes")
                if text.strip():
                    yield parse_json(text, _Line, f"{path}: line {number}")
    except OSError as e:
        raise unreadable(path, e) from None
