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
from speculators.losses import resolve_loss_config
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
from speculators.models.peagle import core as peagle_core
from speculators.proposals import GreedyTokenProposalConfig
from transformers import LlamaConfig, Qwen3Config

STEPS = 3
KINDS = {
    "eagle3": (Eagle3DraftModel, Eagle3SpeculatorConfig),
    "peagle": (PEagleDraftModel, PEagleSpeculatorConfig),
    "dflash": (DFlashDraftModel, DFlashSpeculatorConfig),
}
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor, states: dict[int, torch.Tensor]) -> torch.Tensor:
    """(steps, length - 1, draft vocab) of each drafting step after each token, when it reads the text's own tokens.

    Args:
        ids: (1, length) a text.
        states: (1, length, width) the target's hidden states on it, by layer.
    """
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model, found = SpeculatorModel.from_pretrained(folder, config=config).eval(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    blocks, length = isinstance(model, DFlashDraftModel), ids.shape[1] - 1
    joined = torch.cat([states[layer] for layer in layers_of(config)], -1)
    given: dict[str, Any] = {"input_ids": ids[:, 1:], "hidden_states": joined[:, :-1]}
    last, loss = states[max(states)], {"loss_config": resolve_loss_config("kl_div", "eager")}
    if blocks:  # a block after each token but the first, which sees nothing of the text
        anchors = ids.shape[1] - config.block_size
        given = {"input_ids": ids, "hidden_states": joined, "loss_mask": torch.ones_like(ids)}
        given |= {"verifier_last_hidden_states": last, "max_anchors": anchors, **loss}
    elif isinstance(model, PEagleDraftModel):
        places = [torch.arange(length - step) for step in range(STEPS)]
        depths = torch.cat([torch.full_like(place, step) for step, place in enumerate(places)])
        peagle_core.generate_cod_sample_indices = lambda **_: (torch.cat(places), depths)  # all, not a sample
        given |= {"verifier_last_hidden_states": last[:, :-1], "num_depths": STEPS, **loss}
    else:
        given |= {"position_ids": torch.arange(length)[None], "ttt_steps": STEPS}
    model(**given, document_ids=torch.zeros_like(given["input_ids"]))
    if blocks:
        of_blocks = found[0].view(anchors, config.block_size, -1)[1:, 1 : 1 + STEPS]
        return padded(list(of_blocks.transpose(0, 1)), length)
    return padded(list(found[0].split([len(place) for place in places])) if "num_depths" in given else found, length)


def padded(steps: list[torch.Tensor], length: int) -> torch.Tensor:
    """(steps, length, draft vocab) with zeros where the package computes nothing."""
    return torch.stack([torch.nn.functional.pad(step, (0, 0, 0, length - len(step))) for step in steps])


def layers_of(config: Any) -> list[int]:
    """The hidden states that a head reads."""
    key = "aux_hidden_state_layer_ids" if config.speculators_model_type == "dflash" else None
    return getattr(config, key or "eagle_aux_hidden_state_layer_ids")


def made(asked: dict[str, Any]) -> SpeculatorModel:
    """A random head that drafts some tokens."""
    drafted, kind = torch.tensor(asked.pop("drafted")), asked.pop("kind")
    family = FAMILIES[asked.pop("family")]
    layer = family(**asked.pop("layer"), num_hidden_layers=asked.pop("blocks"), attn_implementation="eager")
    said = SpeculatorsConfig(
        algorithm=kind,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(asked.pop("verifier")),
    )
    model_class, config_class = KINDS[kind]
    config = config_class(
        transformer_layer_config=layer, speculators_config=said, draft_vocab_size=len(drafted), **asked
    )
    torch.manual_seed(0)
    model = model_class(config)
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
    states = {int(name): tensor for name, tensor in given.items() if name.isdigit()}
    (folder / "logits").mkdir()
    for head in sorted(folder.glob("heads/*")):
        save_file({"logits": logits(head, given["ids"], states)}, folder / "logits" / f"{head.name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
