"""Muon for the weight matrices, AdamW for the rest: small models from scratch need about half the tokens of AdamW.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; its step is scaled to AdamW's, arXiv 2502.16982.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Two optimisers with one learning rate. AdamW takes embeddings, output layers and norms, without weight decay."""

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8
    ):
        known = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        known |= {id(weight) for weight in output_layers(model)}
        matrices, others = [], []
        for weight in filter(lambda p: p.requires_grad, model.parameters()):
            (matrices if weight.ndim == 2 and id(weight) not in known else others).append(weight)
        self.parts: list[Optimizer] = []  # neither takes an empty list: LoRA trains matrices alone
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(AdamW(others, lr=lr, weight_decay=0.0, betas=betas, eps=eps))
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
        self.param_groups = self._groups()  # loading has replaced the groups; the learning rate is set in these


def output_layers(model: Any) -> Iterator[nn.Parameter]:
    """The weights that compute logits. A head may have one output layer for each drafted token."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    if found is not None:
        yield found.weight
    if "d2t" in model._buffers:  # a head
        for name, weight in model.named_parameters():
            if ("head" in name or "output" in name) and weight.ndim == 2 and len(weight) == len(model.d2t):
                yield weight
