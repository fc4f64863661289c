from __future__ import annotations

import json
from collections.abc import Callable

from xl2jax import bench


def test_rows(command: Callable[..., tuple[int, str, str]]) -> None:
    """Both benchmarks at the smallest preset: a process a row, the promised fields."""
    status, out, err = command(bench.main, "prefill", "--preset", "tiny", "--groups", "9", "--json")
    assert status == 0, err
    rows = json.loads(out)
    assert [(r["mode"], r["groups"], r["tokens"]) for r in rows] == [
        ("chunked", 9, 14 + 9 * 11),
        ("dense", 9, 14 + 9 * 11),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert {"compile_seconds", "tokens_per_s", "peak_memory_bytes"} <= row.keys()
    status, out, err = command(
        bench.main, "decode", "--preset", "tiny", "--groups", "24", "--modes", "bilevel", "--json"
    )
    assert status == 0, err
    (row,) = json.loads(out)
    # 6 chunks: the ends and the best two are dense, two of 4 groups keep 1 of 4 visual tokens.
    assert row["context_tokens"] == row["tokens"] - 2 * 4 * 3
    assert row["step_ms"] > 0


def test_bad_options(refused: Callable[..., str]) -> None:
    assert "--groups" in refused(bench.main, "prefill", "--groups", "many")
    assert "--modes" in refused(bench.main, "decode", "--modes", "chunked")
    assert "--preset" in refused(bench.main, "prefill", "--preset", "huge")
    assert "must be 1 or more" in refused(bench.main, "prefill", "--chunk-groups", "0")
    assert "needs a GPU" in refused(bench.main, "kernels")
