"""The notebook runs from its first cell to its last, without Jupyter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program = tmp_path / "quickstart.py"
    program.write_text("\n\n".join([*cells, "print('right:', all(a.text == known[a.question] for a in answers))"]))
    env = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(program)], cwd=ROOT / "examples", env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^\d+ frames, \d+ groups, \d+ tokens$", run.stdout, re.MULTILINE), run.stdout
    assert run.stdout.rstrip().endswith("right: True"), run.stdout
    assert list(tmp_path.glob("*/timeline.png"))
