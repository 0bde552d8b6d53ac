"""Distil a drafter to a target.

accelerate launch scripts/distill_drafter.py --config recipes/smol/distill.yaml learning_rate=1e-3
"""

import argparse

from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.run import distill

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    distill(read_arguments(DistillArguments, options.config, options.overrides))
