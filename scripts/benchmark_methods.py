"""Measure every method of the folders on the bundled pair, for the table in docs/methods.md.

python scripts/benchmark_methods.py --limit 12 --out docs/figures/methods.json && python docs/build_tables.py
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from csdraft.bench.breadth import breadth
from csdraft.bench.methods import Setup, configured
from csdraft.benchmark import read_prompts, tokenized
from csdraft.progress import Progress

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="models/smol-target")
    parser.add_argument("--drafter", default="models/smol-drafter")
    parser.add_argument("--prompts", default="recipes/smol/prompts.jsonl")
    parser.add_argument("--limit", type=int, default=12, help="prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/methods.json"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target, drafter = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (options.target, options.drafter)
    )
    target = configured(target, pad_token_id=tokenizer.eos_token_id, eos_token_id=None)
    setup = Setup(target, drafter, options={"max_new_tokens": options.max_new_tokens})
    prompts = tokenized(tokenizer, read_prompts(options.prompts, options.limit))
    found = breadth(setup, prompts, options.repetitions, Progress())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"prompts": len(prompts), "max_new_tokens": options.max_new_tokens, "threads": options.threads}
    options.out.write_text(json.dumps({"settings": settings, "methods": found}, indent=1) + "\n")
    print(f"written: {options.out}")
