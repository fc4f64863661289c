"""The documentation is of this code: links lead somewhere, names exist, generated pages are fresh."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

import xl2jax
from xl2jax.evaluation import case
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges
from xl2jax.prompt import PREFIX

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "checkpoints/README.md", ROOT / "checkpoints/demo/README.md"]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as hosting sites make them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target}: no such file"
        assert place.is_relative_to(ROOT), f"{target}: leaves the repository"
        if anchor:
            assert anchor in anchors(place), f"{target}: no such heading"


def test_every_page_is_in_the_menu() -> None:
    # The configuration names Python objects nowhere, so that the safe loader reads it.
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(part)

    named = set(leaves(config["nav"]))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} <= named


def test_the_command_line_reference_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "cli_reference.py"), "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    marked = re.findall(r"<!-- api: ([\w.]+)(?: \w+)* -->", text)
    headings = set(re.findall(r"^## (\w+)$", text, re.MULTILINE))
    assert headings == set(xl2jax.__all__) - {"PRESETS"}
    assert "xl2jax.PRESETS" in text
    for path in marked:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(xl2jax, name)
    assert {path.rpartition(".")[2] for path in marked} == headings


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples(page: Path) -> None:
    """They parse, and what they take from the package is there."""
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "xl2jax":
                assert node.attr in xl2jax.__all__


def test_the_worked_example_of_the_architecture() -> None:
    """The table's ranges are those of the code."""
    layout, config = VideoLayout(prefix=3, time_lengths=(2,) * 6, visual_tokens=4), PrefillConfig(2, 1)
    tokens = natural_ranges(layout, 0, 16, config)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:time|visual) tokens of group \d \|(.+)\|$", text, re.MULTILINE)
    assert len(rows) == 4

    def numbers(cell: str) -> list[int]:
        first, *rest = map(int, re.findall(r"\d+", cell))
        return list(range(first, rest[0] + 1)) if rest else [first]

    for row in rows:
        position, *others = map(numbers, row.split("|"))
        for column, values in zip((tokens.slot, *tokens.ranges), others, strict=True):
            np.testing.assert_array_equal(column[position], values if len(values) > 1 else values * len(position))


OTHERS = {"--gpus", "--help", "--local-dir", "--rm"} | {
    "--model",
    "--tasks",
    "--output_path",
    "--log_samples",
    "--model_args",
    "--array",
    "--block",
    "--cpus-per-task",
    "--gpus-per-node",
    "--gres",
    "--head",
    "--include-dashboard",
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--pictures",
    "--requeue",
    "--xla_force_host_platform_device_count",
}
"""Flags of Docker, of the hub's client, of every command, of lmms-eval, of Ray, of SLURM, of XLA, and of the recipe's data sets."""


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "cli.md"], ids=name_of)
def test_flags_exist(page: Path, dump_case: ModuleType) -> None:
    """Every flag that a page names is one of the commands, of a tool that the page names, or of another program."""
    known = set(re.findall(r"`(--[\w-]+)`", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")))
    known |= set(re.findall(r"--[\w-]+", dump_case.parser().format_help())) | OTHERS
    text = page.read_text(encoding="utf-8")
    for tool in set(re.findall(r"tools/\w+\.py", text)):  # flags are the fields of its arguments
        fields = re.findall(r"^    (\w+): ", (ROOT / tool).read_text(encoding="utf-8"), re.MULTILINE)
        known |= {f"--{name.replace('_', '-')}" for name in fields}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


@pytest.fixture(scope="module")
def dump_case(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("dump_case")


def test_a_dumped_case_has_the_inputs_that_verify_computes(dump_case: ModuleType) -> None:
    pixels = dump_case.case_pixels(3, 20)
    np.testing.assert_array_equal(pixels.transpose(0, 2, 3, 1), case.case_pixels(3, 20))
    assert "".join(PREFIX) == dump_case.PREFIX
    assert dump_case.VIDEO_ID == case.VIDEO_ID


def test_a_dumped_case_has_the_tokens_of_its_times(dump_case: ModuleType) -> None:
    class Characters:
        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    ids, video, times = dump_case.token_ids(Characters(), 8, "What?")
    assert ids.count(dump_case.VIDEO_ID) == 1
    assert times == [len("Time 0.0s:"), len("Time 4.0s:")]
    assert len(video) == sum(times) + 2 * dump_case.VISUAL_TOKENS
    assert video.count(dump_case.PLACEHOLDER) == 2 * dump_case.VISUAL_TOKENS


def test_the_site_builds() -> None:
    """Strictly; only where the `docs` extra is installed."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
