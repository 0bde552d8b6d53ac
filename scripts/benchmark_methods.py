"""Measure every method of the folders on the bundled pair, for the table in docs/methods.md.

Some need more than the pair: documents, here the standard library's; a stop head, which is trained on other prompts;
another tokenizer, for which the drafter's own stands in, so that the way there and back is all that is added.

python scripts/benchmark_methods.py --limit 12 --out docs/figures/methods.json && python docs/build_tables.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from csdraft.bench.breadth import breadth
from csdraft.bench.measure import encode
from csdraft.bench.methods import Setup, configured
from csdraft.benchmark import read_prompts, tokenized
from csdraft.data.sources import read_rows
from csdraft.drafters.datastore import Datastore
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.reference import Reference
from csdraft.drafters.translated import Translated
from csdraft.progress import Progress
from csdraft.schedules.stop_head import StopHead
from csdraft.tables.corpus import CorpusIndex
from csdraft.trainers.stop_head import fit, harvest


def trained_stop_head(setup: Setup, tokenizer: Any, prompts: list[str]) -> StopHead:
    """Trained on how the target judges the drafter after these prompts."""
    batches = [encode(setup, [prompt]) for prompt in tokenized(tokenizer, prompts)]
    return StopHead(fit(harvest(setup.target, ModelDrafter(setup.drafter), batches, **setup.options)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="models/smol-target")
    parser.add_argument("--drafter", default="models/smol-drafter")
    parser.add_argument("--prompts", default="recipes/smol/prompts.jsonl")
    parser.add_argument(
        "--tune-prompts", default="recipes/smol/prompts_tune.jsonl", help="that the stop head learns from"
    )
    parser.add_argument("--documents", type=int, default=150, help="to look things up in (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=12, help="prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/methods.json"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.target, trust_remote_code=False)
    target, drafter = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
        for path in (options.target, options.drafter)
    )
    target = configured(target, pad_token_id=tokenizer.eos_token_id, eos_token_id=None)
    setup = Setup(target, drafter, options={"max_new_tokens": options.max_new_tokens})
    documents = [row["input_ids"] for row in read_rows("stdlib", tokenizer, 1 << 20, limit=options.documents)]
    given = {
        "datastore": Datastore(CorpusIndex.build(documents)),
        "reference": Reference(documents),
        "translated": Translated(ModelDrafter(drafter), tokenizer, tokenizer),
        "stop_head": trained_stop_head(setup, tokenizer, read_prompts(options.tune_prompts)),
    }
    prompts = tokenized(tokenizer, read_prompts(options.prompts, options.limit))
    found = breadth(setup, prompts, options.repetitions, Progress(), given)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"prompts": len(prompts), "max_new_tokens": options.max_new_tokens, "threads": options.threads}
    options.out.write_text(json.dumps({"settings": settings, "methods": found}, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
