"""Muon for the weight matrices, AdamW for the rest: about half the tokens of AdamW alone on small models from scratch.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; its step scaled to AdamW's as in arXiv 2502.16982.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Two optimisers behind one rate: embeddings, output layers and norms go to AdamW, without weight decay."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]):
        known = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        known |= {id(weight) for weight in output_layers(model)}
        matrices, others = [], []
        for weight in filter(lambda p: p.requires_grad, model.parameters()):
            (matrices if weight.ndim == 2 and id(weight) not in known else others).append(weight)
        self.parts = (
            Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=lr, weight_decay=0.0, betas=betas),
        )
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()  # loading replaces the groups; the rate schedule must see the new ones


def output_layers(model: Any) -> Iterator[nn.Parameter]:
    """The weights that make logits: a model's output layer, or a head's, which may have one for each drafted token."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    if found is not None:
        yield found.weight
    for name, weight in model.named_parameters():
        ours = "d2t" in model._buffers and ("head" in name or "output" in name)
        if ours and weight.ndim == 2 and len(weight) == len(model.d2t):
            yield weight
