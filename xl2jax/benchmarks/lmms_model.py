"""The class that lmms-eval loads. It imports lmms-eval, and with it PyTorch: nothing else in the package imports it."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

import xl2jax
from xl2jax.benchmarks.engine import ModelEngine
from xl2jax.benchmarks.lmms_plugin import PluginSettings, Request, VideoAnswers
from xl2jax.errors import UserError
from xl2jax.system.backend import start_backend


class XL2JAX(lmms):
    """`--model xl2jax --model_args pretrained=FOLDER,setting=chunked,max_frames=400`.

    Args:
      pretrained: Orbax folder, PyTorch folder or hub id.
      dtype, weights: see `xl2jax.load`.
      batch_size, device: lmms-eval gives them to every model. One video is watched at a time, on JAX's default device.
      settings: fields of `PluginSettings`.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Any = None,
        weights: Any = None,
        batch_size: Any = 1,
        device: Any = None,
        **settings: Any,
    ):
        super().__init__()
        known = {*PluginSettings.__dataclass_fields__, "max_batch_size"}
        if unknown := sorted(settings.keys() - known):
            raise UserError(f"model_args: {', '.join(unknown)} is unknown; choose from {', '.join(sorted(known))}")
        settings.pop("max_batch_size", None)
        chosen = PluginSettings(**settings)
        chosen.view()  # refused before weights are read
        start_backend()
        self._answers = VideoAnswers(ModelEngine(xl2jax.load(pretrained, dtype=dtype, weights=weights)), chosen)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        parsed = []
        for prompt, options, doc_to_visual, doc_id, task, split in [request.args for request in requests]:
            parsed.append(Request.parse(prompt, options, doc_to_visual(self.task_dict[task][split][doc_id])))
        with tqdm(total=len(parsed), desc="answer", unit="question") as bar:
            replies = self._answers.answer(parsed, bar.update)
        return [
            GenerationResult(reply.text.strip(), TokenCounts(reply.input_tokens, reply.output_tokens))
            for reply in replies
        ]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise UserError("xl2jax answers questions; it computes no likelihoods for lmms-eval")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise UserError("xl2jax answers single questions in lmms-eval, not rounds of them")
