"""The subtitles that a prompt of Video-MME holds: those that are shown at evenly spread frames."""

from __future__ import annotations

import re

import numpy as np

NONE = "No subtitles available"
_TEXT = re.compile(r'<font color="white" size=".72c">(.*?)</font>')


def subtitle_text(srt: str | None, frame_count: int, fps: float, frames: int) -> str:
    """The subtitles of a prompt.

    Args:
      srt: the text of the .srt file; None where there is none.
      frame_count, fps: of the video.
      frames: how many frames are looked at; -1 for all of them.

    Raises ValueError for a file that is not in the format.
    """
    if srt is None:
        return NONE
    entries = _entries(srt)
    spans = [(int(start * fps), int(end * fps)) for start, end in entries]
    looked_at = np.linspace(0, frame_count - 1, frame_count if frames == -1 else frames, dtype=int).tolist()
    shown = [i for f in looked_at for i, (start, end) in enumerate(spans) if start <= f < end]
    # The order is that of a set of integers: upstream joins the texts so.
    texts = [_TEXT.findall(list(entries.values())[i])[:1] for i in list(set(shown))]
    return "\n".join(text[0] for text in texts if text)


def _entries(srt: str) -> dict[tuple[float, float], str]:
    """Texts by (start, end) in seconds. A later entry of the same times replaces the earlier one."""
    entries = {}
    for section in srt.split("\n\n"):
        lines = section.split("\n")
        if section.strip() and len(lines) >= 3:
            times = lines[1].split(" --> ")
            entries[_seconds(times[0]), _seconds(times[1])] = " ".join(lines[2:])
    return entries


def _seconds(time: str) -> float:
    hours, minutes, rest = time.split(":")
    seconds, thousandths = rest.split(",")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(thousandths) / 1000
