"""The structure of the package: imports go one way, models read no files, and NNX is used without state."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "xl2jax"

LAYERS = [
    {"errors", "arithmetic"},
    {"system"},
    {"config"},
    {"prompt"},
    {"ops"},
    {"models"},
    {"checkpoint", "video"},
    {"inference"},
    {"serving"},
    {"training"},
    {"evaluation"},
    {"benchmarks"},
    {"testing"},
    {"recipes"},
    {"commands", "bench", "ray"},
]
"""Packages from the lowest to the highest. A module imports from its own package and from layers below it."""

COMPUTED = {"ops", "models"}
"""Packages of pure computation, which open no file."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> dict[str, bool]:
    """Modules of this package that a file imports, and whether that happens when the file itself is imported."""
    imported: dict[str, bool] = {}

    def visit(node: ast.AST, now: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = now and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inner = False
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.module:
                names = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
            for name in names:
                if name.split(".")[0] == "xl2jax":
                    imported[name] = imported.get(name, False) or now
            visit(child, inner)

    visit(ast.parse(path.read_text()), True)
    return imported


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if len(parts) < 2:
        return None
    return next((i for i, layer in enumerate(LAYERS) if parts[1] in layer), None)


def wrong_directions(files: dict[str, dict[str, bool]]) -> list[str]:
    """Imports that go up, or sideways into another package of the same layer. Those inside functions count too."""
    wrong = []
    for module, imported in files.items():
        layer = layer_of(module)
        if layer is None:
            continue
        for name in imported:
            other = layer_of(name)
            sideways = other == layer and name.split(".")[1] != module.split(".")[1] and layer != len(LAYERS) - 1
            if other is not None and (other > layer or sideways):
                wrong.append(f"{module} imports {name}")
    return wrong


def cycles(files: dict[str, dict[str, bool]]) -> list[list[str]]:
    """Cycles of imports, with those inside functions."""
    edges = {m: {n for n in names if n in files and n != m} for m, names in files.items()}
    rings: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            rings.append(path[path.index(module) :])
            return
        if module in done:
            return
        for other in sorted(edges[module]):
            walk(other, [*path, module])
        done.add(module)

    for module in edges:
        walk(module, [])
    return rings


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, bool]]:
    return {module_name(path): imports(path) for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_package_has_a_place(files: dict[str, dict[str, bool]]) -> None:
    tops = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert tops - {"__init__", "__main__"} == set().union(*LAYERS)


def test_imports_go_one_way(files: dict[str, dict[str, bool]]) -> None:
    assert wrong_directions(files) == []


def test_no_cycle(files: dict[str, dict[str, bool]]) -> None:
    assert cycles({m: n for m, n in files.items() if m not in ("xl2jax", "xl2jax.__main__")}) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("xl2jax.models.qwen2", "xl2jax.inference.cache"),
        ("xl2jax.ops.ranges", "xl2jax.models.layers"),
        ("xl2jax.video.clip", "xl2jax.checkpoint.hub"),
        ("xl2jax.inference.cache", "xl2jax.training.loss"),
    ],
)
def test_a_planted_import_is_seen(files: dict[str, dict[str, bool]], module: str, imported: str) -> None:
    planted = {**files, module: {**files[module], imported: False}}
    assert wrong_directions(planted) == [f"{module} imports {imported}"]


def test_a_planted_cycle_is_seen(files: dict[str, dict[str, bool]]) -> None:
    planted = {**files, "xl2jax.inference.cache": {**files["xl2jax.inference.cache"], "xl2jax.inference.prefill": True}}
    planted = {m: n for m, n in planted.items() if m not in ("xl2jax", "xl2jax.__main__")}
    assert any({"xl2jax.inference.cache", "xl2jax.inference.prefill"} <= set(ring) for ring in cycles(planted))


def test_computing_touches_no_file() -> None:
    for package in COMPUTED:
        for path in (PACKAGE / package).glob("*.py"):
            tree = ast.parse(path.read_text())
            called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert not called & {"open", "print", "input"}, path
            names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not names & {"os", "pathlib", "io"}, path


BANNED = {"jit", "grad", "value_and_grad", "scan", "while_loop", "Optimizer", "Cache", "sow", "remat"}
"""Transforms of flax.nnx that carry state in modules. Modules are split once, and jax transforms run on parameters.
(`nnx.vmap` and `nnx.split_rngs` stack layers when a model is made, and `nnx.eval_shape` makes an abstract one.)"""


def stateful_nnx(source: str) -> list[str]:
    """Banned names of flax.nnx that a module uses."""
    used = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx"):
            used.append(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "flax.nnx":
            used += [alias.name for alias in node.names]
    return sorted(BANNED & set(used))


def test_no_stateful_nnx() -> None:
    assert {str(path): used for path in PACKAGE.rglob("*.py") if (used := stateful_nnx(path.read_text()))} == {}


@pytest.mark.parametrize("source", ["from flax.nnx import jit", "from flax import nnx\nf = nnx.jit(g)"])
def test_a_planted_stateful_transform_is_seen(source: str) -> None:
    assert stateful_nnx(source) == ["jit"]


def test_no_hidden_device_state() -> None:
    """Choices by device are made in `Network.create` or when a program is lowered, never while tracing."""
    for package in COMPUTED:
        for path in (PACKAGE / package).glob("*.py"):
            text = path.read_text()
            assert "default_backend" not in text, path
            # cuDNN's attention can be traced only where a GPU is present: the one question that `dense` may ask.
            assert text.count("devices(") == (path.name == "dense.py"), path


LEFT_OUT = {"test_benchmark_synthetic", "test_serve_command", "test_serving_soak", "test_soak", "test_terminal"}
"""Files whose slow tests CI does not run: repeated kills and long runs, which take minutes each."""


def test_ci_runs_the_slow_tests() -> None:
    run = (PACKAGE.parent / ".ci" / "run").read_text()
    slow = {path.stem for path in Path(__file__).parent.glob("test_*.py") if "pytest.mark.slow" in path.read_text()}
    slow -= {Path(__file__).stem}
    assert {name for name in slow if f"tests/{name}.py" not in run} == LEFT_OUT
