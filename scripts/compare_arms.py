"""Distil from one start in several ways, for equal steps, and compare block efficiency prompt by prompt.

python scripts/compare_arms.py --config recipes/smol/arms.yaml
"""

from csdraft.bench.arms import compare_arms
from csdraft.trainers.arguments import read_values
from csdraft.trainers.command import one_line_errors, recipe_parser
from csdraft.trainers.distill_arguments import DistillArguments

if __name__ == "__main__":
    parser = recipe_parser(__doc__, DistillArguments, required=True)
    options = parser.parse_args()
    values = read_values(options.config, options.overrides)
    if missing := [key for key in ("arms", "baseline", "output_dir") if key not in values]:
        parser.error(f"{options.config} lacks {', '.join(missing)}; recipes/smol/arms.yaml is an example")
    arms, baseline = values.pop("arms"), values.pop("baseline")
    with one_line_errors(values["output_dir"]):
        print(compare_arms(values, arms, baseline))
