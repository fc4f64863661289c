"""The plugin of lmms-eval, against a stub of the parts of its API that are used (version 0.7.3)."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmark_runs import StubEngine, stub_model

import xl2jax
from xl2jax.benchmarks import engine
from xl2jax.benchmarks.lmms_plugin import PluginSettings, Request
from xl2jax.errors import UserError
from xl2jax.system import backend


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> StubEngine:
    """Stubs of lmms-eval and of the loaded model."""

    @dataclasses.dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    @dataclasses.dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None

    @dataclasses.dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    class lmms:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    names: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": lmms},
    }
    for name, members in names.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    made = StubEngine()
    monkeypatch.setattr(engine, "ModelEngine", lambda model: made)
    monkeypatch.setattr(xl2jax, "load", lambda *args, **options: stub_model())
    monkeypatch.setattr(backend, "start_backend", lambda: None)
    monkeypatch.delitem(sys.modules, "xl2jax.benchmarks.lmms_model", raising=False)
    return made


def model_class() -> Any:
    (point,) = (p for p in entry_points(group="lmms_eval.models") if p.name == "xl2jax")
    manifest = point.load()()
    assert manifest.model_id == "xl2jax"
    module, _, name = manifest.simple_class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_requests_are_answered_in_order(stubbed: StubEngine, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"video")
    model = model_class()(pretrained="x", setting="pure", max_frames=64, batch_size=1, device="cuda:0")
    docs = [{"video": str(tmp_path / f"{'ab'[n % 2]}.mp4"), "n": n} for n in range(5)]
    model.task_dict = {"videomme": {"test": docs}}
    options = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    requests = [
        SimpleNamespace(args=(f"Question {n} at 00:07?", options, lambda doc: [doc["video"]], n, "videomme", "test"))
        for n in range(5)
    ]
    results = model.generate_until(requests)
    assert sorted(stubbed.watched) == ["a.mp4", "b.mp4"]  # each once
    from benchmark_runs import StubVideo

    from xl2jax.benchmarks.engine import Ask

    for n, result in enumerate(results):
        expected = StubVideo(Path(docs[n]["video"]), 0).ask(Ask(f"Question {n} at 00:07?", 16))
        assert result.text == expected.text
        assert (result.token_counts.input_tokens, result.token_counts.output_tokens) == (100, 2)
    (view,) = {view for _, view in stubbed.opened}
    assert (view.sampling.max_frames, view.prefill.window_chunks, view.bilevel) == (64, None, None)
    with pytest.raises(UserError, match="no likelihoods"):
        model.loglikelihood([])


def test_what_it_cannot_do_is_refused(stubbed: StubEngine) -> None:
    with pytest.raises(UserError, match="frames is unknown; choose from chunk_groups"):
        model_class()(pretrained="x", frames=3)
    with pytest.raises(UserError, match="choose from pure, chunked, bilevel"):
        PluginSettings(setting="paper").view()  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one video file, not about 0"):
        Request.parse("?", {}, [object()])
    with pytest.raises(UserError, match="decodes greedily"):
        Request.parse("?", {"temperature": 1.0}, ["a.mp4"])
    assert Request.parse("?", {}, ["a.mp4", {"video_read_type": "img"}]) == Request("?", Path("a.mp4"), 1024)
