"""Makes docs/page.png: the page of `xl2jax serve` with answers of the bundled checkpoint. It needs Chromium.

python tools/page_picture.py docs/page.png
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

SECONDS = 120_000  # milliseconds, for what compiles first


@contextlib.contextmanager
def served() -> Iterator[str]:
    """A server with the bundled checkpoint: its address."""
    command = [sys.executable, "-m", "xl2jax", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if found := re.search(r"a page at (\S+)", line):
                    yield found[1]
                    return
            raise SystemExit("error: the server did not start")
        finally:
            server.terminate()


def ask(page: Page, question: str, answer: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.locator(".answer").last).to_have_text(answer, timeout=SECONDS)
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible(timeout=SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="file to write (png)")
    target = parser.parse_args().path
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("error: there is no Chromium (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, served() as address, sync_playwright() as playwright:
        video = Path(folder) / "demo.mp4"
        command = [sys.executable, "-m", "xl2jax", "demo-clip", str(video)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root with it
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce", bypass_csp=True)
        page.goto(address)
        page.get_by_label("Choose a file").set_input_files(video)
        expect(page.locator("#status")).to_contain_text("Ready", timeout=SECONDS)
        for line in lines:
            ask(page, *line.split("\t"))
        timed = page.get_by_role("listitem").filter(has=page.get_by_role("link"))
        timed.get_by_role("button", name="Show on timeline").click()
        timed.get_by_role("link").click()
        expect(page.locator(".strip canvas").last).to_be_visible()
        page.wait_for_function("!document.getElementById('player').seeking")
        page.wait_for_timeout(4000)  # the player's controls fade
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
