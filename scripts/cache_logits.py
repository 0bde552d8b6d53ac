"""Keep a target's largest logits on disk, to train without its forward; the same command goes on after a kill.

accelerate launch scripts/cache_logits.py dataset=out/smol/written max_length=512 k=64 output_dir=out/smol/logits
"""

import argparse

from csdraft.data.target_cache import CacheArguments, cache_logits
from csdraft.trainers.arguments import read_arguments

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    cache_logits(read_arguments(CacheArguments, options.config, options.overrides))
