"""Prompts for a longer training: questions of GSM8K, functions of Python files, paragraphs of prose, and its own.

python recipes/smollm2/make_prompts.py --questions gsm8k_train.jsonl --code code.txt --prose books.txt peps.txt
python recipes/smollm2/make_prompts.py --own 1400 --target out/smollm2/target

`--questions` are JSON lines with a `question`; the texts hold documents separated by a line `<|endoftext|>`. Files may
be compressed (.xz). `--own` are what the target writes where a user would, after one of `STARTS`, sampled at T=1 from
the 50 likeliest tokens and 95 % of their chances (Magpie, arXiv 2406.08464). Rows are `{"kind": ..., "messages":
[...]}`, as in prompts_train.jsonl, mixed by `--seed`.
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

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from csdraft_command import COUNT

__all__ = ["make_prompts"]

END = "<|endoftext|>"
MARK = "PROMPT"
SHORTEST, LONGEST = 15, 96  # characters and tokens of an own prompt
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
STARTS = ("",) * 8 + ("Who", "What", "When", "Where", "Which", "How many", "Why", "Is", "Write a Python function")
STARTS += ("Explain", "Rewrite", "Translate this to German:", "Give me a list of", "Write a story about")
"""How own prompts begin; eight in twenty-two with nothing."""


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


def own(target: str, count: int, seed: int, rows: int = 128) -> list[str]:
    """`count` different prompts of at most `LONGEST` tokens that the target writes as a user, each to its end."""
    tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    before, _, after = asked.partition(MARK)
    end = next(iter(tokenizer(after, add_special_tokens=False).input_ids), tokenizer.eos_token_id)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chosen, found, before_these = random.Random(seed), dict[str, None](), -1
    torch.manual_seed(seed)
    while before_these < len(found) < count:
        before_these = len(found)
        starts = chosen.choices(STARTS, k=rows)
        inputs = tokenizer(
            [before + start for start in starts], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        options = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
        options |= {"eos_token_id": end, "pad_token_id": end}
        written = model.generate(**inputs, **options, max_new_tokens=LONGEST)[:, inputs.input_ids.shape[1] :]
        for start, tokens in zip(starts, written.tolist(), strict=True):
            text = (start + tokenizer.decode(tokens[: tokens.index(end)])).strip() if end in tokens else ""
            if len(text) >= SHORTEST:
                found[text] = None
        print(f"{len(found):,} of {count:,} own prompts", flush=True)
    if len(found) < count:
        raise SystemExit(
            f"{target} wrote {len(found)} different prompts, and none more in {rows} tries; --own={count} wants a "
            f"chat model that writes what users ask, of at least {SHORTEST} characters and at most {LONGEST} tokens"
        )
    return list(found)[:count]


def make_prompts(
    questions: Sequence[Path],
    code: Sequence[Path],
    prose: Sequence[Path],
    count: int,
    seed: int,
    asked: int | None = None,
    own: Sequence[str] = (),
) -> list[dict[str, object]]:
    """At most `count` prompts from code and from prose each, `asked` questions (None: all), all of `own`; shuffled."""
    chosen = random.Random(seed)
    written = {
        "chat": own,
        "math": [json.loads(line)["question"] for path in questions for line in opened(path)][:asked],
        "code": some([f for text in documents(code) for f in functions(text)], count, CODE, chosen),
        "summary": some([p for text in documents(prose) for p in paragraphs(text)], count, PROSE, chosen),
    }
    rows = [
        {"kind": kind, "messages": [{"role": "user", "content": text}]}
        for kind, texts in written.items()
        for text in texts
    ]
    if not rows:
        raise SystemExit("no prompts: give --questions, --code, --prose or --own, and see --help for what they hold")
    chosen.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("questions", "code", "prose"):
        parser.add_argument(f"--{name}", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=2500, help="of code, and of prose (default: %(default)s)")
    parser.add_argument("--asked", type=COUNT, help="how many of the questions, the first ones (default: all)")
    parser.add_argument("--own", type=COUNT, help="how many the target writes (default: none)")
    parser.add_argument("--target", default="out/smollm2/target", help="who writes its own (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/smollm2/prompts.jsonl"))
    options = parser.parse_args()
    written = own(options.target, options.own, options.seed) if options.own else ()
    files = options.questions, options.code, options.prose
    rows = make_prompts(*files, options.count, options.seed, options.asked, written)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} prompts in {options.out}")


if __name__ == "__main__":
    main()
