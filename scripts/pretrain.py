"""Train a causal language model from scratch.

python scripts/pretrain.py --config recipes/smol/target.yaml max_steps=100
"""

import argparse

from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.pretrain import PretrainArguments, pretrain

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    pretrain(read_arguments(PretrainArguments, options.config, options.overrides))
