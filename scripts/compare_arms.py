"""Distil from one start in several ways, for equal steps, and compare block efficiency prompt by prompt.

python scripts/compare_arms.py --config recipes/smol/arms.yaml
"""

import argparse

from csdraft.bench.arms import compare_arms
from csdraft.trainers.arguments import read_values

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file: arms, baseline, and keys of a distillation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    values = read_values(options.config, options.overrides)
    arms, baseline = values.pop("arms"), values.pop("baseline")
    print(compare_arms(values, arms, baseline))
