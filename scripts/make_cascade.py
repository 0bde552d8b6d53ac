"""Put drafters together into a cascade: a folder that `CascadeDrafter.from_pretrained` reads, and the Hub if asked.

python scripts/make_cascade.py --config recipes/smol/cascade.yaml push_to_hub=me/my-cascade
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from csdraft import CascadeDrafter, ModelDrafter
from csdraft.data.target import check_writable, option, read_target
from csdraft.models import load_model
from csdraft.spec import resolve, types
from csdraft.trainers.command import run_script
from csdraft.trainers.run import check_tokenizers


@dataclass
class CascadeArguments:
    """What `csdraft.CascadeDrafter` takes, for which target, and where the cascade goes."""

    target: str = option(
        "models/smol-target", "Folder or Hub id of the target; its config and tokenizer are read, its weights are not."
    )
    target_revision: str | None = option(None, "Branch, tag or commit of the target.")
    drafters: Any = option(["max_gram"], "Largest first: folders, Hub ids, types, or {type: ..., options}.")
    k_matrix: Any = option(5, "Tokens that each drafter gives: a matrix, list or number.")
    lenience: Any = option(1.0, "Of reviewing drafters; 1 is strict.")
    verifier: Any = option("match", "Acceptance rule: a type or {type: ..., options}.")
    schedule: Any = option("cost_model", "When to stop drafting: a type or {type: ..., options}.")
    dtype: str = option("auto", "dtype of the drafters' weights; auto is as stored.")
    output_dir: str = option("out/cascade", "Folder for the cascade.")
    copy_models: bool = option(True, "Save the drafters' weights; false notes those of the Hub by id and revision.")
    push_to_hub: str | None = option(None, "Hub id to upload to.")

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
    run_script(__doc__, CascadeArguments, make_cascade)
