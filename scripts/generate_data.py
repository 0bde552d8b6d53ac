"""Let a target write the data that its drafter is trained on; the same command continues where a killed run stopped.

accelerate launch scripts/generate_data.py --config recipes/smol/data.yaml temperature=0.7
"""

from collections.abc import Mapping
from typing import Any

from csdraft.cascade import as_drafter
from csdraft.data.generate import GenerateArguments, generate
from csdraft.spec import resolve, types
from csdraft.trainers.command import run_script


def open_drafter(assistant: Any) -> Any:
    """What `generate` takes as assistant: a drafter made from its type, or the name of one that can be loaded."""
    if isinstance(assistant, Mapping) or assistant in types("drafters"):
        return resolve("drafters", assistant)
    as_drafter(assistant)  # an error now, rather than after the target has been loaded
    return assistant


def main(args: GenerateArguments) -> None:
    generate(args, open_drafter(args.assistant))


if __name__ == "__main__":
    run_script(__doc__, GenerateArguments, main)
