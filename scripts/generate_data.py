"""Let a target write a corpus for its drafter: `scripts/generate_data.py --target models/smol-target --out FILE`."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from csdraft import MaxGram
from csdraft.data.generate import write_corpus
from csdraft.data.text import read_corpus, split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="folder or Hub id of the model that writes")
    parser.add_argument("--corpus", default="stdlib", help="where the beginnings come from (as for pretrain.py)")
    parser.add_argument("--out", type=Path, required=True, help=".txt file to write or to go on with")
    parser.add_argument("--count", type=int, default=2000, help="texts to write")
    parser.add_argument("--begin", type=int, default=128, help="tokens of each beginning")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens that the target adds")
    parser.add_argument("--rows", type=int, default=8, help="texts written at once")
    parser.add_argument(
        "--sampled", type=float, default=0.25, help="share written at --temperature, the rest greedily"
    )
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=None, help="torch CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    documents, _ = split(read_corpus(args.corpus))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    how = (args.count, MaxGram(), args.begin, args.new_tokens, args.rows, args.sampled, args.temperature)
    with tqdm(total=args.count, unit=" texts") as bar:
        for done in write_corpus(target, tokenizer, documents, args.out, *how):
            bar.update(done - bar.n)


if __name__ == "__main__":
    main()
