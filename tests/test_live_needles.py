"""The tool that measures what is remembered for how long."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "live_needles.py"


@pytest.mark.slow
def test_needles_by_age_are_measured_and_resumed(checkpoint: Path, tmp_path: Path) -> None:
    """A second run adds the streams that are missing, and draws without a model."""
    results, picture = tmp_path / "results.jsonl", tmp_path / "by-age.png"

    def run(*flags: object) -> subprocess.CompletedProcess[str]:
        fixed = ("--checkpoint", checkpoint, "--ages", "1,6", "--budgets", "all,pooled", "--dense-minutes", 1)
        command = [sys.executable, TOOL, *fixed, "--processes", 1, "--json", results, *flags]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)

    first = run("--streams", 1)
    assert first.returncode == 0, first.stderr
    header, *rows = map(json.loads, results.read_text().splitlines())
    assert header["ages"] == [1, 6]
    assert [(row["stream"], row["budget"]) for row in rows] == [(0, "all"), (0, "pooled")]
    for row in rows:
        assert {a["age"] for a in row["answers"]} == {1, 6}
        assert row["held"][-1][0] == 8  # minutes
        assert all(a["read"] != "forgotten" for a in row["answers"])
        assert (row["held"][-1][2] > 0) == (row["budget"] == "all")  # MiB in host memory
    assert all(a["read"] == "pooled" for a in rows[1]["answers"] if a["age"] == 6)

    kept = results.read_text().splitlines()
    results.write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20])  # it was killed while it wrote
    second = run("--streams", 1)
    assert second.returncode == 0, second.stderr
    assert [json.loads(line).get("budget") for line in results.read_text().splitlines()] == [None, "all", "pooled"]
    third = run("--streams", 0, "--plot", picture)
    assert third.returncode == 0, third.stderr
    assert "1 min" in third.stdout
    assert picture.read_bytes()[1:4] == b"PNG"
    other = run("--streams", 1, "--seed", 5)
    assert other.returncode == 2
    assert "was made with other settings" in other.stderr
