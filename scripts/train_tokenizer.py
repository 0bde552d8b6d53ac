"""Train a byte-level BPE tokenizer.

python scripts/train_tokenizer.py --config recipes/smol/tokenizer.yaml vocab_size=1024
"""

import argparse

from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.tokenizer import TokenizerArguments, train_tokenizer

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    train_tokenizer(read_arguments(TokenizerArguments, options.config, options.overrides))
