"""The Python API: load a model, let it watch a video once, ask it many questions.

model = xl2jax.load("BAAI/Video-XL-2")
print(model.chat("clip.mp4", "What happens?"))

video = model.watch("lecture.mp4")           # frames -> KV cache, once
for question in questions:
    print(model.ask(video, question).text)   # selection, question and answer only
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL.Image import Image
from tqdm import tqdm

from xl2jax.checkpoint.params import ParamReader
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.config import GRIDS, VideoXL2Config, Weights
from xl2jax.errors import UserError, require_whole
from xl2jax.inference import compiled, memory
from xl2jax.inference.answering import Answer, Answering, decode
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.decoding import MOST_TOGETHER
from xl2jax.inference.devices import Devices
from xl2jax.inference.generate import TokenSampling, check_answer_options
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.live import Frame, LiveVideo
from xl2jax.inference.live_sizes import LiveMemory, LiveSizes, check_rate
from xl2jax.inference.network import LARGE_KEY_BIAS, Network
from xl2jax.inference.pictures import Surroundings, surroundings
from xl2jax.inference.prefill import PrefillPlan, make_plan
from xl2jax.inference.selection import RelevanceConfig, check_bilevel, check_pool
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.inference.watching import Watching
from xl2jax.models.param_tree import flatten
from xl2jax.models.sharding import head_copies, single_heads, with_head_copies, without_head_copies
from xl2jax.prompt import PromptTokenizer, Turn, suffix
from xl2jax.video.clip import Backend, Clip, FrameSampling, open_video
from xl2jax.video.live_clock import ClockMode
from xl2jax.video.live_source import Stream
from xl2jax.video.pictures import Picture

logger = logging.getLogger(__name__)


class Model:
    """A loaded checkpoint. The module's docstring shows its use.

    `implementation` names the implementation of arena attention. "auto" chooses one by the device and logs the choice.
    """

    def __init__(
        self,
        config: VideoXL2Config,
        params: nnx.State,
        tokenizer: PromptTokenizer,
        *,
        implementation: str = "auto",
        mesh: Mesh | None = None,
        head_copies: int = 1,
    ):
        """`mesh` and `head_copies`: see `Network`."""
        self.network = Network.create(config, params, implementation, mesh=mesh, head_copies=head_copies)
        self.tokenizer = tokenizer
        self._videos: weakref.WeakSet[WatchedVideo | LiveVideo] = weakref.WeakSet()
        self._alone = surroundings(tokenizer, config, video=True)
        self._logged_exact_channels = False

    @property
    def config(self) -> VideoXL2Config:
        return self.network.config

    @property
    def params(self) -> nnx.State:
        return self.network.params

    @property
    def dtype(self) -> str:
        return self.network.dtype

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the config, the tokenizer and all parameters."""
        network = self.network
        copies, head_width = network.head_copies, self.config.llm.head_width
        config = without_head_copies(self.config, copies)
        digest = hashlib.blake2b(repr(config).encode(), digest_size=16)
        if config.picture_grids != GRIDS:
            digest.update(repr(config.picture_grids).encode())
        digest.update(self.tokenizer.tokenizer.to_str().encode())
        for name, value in flatten(self.params).items():
            stored = single_heads(name, value, copies, head_width)
            digest.update(f"{name} {int(compiled.checksum(stored))} ".encode())
        return digest.hexdigest()

    @functools.cached_property
    def key_channels(self) -> int:
        """How many channels of each key KV in 8 bits keeps as they are (`Network.exact_key_channels`)."""
        channels = self.network.exact_key_channels()
        return 0 if channels is None else channels.shape[-1]

    def _log_exact_channels(self) -> None:
        """Says, once, that some channels of the keys keep 16 bits."""
        if self.key_channels and not self._logged_exact_channels:
            self._logged_exact_channels = True
            norms = self.network.key_bias_norms()
            logger.info(
                "KV in 8 bits keeps %d channels of each key in %s: keys have large biases (norm up to %.0f in a head, in "
                "%d of %d layers above %.0f)",
                self.key_channels, self.dtype, norms.max(), (norms.max(axis=1) > LARGE_KEY_BIAS).sum(), len(norms),
                LARGE_KEY_BIAS,
            )  # fmt: skip

    # --- the video, once ---------------------------------------------------------------------

    def watch(
        self,
        video: str | Path | Clip,
        sampling: FrameSampling | None = None,
        config: PrefillConfig | None = None,
        *,
        backend: Backend = "auto",
        folder_fps: float = 1.0,
        bilevel: BilevelConfig | None = BilevelConfig(),  # noqa: B008 (frozen)
        cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
        progress: bool = False,
        measure_stages: bool = False,
    ) -> WatchedVideo:
        """Reads, encodes and prefills a video.

        `timings` of the result holds seconds: `read` was spent waiting for frames, `compute` is all the rest.

        Args:
          video: a file, a folder of images, or an opened clip. `sampling`, `backend` and `folder_fps` have no effect
            on an opened clip.
          sampling: which frames are read.
          config: chunk size and window of the prefill.
          backend, folder_fps: see `open_video`.
          bilevel: how questions will read the video; the check of free memory counts what they will need.
          cache: the precision of the KV, and in which memory it is kept.
          progress: shows a progress bar on stderr.
          measure_stages: puts `vision` and `prefill` into `timings` instead of `compute`. Every stage is waited for
            then, which costs time.

        Raises:
          UserError: unreadable video, more frames than memory holds, or activations that are not finite.
        """
        started = time.perf_counter()
        clip = (
            video
            if isinstance(video, Clip)
            else open_video(video, sampling or FrameSampling(), backend=backend, folder_fps=folder_fps)
        )
        watching = self.start_watch(
            clip, config, bilevel=bilevel, cache=cache, measure_stages=measure_stages, started=started
        )
        return self._watched(watching, progress)

    def see(
        self,
        pictures: Sequence[str | Path | np.ndarray | Image | Picture],
        text: str | None = None,
        *,
        video: str | Path | Clip | None = None,
        sampling: FrameSampling | None = None,
        config: PrefillConfig | None = None,
        bilevel: BilevelConfig | None = BilevelConfig(),  # noqa: B008 (frozen)
        cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
        progress: bool = False,
    ) -> WatchedVideo:
        """Reads, encodes and prefills pictures in tiles, as `watch` does a video. Questions are asked in the same way.

        Without pictures and without a video, questions are about nothing but their text.

        Args:
          pictures: image files, uint8 arrays [height, width, 3] or PIL images.
          text: what stands before the question, with `<image>` in the place of each picture and `<video>` in that of the
            video. By default they come first, as in upstream's evaluation.
          video: a video beside the pictures. `sampling`, `config` and `bilevel` are those of `watch`.
          cache, progress: those of `watch`. Only a video's KV is offloaded; that of pictures stays on the device.

        Raises:
          UserError: a picture or the video cannot be read, the text has another number of places, more than memory holds.
        """
        around = self.around([Picture.of(p, n) for n, p in enumerate(pictures, 1)], text, video=video is not None)
        clip = video if isinstance(video, Clip | None) else open_video(video, sampling or FrameSampling())
        return self._watched(self.start_watch(clip, config, around=around, bilevel=bilevel, cache=cache), progress)

    def around(self, pictures: Sequence[Picture], text: str | None = None, *, video: bool = False) -> Surroundings:
        """What a question's context holds beside a video: see `see`. Raises UserError."""
        return surroundings(self.tokenizer, self.config, pictures, text, video=video)

    def _watched(self, watching: Watching, progress: bool) -> WatchedVideo:
        with tqdm(total=watching.total, desc="watch", unit="frame", disable=not progress) as bar:
            for images in watching.batches():
                bar.update(len(images))
                watching.add(images)
        return self.adopt(watching.finish())

    def start_watch(
        self,
        clip: Clip | None,
        config: PrefillConfig | None = None,
        *,
        around: Surroundings | None = None,
        bilevel: BilevelConfig | None = BilevelConfig(),  # noqa: B008 (frozen)
        cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
        measure_stages: bool = False,
        started: float | None = None,
    ) -> Watching:
        """Begins to watch an opened clip a segment at a time; `watch` is this, all of its segments, and `adopt`.

        The arguments are those of `watch`. `around`: pictures and text beside the clip, or without one. `started`: the
        reading of `time.perf_counter()` from which on `timings` count, by default now.

        Raises:
          UserError: the settings do not suit the model or the video, or the video has more frames than memory holds.
        """
        started = time.perf_counter() if started is None else started
        config = config or PrefillConfig()
        around = around or self._alone
        self.check_cache(cache, bilevel)
        time_ids = [] if clip is None else self.tokenizer.time_ids(clip.times)
        layout = self.layout(time_ids, len(around.before.ids), len(around.after.ids))
        if bilevel is not None and clip is not None:
            check_bilevel(bilevel, layout)
        self.check_fits(layout, config, bilevel, cache, tiles=len(around.tiles))
        return Watching(
            self.network,
            clip,
            around,
            layout,
            self.plan(layout, config),
            time_ids,
            cache,
            started=started,
            measure_stages=measure_stages,
        )

    def watch_live(
        self,
        source: str | Path | Iterable[tuple[float | None, Frame]] | None = None,
        *,
        fps: float | None = 1.0,
        clock: ClockMode = "stream",
        config: PrefillConfig | None = None,
        bilevel: BilevelConfig = BilevelConfig(),  # noqa: B008 (frozen)
        cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
        memory: LiveMemory = LiveMemory(),  # noqa: B008 (frozen)
    ) -> LiveVideo:
        """Makes a video that is watched as it comes (`xl2jax.inference.live`), in memory of a fixed size.

        Args:
          source: an address or a path (`xl2jax.video.live_source.Stream`), or (seconds, frame) pairs, where a frame is
            uint8 RGB [height, width, 3] of any size. Without one, frames are fed by `LiveVideo.add`.
          fps: how many frames a second are seen; None sees all.
          clock: stream takes the source's times, wall those at which frames come. The model reads seconds since the first
            frame.
          config: chunk size and window of the prefill.
          bilevel: how questions will read the video. Its pool and chunks cannot change later.
          cache: the precision of the KV.
          memory: what is remembered for how long, and where.

        Raises:
          UserError: the settings do not suit the model or each other, or need more memory than is free.
        """
        if clock not in ("stream", "wall"):
            raise UserError(f"clock must be stream or wall, not {clock}")
        sizes = self.live_sizes(fps=fps, config=config, bilevel=bilevel, cache=cache, memory=memory)
        source = Stream(source) if isinstance(source, str | Path) else source
        live = LiveVideo(
            self.network,
            self.tokenizer,
            self._alone,
            source,
            sizes,
            path=str(getattr(source, "address", "live video")),
            fps=fps,
            clock=clock,
            bilevel=bilevel,
            cache=cache,
            memory=memory,
        )
        self._videos.add(live)
        return live

    def live_sizes(
        self,
        *,
        fps: float | None = 1.0,
        config: PrefillConfig | None = None,
        bilevel: BilevelConfig = BilevelConfig(),  # noqa: B008 (frozen)
        cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
        memory: LiveMemory = LiveMemory(),  # noqa: B008 (frozen)
    ) -> LiveSizes:
        """The sizes of a video of `watch_live`, before it is made. Arguments are those of `watch_live`.

        Raises UserError where the settings do not suit the model or each other.
        """
        if fps is not None:
            check_rate(fps)
        if cache.offload:
            raise UserError("a live video keeps old KV in host memory by itself: leave offload out")
        if self.network.tensor > 1:
            raise UserError("a live video is watched on one device: leave tensor out")
        check_pool(bilevel, self.config.visual_tokens)
        self.check_cache(cache, bilevel)
        return LiveSizes.of(
            self.network,
            self.tokenizer,
            len(self._alone.before.ids),
            fps=fps,
            config=config or PrefillConfig(),
            bilevel=bilevel,
            cache=cache,
            memory=memory,
        )

    def adopt(self, video: WatchedVideo) -> WatchedVideo:
        """Registers a video that this model watched, or that came from a cache file whose key names it. Returns it."""
        self._videos.add(video)
        return video

    def plan(self, layout: VideoLayout, config: PrefillConfig) -> PrefillPlan:
        """Steps and buckets of a video of this layout."""
        return make_plan(layout, config, self.network.platform)

    def check_cache(self, cache: CacheConfig, bilevel: BilevelConfig | None) -> None:
        """Raises UserError where the cache settings do not suit the model's dtype or the way that questions read."""
        cache.check(self.dtype)
        if cache.quantized:
            self._log_exact_channels()
        if cache.offload and bilevel is None:
            raise UserError("offloaded KV is read with bi-level decoding only (dense decoding needs all of it)")

    def check_fits(
        self,
        layout: VideoLayout,
        config: PrefillConfig,
        bilevel: BilevelConfig | None,
        cache: CacheConfig,
        *,
        tiles: int = 0,
        loaded: bool = False,
    ) -> None:
        """Raises UserError where a video of this layout needs more memory than is free. The message says what fits.

        `tiles`: of all pictures. `loaded`: the KV comes from a file, so that its offloaded part is never on the device.
        """
        now = memory.Choices(bilevel, cache.quantized, cache.offload, self.config.llm.weights)
        tensor = self.network.tensor

        def need(layout: VideoLayout, choices: memory.Choices = now) -> memory.MemoryNeed:
            estimate = memory.memory_need(
                self.config.with_weights(choices.weights),
                self.plan(layout, config),
                layout,
                choices.bilevel,
                self.dtype,
                self.network.platform,
                quantized=choices.quantized,
                key_channels=self.key_channels,
                offload=choices.offload,
                tensor=tensor,
                tiles=tiles,
            )
            return dataclasses.replace(estimate, cache=estimate.kept) if loaded else estimate

        def in_all(choices: memory.Choices) -> int:
            """Bytes beside the parameters as they are now."""
            weights = memory.weight_bytes(self.config.with_weights(choices.weights), self.dtype, tensor)
            return need(layout, choices).total + weights - memory.weight_bytes(self.config, self.dtype, tensor)

        def others() -> dict[str, int]:
            options = memory.smaller_options(now, layout.visual_tokens)
            return {f: in_all(choices) for f, choices in options.items() if self.config.can_have(choices.weights)}

        held = sum(v.device_bytes for v in list(self._videos))
        memory.check_fits(layout, need, others, held=held, mesh=self.network.mesh)

    def layout(self, time_ids: list[list[int]], prefix: int | None = None, tail: int = 0) -> VideoLayout:
        """The layout of a video whose groups have these time tokens.

        `prefix`, `tail`: tokens before and behind it, by default those of a video alone.
        """
        prefix = len(self._alone.before.ids) if prefix is None else prefix
        return VideoLayout(prefix, tuple(map(len, time_ids)), self.config.visual_tokens, tail)

    def layout_of(self, clip: Clip | None, around: Surroundings | None) -> VideoLayout:
        """The layout of a clip, or none, and of what stands around it."""
        around = around or self._alone
        time_ids = [] if clip is None else self.tokenizer.time_ids(clip.times)
        return self.layout(time_ids, len(around.before.ids), len(around.after.ids))

    # --- questions, many ---------------------------------------------------------------------

    def ask(
        self,
        video: WatchedVideo | LiveVideo,
        question: str,
        *,
        max_new_tokens: int = 128,
        sampling: TokenSampling | None = None,
        seed: int = 0,
        bilevel: BilevelConfig | None = BilevelConfig(),  # noqa: B008 (frozen)
        relevance: RelevanceConfig | None = None,
        history: Sequence[Turn] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answers a question about a video that this model watched.

        Args:
          max_new_tokens: the answer is cut off at this many tokens.
          sampling: how tokens are sampled; greedy by default.
          bilevel: which KV the answer reads; None reads the whole dense cache.
          relevance: how `bilevel` chooses the chunks that stay dense.
          history: earlier turns: (question, answer) pairs, or messages {"role": "user" | "assistant", "content": text}.
          on_text: called with each new piece of the answer.

        Raises:
          UserError: an empty or too long question, options out of range, a selection file without the question, a video
            that another model watched or that was closed, logits that are not finite.
        """
        answering = self.start_answer(
            video,
            question,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            bilevel=bilevel,
            relevance=relevance,
            history=history,
        )
        with contextlib.closing(answering):
            while not answering.finished:
                piece = answering.step()
                if piece and on_text is not None:
                    on_text(piece)
        return answering.answer

    def ask_many(
        self,
        questions: Iterable[tuple[WatchedVideo | LiveVideo, str]],
        *,
        together: int = 8,
        max_new_tokens: int = 128,
        sampling: TokenSampling | None = None,
        seed: int = 0,
        bilevel: BilevelConfig | None = BilevelConfig(),  # noqa: B008 (frozen)
        relevance: RelevanceConfig | None = None,
    ) -> list[Answer]:
        """The answers to pairs of a video and a question, in their order, each as `ask` gives it.

        Up to `together` answers are decoded at a time, in which the weights are read once for all of them. They may
        read different videos. The context of each is copied for that: where there is no memory for all of them, fewer
        share a program.

        Raises UserError as `ask` does, for the first question that fails; the other answers are lost then.
        """
        require_whole("together", together, 1, MOST_TOGETHER)
        waiting, answers = collections.deque(enumerate(questions)), dict[int, Answer]()
        running: dict[int, Answering] = {}
        with contextlib.ExitStack() as opened:
            while waiting or running:
                while waiting and len(running) < together:
                    number, (video, question) = waiting.popleft()
                    running[number] = opened.enter_context(
                        contextlib.closing(
                            self.start_answer(
                                video,
                                question,
                                max_new_tokens=max_new_tokens,
                                sampling=sampling,
                                seed=seed,
                                bilevel=bilevel,
                                relevance=relevance,
                            )
                        )
                    )
                decode(list(running.values()))
                for number, answering in list(running.items()):
                    answering.read()
                    if answering.finished:
                        answers[number] = running.pop(number).answer
        return [answers[number] for number in sorted(answers)]

    def start_answer(
        self,
        video: WatchedVideo | LiveVideo,
        question: str,
        *,
        max_new_tokens: int = 128,
        sampling: TokenSampling | None = None,
        seed: int = 0,
        bilevel: BilevelConfig | None = BilevelConfig(),  # noqa: B008 (frozen)
        relevance: RelevanceConfig | None = None,
        history: Sequence[Turn] | None = None,
    ) -> Answering:
        """Chooses the chunks for a question and begins its answer; `ask` is this and all steps of it.

        Arguments and errors are those of `ask`. The video cannot be closed before the answer is.
        """
        if video not in self._videos:
            raise UserError(f"{video.path}: was watched by another model; watch it with the model that is asked")
        check_answer_options(max_new_tokens, seed)
        if isinstance(video, LiveVideo):
            video.check_reading(bilevel, relevance or RelevanceConfig())
        return Answering(
            self.network,
            self.tokenizer,
            video,
            question,
            suffix(self.tokenizer, question, history, video.lead),
            max_new_tokens=max_new_tokens,
            sampling=sampling or TokenSampling(),
            seed=seed,
            bilevel=bilevel,
            relevance=relevance or RelevanceConfig(),
        )

    def chat(self, video: str | Path, question: str, frames: FrameSampling | None = None, **options: Any) -> str:
        """Answers one question about one video. `frames` is the `sampling` of `watch`; `options` are those of `ask`."""
        with self.watch(video, frames) as watched:
            return self.ask(watched, question, **options).text


def load(
    checkpoint: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    weights: Weights | None = None,
    implementation: str = "auto",
    progress: bool = False,
    verify_checksums: bool = True,
    tensor: int = 1,
) -> Model:
    """Loads an Orbax folder (`xl2jax.checkpoint.convert`), a PyTorch folder or a hub id (`org/name` or `org/name@revision`).

    `dtype` None keeps the stored dtype. `weights` quantises the LLM's matrices to 8 or 4 bits, a tensor at a time as they
    are read; without it they are as the checkpoint stores them. `verify_checksums` compares each tensor of an Orbax folder with the checksum
    that the folder stores for it. `tensor` splits the model over that many devices of this process.

    Raises UserError where the checkpoint cannot be used, or cannot be split so.
    """
    (model,) = load_copies(
        checkpoint,
        Devices(tensor),
        dtype=dtype,
        weights=weights,
        implementation=implementation,
        progress=progress,
        verify_checksums=verify_checksums,
    )
    return model


def load_copies(
    checkpoint: str | Path,
    devices: Devices,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    weights: Weights | None = None,
    implementation: str = "auto",
    progress: bool = False,
    verify_checksums: bool = True,
) -> list[Model]:
    """Loads `devices.copies` copies of a model, each split over `devices.tensor` devices. The checkpoint is read once.

    `xl2jax.inference.copies` shares work out among them. Arguments and errors are those of `load`.
    """
    folder = find_checkpoint(checkpoint)
    config = VideoXL2Config.from_hf(folder)
    tokenizer = PromptTokenizer.load(folder, config.llm.vocab)
    reader = ParamReader(folder, dtype, weights, verify=verify_checksums)
    devices.check(reader.config)
    meshes = devices.meshes()
    memory.check_weights_fit(reader.config, reader.dtype, meshes)
    if weights is None and reader.config.llm.weights is not None:
        logger.info("the LLM's matrices are %s, as the checkpoint stores them", reader.config.llm.weights)
    split = [mesh for mesh in meshes if mesh is not None]
    if not split:
        return [Model(reader.config, reader.load(progress=progress), tokenizer, implementation=implementation)]
    copies = head_copies(reader.config, devices.tensor)
    return [
        Model(
            with_head_copies(reader.config, copies),
            params,
            tokenizer,
            implementation=implementation,
            mesh=mesh,
            head_copies=copies,
        )
        for mesh, params in zip(split, reader.load_split(split, head_copies=copies, progress=progress), strict=True)
    ]
