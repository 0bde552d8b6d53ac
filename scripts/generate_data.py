"""Let a target write the data that its drafter is trained on; the same command goes on where a killed run stopped.

accelerate launch scripts/generate_data.py --config recipes/smol/data.yaml temperature=0.7
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from csdraft.cascade import as_drafter
from csdraft.data.generate import GenerateArguments, generate
from csdraft.spec import resolve, types
from csdraft.trainers.arguments import read_arguments


def open_drafter(assistant: Any) -> Any:
    """What `generate` takes as assistant: a drafter made from its type, or the name of one that can be loaded."""
    if isinstance(assistant, Mapping) or assistant in types("drafters"):
        return resolve("drafters", assistant)
    as_drafter(assistant)  # an error now, rather than after the target has been loaded
    return assistant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    args = read_arguments(GenerateArguments, options.config, options.overrides)
    try:
        generate(args, open_drafter(args.assistant))
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command goes on from {args.output_dir}")


if __name__ == "__main__":
    main()
