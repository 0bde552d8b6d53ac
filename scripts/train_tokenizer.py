"""Train a byte-level BPE tokenizer.

python scripts/train_tokenizer.py --config recipes/smol/tokenizer.yaml vocab_size=1024
"""

from csdraft.trainers.command import run_script
from csdraft.trainers.tokenizer import TokenizerArguments, train_tokenizer


def main(args: TokenizerArguments) -> None:
    train_tokenizer(args)


if __name__ == "__main__":
    run_script(__doc__, TokenizerArguments, main)
