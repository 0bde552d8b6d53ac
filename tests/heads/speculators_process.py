"""What the package speculators computes, in an environment of its own: `python speculators_process.py FOLDER`.

FOLDER/asked/NAME.json asks for a random head of its own, which is saved as FOLDER/heads/NAME. Then the logits of each
head in FOLDER/heads on FOLDER/inputs.safetensors are put into FOLDER/logits/NAME.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals import GreedyTokenProposalConfig
from transformers import LlamaConfig

STEPS = 3


@torch.no_grad()
def logits(folder: Path, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """(steps, length, draft vocab) of each drafting step, when it reads the text's own tokens."""
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model, found = SpeculatorModel.from_pretrained(folder, config=config).eval(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    model(**given, document_ids=torch.zeros_like(given["input_ids"]), ttt_steps=STEPS)
    return torch.stack(found)


def made(asked: dict[str, Any]) -> Eagle3DraftModel:
    """A random head that drafts some tokens."""
    drafted = torch.tensor(asked.pop("drafted"))
    layer = LlamaConfig(**asked.pop("layer"), num_hidden_layers=1, attn_implementation="eager")
    said = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(asked.pop("verifier")),
    )
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer, speculators_config=said, draft_vocab_size=len(drafted), **asked
    )
    torch.manual_seed(0)
    model = Eagle3DraftModel(config)
    chosen = torch.zeros(layer.vocab_size, dtype=torch.bool)
    chosen[drafted] = True
    model.load_vocab_mappings(chosen, drafted - torch.arange(len(drafted)))
    model.load_verifier_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # norms, too: a bug must not hide behind a one
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.lm_head.weight.copy_(0.2 * torch.randn_like(model.lm_head.weight))
    return model


def main(folder: Path) -> None:
    for file in sorted(folder.glob("asked/*.json")):
        made(json.loads(file.read_text(encoding="utf-8"))).save_pretrained(folder / "heads" / file.stem)
    given = load_file(folder / "inputs.safetensors")
    (folder / "logits").mkdir()
    for head in sorted(folder.glob("heads/*")):
        save_file({"logits": logits(head, given)}, folder / "logits" / f"{head.name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
