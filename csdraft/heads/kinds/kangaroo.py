"""Kangaroo (arXiv 2404.18911): the target's first layers draft, and a trained adapter replaces all other layers.

The adapter is one attention block with a norm before it, and a last norm; it has no MLP. The target's own output layer
reads its output. The paper ends a draft where the adapter is unsure: the schedule `confidence` does that.

Here the drafter is an ordinary small model: k layers over the target's tensors, the adapter as its last layer, and its
own cache for all of them. So it drafts chains and trees in batches like any model. This has a price:

* The paper computes the first k layers once, for draft and check. Here the target computes them again when it checks.
* The drafter reads the prompt, and a token or two of each round, through its k + 1 layers, and holds their keys and
  values. The target's hidden states after block k could not replace that: drafted tokens also look at the first
  layers' keys and values of the text, and those lie in the target's cache.

The adapter's attention is of the target's family, with as many heads. It starts as that of block k, and the last norm
as the target's. The original code starts at random.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.heads.folder import check_tensors, read_tensors, write_tensors
from csdraft.heads.layers import check_layers, fingerprint, layer_stacks, shared_layers
from csdraft.heads.on_target import OnTarget, name_only, set_parameter
from csdraft.heads.self_draft import DOCUMENT, KANGAROO, Lender, write_document
from csdraft.stored import fit, naming

__all__ = ["KangarooDraft", "KangarooOptions", "check_exit"]

FILE = "model.safetensors"


@dataclass(frozen=True)
class KangarooOptions:
    """Keys of `init.kangaroo`.

    Args:
        layers: how many of the target's first layers draft; the paper uses 2 of 32.
    """

    layers: int = 2


def check_exit(config: Any, layers: int) -> None:
    """Raises ValueError unless an adapter can follow this number of a target's layers.

    Args:
        config: the target's.
    """
    check_layers(config, [0])
    if config.is_encoder_decoder:
        raise ValueError(f"kangaroo: a {config.model_type!r} target is an encoder-decoder; give a decoder-only one")
    if not 0 < layers < config.num_hidden_layers:
        raise ValueError(
            f"kangaroo: layers={layers} must be from 1 to {config.num_hidden_layers - 1}: the target has "
            f"{config.num_hidden_layers}, and the adapter replaces at least the last"
        )


class KangarooDraft(OnTarget):
    """An adapter without the target's layers; `bind` puts it on a target.

    Args:
        layers: how many of the target's layers come before it.
        base: the target that it was trained on.
        state: its tensors, by their names in the complete model.
        source: the folder or Hub id it was loaded from.
    """

    what, use = "kangaroo adapter", "runs on a target's first layers"

    def __init__(self, layers: int, base: Lender, state: Mapping[str, Tensor], source: str = ""):
        super().__init__(name_only(source, vocab_size=base.vocab_size), state)
        self.layers, self.base = layers, base

    @classmethod
    def new(cls, target: Any, layers: int) -> Any:
        """A complete model with a new adapter to train, in float32."""
        return _with_adapter(target, cls(layers, Lender.of(target, fingerprint(target)), {})).float()

    # Binding.

    def open(self, target: Any, dtype: torch.dtype) -> Any:
        """See `OnTarget.open`; the target's layers are copied if they have another dtype."""
        self.check(target)
        return self._filled(_with_adapter(target, self)).to(dtype)

    def _put_on(self, target: Any) -> Any:
        return self._filled(_with_adapter(target, self)).requires_grad_(False)

    @torch.inference_mode(False)
    def _filled(self, network: Any) -> Any:
        """The network with the stored tensors in its adapter."""
        own, state = {n: p for n, p in network.named_parameters() if n not in network.lent}, self.state
        with naming(f"{self._name} does not fit the target's first {self.layers} layers"):
            check_tensors(self.config._name_or_path, state, own)
        for name, parameter in own.items():
            parameter.data.copy_(state[name])
        return network

    # On disk.

    @classmethod
    def of(cls, model: Any, state_dict: Mapping[str, Tensor] | None = None) -> KangarooDraft:
        state = dict(model.state_dict() if state_dict is None else state_dict)
        own = {name: state[name] for name in state if name not in model.lent}
        layers, base = model.adapter_of
        return cls(layers, base, own, model.config._name_or_path)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the adapter's tensors and drafter.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_tensors(Path(folder, FILE), self.state)
        write_document(folder, KANGAROO, {"layers": self.layers, "base": asdict(self.base)})

    @classmethod
    def load(cls, path: str, document: Mapping[str, Any], **hub: Any) -> KangarooDraft:
        """Reads what `save` wrote."""
        at = f"{path}/{DOCUMENT}"
        layers, base = fit(document.get("layers"), int, f"{at}: layers"), document.get("base")
        return cls(layers, fit(base, Lender, f"{at}: base"), read_tensors(path, (FILE,), **hub), path).eval()


class Nothing(nn.Module):
    """Replaces an MLP: adds nothing to the hidden states."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden)


@torch.inference_mode(False)
def _with_adapter(target: Any, stored: KangarooDraft) -> Any:
    """The target's first layers over its own tensors, and an adapter that starts as a copy of the next block.

    Its attribute `lent` names the target's tensors; only the adapter's parameters have gradients.
    """
    check_exit(target.config, stored.layers)
    if getattr(target, "is_quantized", False):
        raise ValueError("the target is quantised: its weights are no start for an adapter; load it in a float type")
    network = shared_layers(target, range(stored.layers + 1)).eval()
    block = layer_stacks(network)[0][-1]
    if not isinstance(getattr(block, "mlp", None), nn.Module):
        raise ValueError(
            f"blocks of a {target.config.model_type!r} model have no part called mlp that an adapter could leave "
            "out; cut layers out of the target instead: init: {from_target: {layers: [...]}}"
        )
    block.mlp = Nothing()
    own = _in_use(network, [block, *_norms(network.get_decoder())[-1:]])
    for name in own:
        set_parameter(network, name, nn.Parameter(network.get_parameter(name).detach().clone()))
    network.lent = {name: name for name in network.state_dict() if name not in own}
    network.stored_by, network.adapter_of = KangarooDraft, (stored.layers, stored.base)
    network.config._name_or_path = stored.config._name_or_path
    return network


def _norms(decoder: nn.Module) -> list[nn.Module]:
    """Its children that are norms, in order: those whose parameters are all vectors."""
    sizes = [(child, [parameter.dim() for parameter in child.parameters()]) for child in decoder.children()]
    return [child for child, dims in sizes if dims and max(dims) == 1]


@torch.enable_grad()
def _in_use(network: Any, modules: list[nn.Module]) -> set[str]:
    """Names of the parameters in these modules that affect logits: the norm before a missing MLP does not."""
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    asked = {name: parameter for name, parameter in network.named_parameters() if id(parameter) in chosen}
    for parameter in asked.values():
        parameter.requires_grad_(True)
    logits = network(torch.arange(2, device=network.device)[None], use_cache=False).logits
    found = torch.autograd.grad(logits.float().sum(), list(asked.values()), allow_unused=True)
    for parameter in asked.values():
        parameter.requires_grad_(False)
    return {name for name, gradient in zip(asked, found, strict=True) if gradient is not None}
