"""Video-MME: four options, videos of three lengths, with or without subtitles in the prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from xl2jax.benchmarks.extraction import VIDEOMME_PREFIXES, first_letter, option_letter
from xl2jax.benchmarks.task import Reading, Tally, Task, Variant, percent
from xl2jax.system.schema import Schema

DURATIONS = ("short", "medium", "long")
DOMAINS = (
    "Knowledge", "Film & Television", "Sports Competition", "Artistic Performance", "Life Record", "Multilingual",
)  # fmt: skip
SUB_CATEGORIES = (
    "Humanity & History", "Literature & Art", "Biology & Medicine", "Finance & Commerce", "Astronomy", "Geography",
    "Law", "Life Tip", "Technology", "Animation", "Movie & TV Show", "Documentary", "News Report", "Esports",
    "Basketball", "Football", "Athletics", "Other Sports", "Stage Play", "Magic Show", "Variety Show", "Acrobatics",
    "Handicraft", "Food", "Fashion", "Daily Life", "Travel", "Pet & Animal", "Exercise", "Multilingual",
)  # fmt: skip
TASK_TYPES = (
    "Temporal Perception", "Spatial Perception", "Attribute Perception", "Action Recognition", "Object Recognition",
    "OCR Problems", "Counting Problem", "Temporal Reasoning", "Spatial Reasoning", "Action Reasoning",
    "Object Reasoning", "Information Synopsis",
)  # fmt: skip
_KEYS = tuple(
    f"{duration}_{domain}_{sub}_{kind}"
    for duration in DURATIONS for domain in DOMAINS for sub in SUB_CATEGORIES for kind in TASK_TYPES
)  # fmt: skip
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)


class VideoMMERow(Schema):
    videoID: str
    duration: str
    domain: str
    sub_category: str
    task_type: str
    question_id: str
    question: str
    options: list[str]
    answer: str


class VideoMMELayout(Task):
    """Questions whose rows and files are laid out as those of Video-MME."""

    Row = VideoMMERow
    folder, split = "videomme", "test"

    def video(self, row: VideoMMERow) -> str:
        return f"{row.videoID}.mp4"

    def target(self, row: VideoMMERow) -> str:
        return row.answer

    def category(self, row: VideoMMERow) -> str:
        return row.task_type

    def duration(self, row: VideoMMERow) -> str:
        return row.duration


class VideoMME(VideoMMELayout):
    """`subtitles` puts the video's subtitles into the prompt."""

    def __init__(
        self,
        name: str,
        variant: Variant,
        keep: Callable[[VideoMMERow], bool] | None = None,
        *,
        subtitles: bool = False,
    ):
        super().__init__(name, variant, keep)
        self._upstream = variant == "upstream"
        self.dataset = "lmms-lab/Video-MME" if self._upstream else "lmms-eval/Video-MME"
        self.metric = "videomme_percetion_score" if self._upstream else "videomme_perception_score"
        self.subtitle_frames = (128 if self._upstream else 32) if subtitles else None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.name, "videomme", self.split)

    def prompt(self, row: VideoMMERow, subtitles: str | None = None) -> str:
        options = str(row.options) if self._upstream else "\n".join(row.options)
        question = f"{INSTRUCTION}\n{row.question}\n{options}\n"
        if self.subtitle_frames is None:
            return f"{question}\nAnswer with the option's letter from the given choices directly."
        assert subtitles is not None
        return f"This video's subtitles are listed below: \n{subtitles}\n{question}The best answer is:"

    def video_path(self, row: VideoMMERow) -> str:
        return f"{self.folder}/{self.video(row)}" if self._upstream else f"{self.folder}/data/{self.video(row)}"

    def subtitle_path(self, row: VideoMMERow) -> str:
        return f"{self.folder}/subtitle/{row.videoID}.srt"

    def other_paths(self, path: str) -> tuple[str, ...]:
        return path.replace("mp4", "MP4"), path.replace("mp4", "mkv")

    def _extract(self, text: str) -> str:
        return first_letter(text, "ABCD", VIDEOMME_PREFIXES) if self._upstream else option_letter(text)

    def read(self, row: VideoMMERow, text: str) -> Reading:
        extracted = self._extract(text)
        return Reading(extracted, extracted == row.answer)

    def sample(self, row: VideoMMERow, text: str, rng: random.Random) -> dict[str, Any]:
        extracted = self._extract(text)
        sample: dict[str, Any] = {
            "question_id": row.question_id,
            "duration": row.duration,
            "category": row.domain,
            "sub_category": row.sub_category,
            "task_category": row.task_type,
            "pred_answer": extracted,
            "answer": row.answer,
        }
        if not self._upstream:
            sample |= {"score": float(extracted == row.answer), "videoID": row.videoID}
        return sample

    def score(self, sample: Any) -> float:
        return float(sample["pred_answer"] == sample["answer"])

    def _tally(self, samples: Sequence[dict[str, Any]]) -> Tally:
        tally = Tally(_KEYS)
        for s in samples:
            key = f"{s['duration']}_{s['category']}_{s['sub_category']}_{s['task_category']}"
            tally.add(key, s["pred_answer"] == s["answer"])
        return tally

    def aggregate(self, samples: Sequence[dict[str, Any]]) -> float:
        return percent(*self._tally(samples).all)

    def printed(self, samples: Sequence[dict[str, Any]]) -> list[str]:
        tally = self._tally(samples)
        groups = {
            "video Type": DURATIONS,
            "Categories": DOMAINS,
            "Video Sub Categories": SUB_CATEGORIES,
            "Task Categories": TASK_TYPES,
        }
        lines = [
            f"Evaluation on {group}: {name}: {percent(*tally.containing(name)): .1f}%"
            for group, names in groups.items()
            for name in names
        ]
        return [*lines, f"Overall Performance: {percent(*tally.all): .1f}%"]

    @property
    def cluster(self) -> str | None:
        return None if self._upstream else "videoID"
