"""Block efficiency, by task, of drafters without a model on texts that a model wrote earlier; the model is not needed.

    python scripts/replay.py --pairs outputs.jsonl --tokenizer TOKENIZER
    python scripts/replay.py --questions question.jsonl --answers answers.jsonl.xz --tokenizer TOKENIZER \\
        --chat vicuna --drafters max_gram '{"type": "prompt_lookup", "max_ngram": 3}' --recorded eagle.jsonl.xz

--pairs has JSON lines {"prompt": ..., "output": ..., "task": ...}, each text or token ids. --questions and --answers
are FastChat's files (MT-bench, Spec-Bench). Without --drafters: all of csdraft's own that can be made as they come
and that run no model. The texts should have been written greedily.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from csdraft import Drafter, spec
from csdraft.bench.replays import CHATS, measure, read_answers, read_pairs, read_rounds, table
from csdraft.replay import NotRecorded
from csdraft.schedules.fixed import Fixed


def load_tokenizer(path: str, eos: str) -> PreTrainedTokenizerFast:
    """From a folder, a Hub id or a tokenizer.json, which does not say what ends a text."""
    if path.endswith(".json"):
        return PreTrainedTokenizerFast(tokenizer_file=path, bos_token="<s>", eos_token=eos)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def drafters(wanted: Sequence[str] | None) -> Iterator[tuple[str, Drafter]]:
    """Name and drafter, from types or JSON; all that come without options and models if None are named."""
    for text in wanted or spec.types("drafters"):
        try:
            drafter = spec.resolve("drafters", json.loads(text) if text.startswith("{") else text)
        except (TypeError, ValueError) as reason:
            if wanted:
                raise SystemExit(f"--drafters {text}: {reason}") from reason
            print(f"{text}: left out ({reason})")
            continue
        yield text, drafter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", help="prompts and outputs")
    parser.add_argument("--questions", help="FastChat's questions")
    parser.add_argument("--answers", help="a model's answers to them")
    parser.add_argument("--recorded", nargs="*", default=[], help="answers of other methods, with accept_lengths")
    parser.add_argument("--tokenizer", required=True, help="a folder, a Hub id or a tokenizer.json")
    parser.add_argument("--eos", default="</s>", help="the end-of-text token of a tokenizer.json")
    parser.add_argument("--chat", help=f"chat template: {', '.join(CHATS)}, or a file; the tokenizer's own by default")
    parser.add_argument("--drafters", nargs="*", help="types or JSON")
    parser.add_argument("--depth", type=int, help="draft tokens a round; as many as a drafter likes by default")
    parser.add_argument("--limit", type=int, help="texts of each task")
    parser.add_argument("--json", help="a file for the counts of every group")
    options = parser.parse_args()

    tokenizer: Any = load_tokenizer(options.tokenizer, options.eos)
    if (options.pairs is None) == (options.answers is None) or (options.answers is None) != (
        options.questions is None
    ):
        parser.error("give --pairs, or --questions and --answers")
    if options.pairs:
        recordings = read_pairs(options.pairs, tokenizer)
    else:
        chat = options.chat and (CHATS.get(options.chat) or Path(options.chat).read_text())
        recordings = read_answers(options.questions, options.answers, tokenizer, chat)
    if options.limit:
        tasks = {task: [r for r in recordings if r.task == task] for task in dict.fromkeys(r.task for r in recordings)}
        recordings = [r for found in tasks.values() for r in found[: options.limit]]
    print(f"{len(recordings)} texts, {sum(len(r.output) for r in recordings)} tokens")

    schedule = None if options.depth is None else Fixed(options.depth)
    results = {Path(path).name.split(".jsonl")[0]: read_rounds(options.questions, path) for path in options.recorded}
    for name, drafter in drafters(options.drafters):
        started = time.perf_counter()
        try:
            results[name] = measure(recordings, drafter, len(tokenizer), [tokenizer.eos_token_id], schedule)
        except NotRecorded as reason:
            print(f"{name}: left out ({reason})")
            continue
        print(f"{name}: {time.perf_counter() - started:.1f} s")
    print(
        f"\nTokens a round [95 %]\n\n{table(results)}\n\nDrafted tokens kept a round [95 %]\n\n{table(results, True)}"
    )
    if options.json:
        rows = {name: [vars(each) for each in found] for name, found in results.items()}
        Path(options.json).write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
