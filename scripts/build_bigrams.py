"""Build a bigram table for `MaxGram(bigram=...)` from text of your own.

    python scripts/build_bigrams.py --tokenizer out/smol/tokenizer --text docs README.md --out out/bigrams.safetensors

Each --text is a folder of .py, .md and .txt files, one such file (documents parted by <|endoftext|>), or `stdlib`.
With --model instead, the table for `NGrammys(table=...)`: what the model itself says after each token.

    python scripts/build_bigrams.py --model models/smol-target --out out/successors.safetensors
"""

import argparse
from collections.abc import Iterator

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from csdraft.data.text import read_corpus
from csdraft.tables.bigram import BigramTable
from csdraft.tables.successors import SuccessorTable

BATCH = 256


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each document, without special tokens."""
    for start in range(0, len(texts), BATCH):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(
            texts[start : start + BATCH], add_special_tokens=False
        ):
            yield encoding.ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a folder or Hub id: the target's own tokenizer")
    parser.add_argument("--text", nargs="+", help="folders, files or 'stdlib'")
    parser.add_argument("--model", help="a folder or Hub id: the target; its own successors, without any text")
    parser.add_argument("--rows", type=int, default=10, help="successors of a token (with --model)")
    parser.add_argument("--length", type=int, default=3, help="tokens of a continuation (with --model)")
    parser.add_argument("--out", required=True, help="the safetensors file to write")
    options = parser.parse_args()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False).eval()
        successors = SuccessorTable.build(model, options.rows, options.length)
        successors.save(options.out)
        print(f"{options.out}: {options.rows} continuations of each of {len(successors)} tokens")
        return
    if not (options.tokenizer and options.text):
        parser.error("give --tokenizer and --text, or --model")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    texts = [document.text for corpus in options.text for document in read_corpus(corpus)]
    table = BigramTable.build(tokenize(tokenizer, texts), len(tokenizer))
    table.save(options.out)
    known = int((table.successor >= 0).sum())
    print(f"{options.out}: {known} of {len(table)} tokens have a successor, from {len(texts)} documents")


if __name__ == "__main__":
    main()
