"""Distil from one start in several ways, for equal steps, and compare block efficiency prompt by prompt.

python scripts/compare_arms.py --config recipes/smol/arms.yaml
"""

import argparse
import sys

from csdraft.bench.arms import compare_arms
from csdraft.trainers.arguments import read_values

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file: arms, baseline, and keys of a distillation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    values = read_values(options.config, options.overrides)
    if missing := [key for key in ("arms", "baseline", "output_dir") if key not in values]:
        parser.error(f"{options.config} lacks {', '.join(missing)}; recipes/smol/arms.yaml is an example")
    arms, baseline = values.pop("arms"), values.pop("baseline")
    try:
        print(compare_arms(values, arms, baseline))
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command goes on from {values['output_dir']}")
