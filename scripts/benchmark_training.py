"""What the trainer costs beside a bare loop, in one run, side by side.

python scripts/benchmark_training.py --config recipes/smol/distill.yaml
"""

from csdraft.bench.training import trainer_overhead
from csdraft.trainers.arguments import read_values
from csdraft.trainers.command import recipe_parser
from csdraft.trainers.distill_arguments import DistillArguments

if __name__ == "__main__":
    parser = recipe_parser(__doc__, DistillArguments, required=True)
    parser.add_argument("--steps", type=int, default=12, help="of each turn")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each")
    options = parser.parse_args()
    values = read_values(options.config, options.overrides)
    ratio, tokens = trainer_overhead(values, options.steps, options.repetitions)
    print(f"trainer over bare loop: {ratio}; {tokens:,.0f} tokens/s of packed blocks")
    print("PASS" if ratio.median <= 1.10 else "FAIL", "at most 1.10 times a bare loop")
