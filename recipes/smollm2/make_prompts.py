"""Prompts for a longer training: questions of GSM8K, functions of Python files, paragraphs of prose.

python recipes/smollm2/make_prompts.py --questions gsm8k_train.jsonl --code code.txt --prose books.txt peps.txt

`--questions` are JSON lines with a `question`; the texts hold documents separated by a line `<|endoftext|>`. Files may
be compressed (.xz). Rows are `{"kind": ..., "messages": [...]}`, as in prompts_train.jsonl, mixed by `--seed`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

__all__ = ["make_prompts"]

END = "<|endoftext|>"
FUNCTION = re.compile(r"^def [a-z]\w+\(.*?(?=^[^\s)]|\Z)", re.MULTILINE | re.DOTALL)
CODE = (
    "Explain what this Python function does.\n\n{}",
    "Write a docstring for this Python function.\n\n{}",
    "Write tests for this Python function.\n\n{}",
    "Rewrite this Python function with clearer names.\n\n{}",
)
PROSE = (
    "Summarize this text in two sentences.\n\n{}",
    "What are the main points of this text?\n\n{}",
    "Explain this text in simple words.\n\n{}",
    "Continue this text.\n\n{}",
)


def opened(path: Path) -> TextIO:
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")  # type: ignore


def documents(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with opened(path) as file:
            lines: list[str] = []
            for line in file:
                if line.strip() == END:
                    yield "".join(lines)
                    lines = []
                else:
                    lines.append(line)
            yield "".join(lines)


def functions(text: str) -> Iterator[str]:
    """Functions at the left margin, of 200 to 900 characters."""
    return (found.strip() for found in FUNCTION.findall(text) if 200 <= len(found) <= 900)


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of 400 to 1,200 characters, their lines joined."""
    parts = (" ".join(part.split()) for part in text.split("\n\n"))
    return (part for part in parts if 400 <= len(part) <= 1200 and part[0].isalpha())


def some(found: Sequence[str], count: int, forms: Sequence[str], chosen: random.Random) -> Iterator[str]:
    for text in chosen.sample(list(found), min(count, len(found))):
        yield chosen.choice(forms).format(text)


def make_prompts(
    questions: Sequence[Path], code: Sequence[Path], prose: Sequence[Path], count: int, seed: int
) -> list[dict[str, object]]:
    """At most `count` prompts from code and from prose each, and all questions, in random order."""
    chosen = random.Random(seed)
    asked = [json.loads(line)["question"] for path in questions for line in opened(path)]
    written = {
        "math": asked,
        "code": some([f for text in documents(code) for f in functions(text)], count, CODE, chosen),
        "summary": some([p for text in documents(prose) for p in paragraphs(text)], count, PROSE, chosen),
    }
    rows = [
        {"kind": kind, "messages": [{"role": "user", "content": text}]}
        for kind, texts in written.items()
        for text in texts
    ]
    if not rows:
        raise SystemExit("no prompts: give --questions, --code or --prose, and see --help for what they hold")
    chosen.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("questions", "code", "prose"):
        parser.add_argument(f"--{name}", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=2500, help="of code, and of prose (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/smollm2/prompts.jsonl"))
    options = parser.parse_args()
    rows = make_prompts(options.questions, options.code, options.prose, options.count, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} prompts in {options.out}")


if __name__ == "__main__":
    main()
