"""The report page of the docs: decodes with the pair in `models/`, writes the page, and takes its picture.

    python -m examples.report_page

The pictures need a Chromium on the path (Debian: `apt install chromium`); without one only the page is written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.pair import DRAFTER, TARGET, load_model, load_tokenizer
from csdraft import CascadeDrafter, MaxGram, Report

__all__ = ["main"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROMPT = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
"""
CALLS, NEW_TOKENS = 5, 128
"""Calls: the first ones measure what a plain step takes, the last is shown."""
PICTURES = {"report.png": (900, 1080, False), "report-phone-dark.png": (500, 1000, True)}
"""Width, height in pixels, and whether the page is dark; Chromium draws nothing narrower than 500."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the page and its pictures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "report.html"
    report, tokenizer = decoded()
    report.to_html(page, tokenizer)
    print(f"wrote {page}")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no picture: none of {', '.join(BROWSERS)} is on the path", file=sys.stderr)
        return 0
    for name, (width, height, dark) in PICTURES.items():
        photograph(browser, page, args.out / name, width, height, dark)
        print(f"wrote {args.out / name}")
    return 0


def decoded() -> tuple[Report, PreTrainedTokenizerBase]:
    """The last of a few calls, and the tokenizer of its text."""
    torch.set_num_threads(1)  # small models, which other programs disturb less on one
    target, drafter = (load_model(path, torch.device("cpu"), torch.float32) for path in (TARGET, DRAFTER))
    tokenizer = load_tokenizer(TARGET)
    cascade = CascadeDrafter([drafter, MaxGram()], k_matrix=[[2, 24], [0, 4]])
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for _ in range(CALLS):
        target.generate(**inputs, assistant=cascade, max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
    report = cascade.last_report
    assert report is not None
    return report, tokenizer


def photograph(browser: str, page: Path, picture: Path, width: int, height: int, dark: bool) -> None:
    """The top of a page as a PNG."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless=new",
            "--no-sandbox",  # containers have none
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--screenshot={picture.resolve()}",
            f"--blink-settings=preferredColorScheme={int(not dark)}",
        ]
        subprocess.run([browser, *options, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    assert os.path.exists(picture), f"{browser} wrote no {picture}"


if __name__ == "__main__":
    sys.exit(main())
