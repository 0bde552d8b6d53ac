"""Build a datastore for `Datastore(corpus=...)`, 8 bytes a token on disk.

    python scripts/build_datastore.py --tokenizer me/target --source stdlib --out out/datastore.safetensors
    python scripts/build_datastore.py --tokenizer me/target --source out/generated me/chats --limit 50000 --out ...

A --source is anything that training reads: 'stdlib', a folder or .txt file, a .jsonl, .parquet or .csv file, a saved
data set, or a Hub id, name[:config][@revision].
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

from transformers import AutoTokenizer

from csdraft.amounts import count_text, size_text
from csdraft.data.chat import ChatFormat
from csdraft.data.sources import read_rows
from csdraft.progress import Progress
from csdraft.tables.corpus import CorpusIndex


def documents(options: argparse.Namespace, tokenizer: Any, progress: Progress) -> Iterator[list[int]]:
    """Token ids of each row of the sources, until there are enough."""
    tokens, chat = 0, ChatFormat.read(options.chat_template, options.chat_template_options)
    for source in options.source:
        rows = read_rows(source, tokenizer, options.max_length, options.split, options.limit, chat)
        for number, row in enumerate(rows):
            progress(f"{source}: {count_text(tokens)} tokens", number / len(rows))
            tokens += len(row["input_ids"])
            yield row["input_ids"]
            if options.tokens is not None and tokens >= options.tokens:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a folder or Hub id: the target's own tokenizer")
    parser.add_argument("--source", required=True, nargs="+", help="where the texts come from")
    parser.add_argument("--out", required=True, help="the safetensors file to write")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=int, help="examples of each source at most")
    parser.add_argument("--tokens", type=int, help="stop after so many tokens")
    parser.add_argument("--max-length", type=int, default=1 << 20, help="tokens of a document; longer ones are cut")
    parser.add_argument("--chat-template", help="of conversations: a Jinja file; the tokenizer's own by default")
    parser.add_argument("--chat-template-options", type=json.loads, help="what it reads besides messages, as JSON")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    progress, started = Progress(), time.perf_counter()
    index = CorpusIndex.build(documents(options, tokenizer, progress), progress)
    index.save(options.out)
    seconds = time.perf_counter() - started
    print(f"{options.out}: {len(index)} tokens, {size_text(index.nbytes)}, in {seconds:.1f} s")


if __name__ == "__main__":
    main()
