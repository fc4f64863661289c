"""Upstream's selection files as its bi-level runs read them: all categories merged, keys made from the prompt."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from xl2jax.benchmarks.videomme import INSTRUCTION
from xl2jax.errors import UserError
from xl2jax.inference.selection_files import Selection, read_selections


def selection_key(benchmark: str, prompt: str, video: str) -> str:
    """The key of a question.

    Args:
      benchmark: the base name of the selection file up to the first ".json"; it decides the rule.
      prompt: the text after the video, before times are rewritten.
      video: path or name of the video.

    Raises UserError for a benchmark without a rule.
    """
    name = PurePosixPath(video).name
    if "videomme" in benchmark:
        if prompt.startswith("This video's subtitles"):
            text = prompt.rpartition(f"{INSTRUCTION}\n")[2].partition("\n[")[0]
        else:
            text = prompt.partition("\n[")[0].rpartition("option.\n")[2]
    elif "mlvu" in benchmark:
        text = prompt.partition("\n(")[0].strip()
    elif "vnbench" in benchmark or "longvideobench" in benchmark:
        text = prompt.partition("\nA.")[0]
    elif "lvbench" in benchmark:
        name, text = name.partition(".mp4")[0], prompt.partition("\nA.")[0]
    else:
        raise UserError(
            f"{benchmark}.json: the name of a selection file says how its keys are made, and has to contain videomme, "
            "mlvu, longvideobench, vnbench or lvbench"
        )
    return f"{name}_{text}"


class SelectionTable:
    """Selection files of one benchmark, which may be divided over several files (short, medium and long videos)."""

    def __init__(self, files: list[Path]):
        self._tables = [(file.name.partition(".json")[0], read_selections(file)) for file in files]
        for benchmark, _ in self._tables:
            selection_key(benchmark, "", "")  # refuses a name without a rule

    def find(self, prompt: str, video: str) -> Selection | None:
        """A question's entry; None where there is none: upstream then decodes from the whole cache."""
        for benchmark, table in self._tables:
            selection = table.get(selection_key(benchmark, prompt, video))
            if selection is not None:
                return selection
        return None
