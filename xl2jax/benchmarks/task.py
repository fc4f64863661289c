"""What a task is: rows of a data set, the prompt and the video of each, and how an answer is read and scored."""

from __future__ import annotations

import abc
import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from xl2jax.system.schema import Schema, check

type Variant = Literal["upstream", "lmms-eval"]
type Sample = dict[str, Any] | bool
"""What the original code makes of one answer; it goes into the samples file."""

AGGREGATE_ERRORS = (KeyError, ZeroDivisionError)
"""What an original aggregation raises where a type of question is unknown or missing."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """An answer as a task reads it.

    extracted: the letter or text that was found; None where nothing was, and for LongVideoBench before the random choice.
    correct: whether it counts; None where a random choice decides (`choices` are then its letters).
    """

    extracted: str | None
    correct: bool | None
    choices: tuple[str, ...] = ()


class Task(abc.ABC):
    """One task of one code base. `rows` are checked by `Row`, the columns that the code reads.

    Attributes:
      name, variant: as on the command line.
      metric: name of the number, as the code base spells it.
      unit: what the number is a share of: 100 for percent, 1 for a fraction.
      folder: the data set's folder below --data, and in the code base's cache.
      dataset, split: names on the hub.
      max_new_tokens: limit on an answer.
      keep: which rows of the data set the task has; None keeps all.
    """

    Row: type[Schema]
    folder: str
    dataset: str
    split: str
    metric: str
    unit: float = 100.0
    max_new_tokens: int = 16
    subtitle_frames: int | None = None
    """How many frames choose the subtitles of a prompt; None for prompts without subtitles."""
    greedy: Mapping[str, Any] = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    """What the code base writes beside `max_new_tokens`. Everything is greedy."""

    def __init__(self, name: str, variant: Variant, keep: Callable[[Any], bool] | None = None):
        self.name, self.variant, self.keep = name, variant, keep

    def row(self, raw: Mapping[str, Any], where: str = "a row") -> Any:
        """Checks a row of the data set. Raises UserError."""
        return check(dict(raw), self.Row, where)

    @property
    @abc.abstractmethod
    def files(self) -> tuple[str, ...]:
        """Names that the file of the rows may have, without suffix and shard; the first that there is counts."""

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """`files` of each part of the data set."""
        return (self.files,)

    # --- a question ---------------------------------------------------------------------------

    @abc.abstractmethod
    def prompt(self, row: Any, subtitles: str | None = None) -> str:
        """The text after the video, as the code base's `doc_to_text` gives it."""

    @property
    def home(self) -> str:
        """The code base's home of data sets: a constant that upstream's users replace, or lmms-eval's variable."""
        return "YOUR_HF_HOME" if self.variant == "upstream" else "${HF_HOME}"

    @abc.abstractmethod
    def video(self, row: Any) -> str:
        """The video's path below the folder of videos."""

    def video_path(self, row: Any) -> str:
        """The video's path below `home` (`visual` in golden files)."""
        return f"{self.folder}/{self.video(row)}"

    def other_paths(self, path: str) -> tuple[str, ...]:
        """Paths that the code base tries when `path` does not exist."""
        return ()

    def media_options(self, row: Any) -> dict[str, Any] | None:
        """A second element of `visual`."""
        return None

    @abc.abstractmethod
    def target(self, row: Any) -> str:
        """The right answer, as the samples file has it."""

    def category(self, row: Any) -> str:
        """The kind of question."""
        return ""

    def duration(self, row: Any) -> str | None:
        """The data set's own class of the video's length; None where it has none."""
        return None

    # --- an answer ----------------------------------------------------------------------------

    @abc.abstractmethod
    def read(self, row: Any, text: str) -> Reading:
        """Extracts and scores an answer."""

    def parsed(self, reading: Reading) -> bool:
        """Whether an answer was found in the text."""
        return reading.extracted in tuple("ABCDEFGH")

    @abc.abstractmethod
    def sample(self, row: Any, text: str, rng: random.Random) -> Sample:
        """What the code base's `process_results` gives for its metric. `rng` makes its random choices."""

    @abc.abstractmethod
    def score(self, sample: Sample) -> float:
        """1 for a right answer, 0 for a wrong one, or a share."""

    def submission(self, row: Any, text: str) -> dict[str, str] | None:
        """A further field of the samples file."""
        return None

    @abc.abstractmethod
    def aggregate(self, samples: Sequence[Any]) -> float:
        """The task's number. Raises one of `AGGREGATE_ERRORS` where the original does."""

    def further_metrics(self, samples: Sequence[Any]) -> dict[str, float]:
        """Numbers beside `metric`."""
        return {}

    def printed(self, samples: Sequence[Any]) -> list[str]:
        """The lines that the aggregation logs. Raises as `aggregate` does."""
        return []

    @property
    def cluster(self) -> str | None:
        """The field of a sample by which lmms-eval clusters the standard error."""
        return None


def percent(correct: int, answered: int) -> float:
    """100 * correct / answered, 0 without any."""
    return 100 * correct / answered if answered else 0


class Tally:
    """Right answers and answers by key, with the sums over all keys that contain a name, as the originals print them."""

    def __init__(self, keys: Sequence[str]):
        self._counts: dict[str, list[int]] = {key: [0, 0] for key in keys}

    def add(self, key: str, correct: bool) -> None:
        """Raises KeyError for an unknown key."""
        self._counts[key][0] += correct
        self._counts[key][1] += 1

    def containing(self, name: str) -> tuple[int, int]:
        found = [counts for key, counts in self._counts.items() if name in key]
        return sum(c for c, _ in found), sum(n for _, n in found)

    @property
    def all(self) -> tuple[int, int]:
        return self.containing("")


def sanitized(name: str) -> str:
    """A model's name as a folder's, in lmms-eval's way: the last two parts of a path, without special characters."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", "/".join(name.split("/")[-2:]))
