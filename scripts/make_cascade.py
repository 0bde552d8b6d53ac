"""Put drafters together into a cascade: a folder that `CascadeDrafter.from_pretrained` reads, and the Hub if asked.

python scripts/make_cascade.py --config recipes/smol/cascade.yaml push_to_hub=me/my-cascade
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from csdraft import CascadeDrafter, ModelDrafter
from csdraft.drafters.model import load_model
from csdraft.spec import resolve, types
from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.run import check_tokenizers, check_writable, read_target


@dataclass
class CascadeArguments:
    """What `csdraft.CascadeDrafter` takes, for which target, and where the cascade goes."""

    target: str = "models/smol-target"  # its config and tokenizer are read, never its weights
    target_revision: str | None = None
    drafters: list = field(default_factory=lambda: ["max_gram"])  # folders, Hub ids, types, or {type: ..., options}
    k_matrix: Any = 5
    lenience: Any = 1.0
    verifier: Any = "match"
    schedule: Any = "cost_model"
    dtype: str = "auto"  # of the drafters' weights; auto: as they are stored
    output_dir: str = "out/cascade"
    copy_models: bool = True  # False writes drafters of the Hub down by id and revision
    push_to_hub: str | None = None  # Hub id to upload to

    def __post_init__(self) -> None:
        if not isinstance(self.drafters, list):
            raise ValueError(f"drafters={self.drafters!r} is one drafter; give a list, largest first: [...]")


def make_cascade(args: CascadeArguments) -> None:
    config, tokenizer = read_target(args)  # type: ignore[arg-type]
    check_writable(args.output_dir)
    drafters = []
    for drafter in args.drafters:
        if isinstance(drafter, str) and drafter not in types("drafters"):
            check_tokenizers(drafter, args.target, tokenizer)
            try:
                drafter = ModelDrafter(load_model(drafter, dtype=args.dtype))
            except OSError as error:
                raise ValueError(f"no drafter at {drafter!r}; give a folder, a Hub id or a type") from error
        drafters.append(resolve("drafters", drafter))
    cascade = CascadeDrafter(drafters, args.k_matrix, args.lenience, args.verifier, args.schedule)
    with torch.device("meta"):  # without weights: enough to write down what the cascade is for
        target = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    cascade.save_pretrained(args.output_dir, tokenizer, target, args.copy_models)
    if args.push_to_hub is not None:
        print(cascade.push_to_hub(args.push_to_hub, tokenizer, target, args.copy_models))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args()
    make_cascade(read_arguments(CascadeArguments, options.config, options.overrides))
