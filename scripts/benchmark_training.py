"""What the trainer costs beside a bare loop, in one run, side by side.

python scripts/benchmark_training.py --config recipes/smol/distill.yaml
"""

import argparse

from csdraft.bench.training import trainer_overhead
from csdraft.trainers.arguments import read_values

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a distillation's YAML file")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    values = read_values(options.config, options.overrides)
    ratio, tokens = trainer_overhead(values, options.steps, options.repetitions)
    print(f"trainer over bare loop: {ratio}; {tokens:,.0f} tokens/s of packed blocks")
    print("PASS" if ratio.median <= 1.10 else "FAIL", "at most 1.10 times a bare loop")
