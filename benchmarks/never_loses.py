"""Whether the default schedule ever loses: against plain `generate`, and against the best fixed length in hindsight.

python -m benchmarks never-loses --target models/smol-target --drafter models/smol-drafter \\
    --prompts chat=mt_bench.jsonl math=gsm8k_test.jsonl

Each prompt is decoded greedily by every way in turn, one prompt after the other, so that what else the machine does
meets all alike. A table line has the seconds of plain decoding and of the best fixed length over those of the default,
summed over the prompts of a kind; above 1 the default is faster. In a first call the drafter has learned nothing; in a
later one it has decoded the prompts before. The last column is the noise: a second drafter's later calls over the
first's. `--busy` runs another program beside it.
"""

import argparse
import json
import lzma
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from csdraft import CascadeDrafter, Drafter, MaxGram, ModelDrafter
from csdraft.models import load_model
from csdraft.schedules.fixed import Fixed
from csdraft_command import COUNT

FIELDS = ("turns", "prompt", "question", "problem", "article", "instruction", "text")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def read_texts(path: Path, count: int) -> list[str]:
    """The first prompts of a file of JSON lines, which may be packed."""
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    found = [next(row[field] for field in FIELDS if field in row) for row in rows]
    return [text if isinstance(text, str) else text[0] for text in found]


def encode(tokenizer, kind: str, text: str, longest: int) -> torch.Tensor:
    """(1, length) a prompt's tokens, through the chat template if there is one; long texts lose their end."""
    ids = tokenizer(text)["input_ids"][:longest]
    if tokenizer.chat_template and kind != "code":
        ask = "Summarize: " if kind == "summary" else ""
        talk = [{"role": "user", "content": ask + tokenizer.decode(ids, skip_special_tokens=True)}]
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids])


def makers(drafter) -> dict[str, tuple[Callable[[], Drafter], Sequence[int]]]:
    """By name: what makes a drafter that has learned nothing, and the fixed lengths to compare with."""
    found: dict[str, tuple[Callable[[], Drafter], Sequence[int]]] = {"max_gram": (MaxGram, (2, 4, 8, 12))}
    if drafter is not None:
        found["model"] = (lambda: ModelDrafter(drafter), (1, 2, 4, 6))
        found["cascade"] = (lambda: CascadeDrafter([drafter, MaxGram()], [[2, 10], [0, 4]]), (2, 4, 8, 12))
    return found


def compare(target, make, lengths, prompts, tokens: int, clock) -> dict[str, Counter]:
    """Seconds by way and kind of prompt; every way decodes a prompt before the next prompt comes."""
    kept, again, spent = make(), make(), {}
    fixed = {f"fixed {n}": make() for n in lengths}
    for number, (kind, ids) in enumerate(prompts):
        ways = {"plain": {}, "first": {"assistant": make()}, "later": {"assistant": kept}}
        ways["again"] = {"assistant": again}
        ways |= {
            name: {"assistant": one, "schedule": Fixed(n)}
            for (name, one), n in zip(fixed.items(), lengths, strict=True)
        }
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            fresh = {} if name == "plain" else {"reuse": False}  # all ways read the prompt
            began = clock()
            target.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **ways[name], **fresh)
            spent.setdefault(name, Counter())[kind] += clock() - began
    return spent


def lines(spent: dict[str, Counter], kinds) -> list[str]:
    """A line a kind of prompt, and one for all."""
    made = []
    for kind in (*kinds, "all"):
        seconds = {name: sum(of.values()) if kind == "all" else of[kind] for name, of in spent.items()}
        best = min((name for name in seconds if name.startswith("fixed")), key=lambda name: seconds[name])
        plain, fixed, first, later, again = (seconds[name] for name in ("plain", best, "first", "later", "again"))
        made.append(
            f"{kind:8} first {plain / first:5.2f} x plain {fixed / first:5.2f} x {best:9}"
            f"  later {plain / later:5.2f} x plain {fixed / later:5.2f} x {best:9}  again {again / later:5.2f}"
        )
    return made


def spin() -> None:
    """Another program."""
    while True:
        torch.mm(torch.randn(256, 256), torch.randn(256, 256))


def main(argv: Sequence[str]) -> None:
    """Prints one table a drafter."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks never-loses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", required=True, help="a causal model's folder")
    parser.add_argument("--drafter", help="a smaller one of the same tokenizer, or a head; else only Max-Gram drafts")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="KIND=FILE", help="JSON lines, also .xz")
    parser.add_argument("--count", type=COUNT, default=4, help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--tokens", type=COUNT, default=64, help="new tokens a prompt (default: %(default)s)")
    parser.add_argument("--longest", type=COUNT, default=192, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the models (default: %(default)s)")
    parser.add_argument("--threads", type=COUNT, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of the table (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="drafters, of max_gram, model and cascade")
    parser.add_argument("--busy", action="store_true", help="with a second process at work")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype).eval()  # noqa: E731
    target = load(options.target)
    drafter = load_model(options.drafter, dtype=getattr(torch, options.dtype)).eval() if options.drafter else None
    files = dict(pair.split("=", 1) for pair in options.prompts)
    prompts = [
        (kind, encode(tokenizer, kind, text, options.longest))
        for kind, file in files.items()
        for text in read_texts(Path(file), options.count)
    ]
    other = multiprocessing.Process(target=spin, daemon=True)
    if options.busy:
        other.start()
    print(f"{options.target}, {options.dtype}, {options.tokens} tokens, {options.clock} clock, busy={options.busy}")
    for name, (make, lengths) in makers(drafter).items():
        if options.only is None or name in options.only:
            spent = compare(target, make, lengths, prompts, options.tokens, CLOCKS[options.clock])
            print(f"\n{name}", *lines(spent, files), sep="\n", flush=True)
    if options.busy:
        other.terminate()
