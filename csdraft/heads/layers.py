"""Some layers of a model as a model of their own that shares its weights: what a self-drafting adapter stands on.

Draft & Verify (arXiv 2309.08168) and LayerSkip (arXiv 2404.16710) draft with a part of the target's layers. Here the
part is a second set of modules over the same tensors: the target stays as it is, and nothing is switched.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_layers", "embedding_fingerprint", "embeddings", "fingerprint", "layer_stacks", "shared_layers",
]  # fmt: skip

T5_LIKE = ("t5", "mt5", "umt5")
TABLE_IN_FIRST_LAYER = ("t5", "mt5")
"""Their first layer has the table of relative positions that all use."""
WRAPPED = ("base_layer", "original_module")
"""Where PEFT's layers keep the module that they stand for."""
INDEX_LISTS = ("mlp_only_layers",)
"""Options of configs that name layers by number; other lists as long as the model is deep have one entry a layer."""
NO_LAYER_LISTS = ("architectures", "eos_token_id", "suppress_tokens", "begin_suppress_tokens")
SAMPLES, SMALLEST = 16, 2.0**-14
"""Values of each tensor that a fingerprint looks at; those below `SMALLEST` count as 0, since float16 blurs them."""


def check_layers(config: Any, layers: Any, encoder_layers: Any = None) -> None:
    """Raises ValueError unless these layers can be taken out of a model of this config.

    Args:
        config: of a causal LM or a T5-like model.
        layers: numbers of (decoder) layers, in rising order.
        encoder_layers: the same of a T5-like model's encoder; None is all of them.
    """
    name = config.model_type
    if config.is_encoder_decoder and name not in T5_LIKE:
        raise ValueError(
            f"layers cannot be taken out of a {name!r} model: of encoder-decoders only {T5_LIKE} can be cut"
        )
    if not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"layers cannot be taken out of a {name!r} model, which reads more than text; use a text-only checkpoint"
        )
    if encoder_layers is not None and not config.is_encoder_decoder:
        raise ValueError(f"encoder_layers={encoder_layers}, but a {name!r} model has no encoder; leave them out")
    _check_numbers(
        "layers", layers, config.num_decoder_layers if config.is_encoder_decoder else config.num_hidden_layers
    )
    if encoder_layers is not None:
        _check_numbers("encoder_layers", encoder_layers, config.num_layers)


def _check_numbers(key: str, given: Any, count: int) -> None:
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < count for n in numbers)
    if not numbers or not whole or numbers != sorted(set(numbers)):
        raise ValueError(
            f"{key}={given!r}: list numbers of the target's {count} layers, from 0, in rising order, such as "
            f"{sorted({0, count - 1})}"
        )


def layer_stacks(model: Any) -> list[nn.ModuleList]:
    """The lists that hold a model's layers: the decoder's, then the encoder's if there is one."""
    if model.config.is_encoder_decoder:
        return [model.get_decoder().block, model.get_encoder().block]
    count = model.config.num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [module]
    raise ValueError(f"{type(model).__name__} keeps its {count} layers in no ModuleList, so none can be taken out")


@torch.inference_mode(False)
def shared_layers(model: Any, layers: Sequence[int], encoder_layers: Sequence[int] | None = None) -> Any:
    """A model of some of the layers of `model`, with its embeddings, last norm and head, over the same tensors.

    Its parameters are objects of its own without gradients, so that no flag of `model` changes; hooks, PEFT adapters
    and an overridden `forward` of `model` are left out.

    Args:
        model: a causal LM or a T5-like model whose parameters are whole, on the devices where they will stay: whatever
            moves or casts one of the two later parts them.
        layers, encoder_layers: see `check_layers`.
    """
    check_layers(model.config, layers, encoder_layers)
    check_whole(model)
    stacks, kept = layer_stacks(model), [list(layers)]
    if len(stacks) == 2:
        kept.append(list(range(len(stacks[1])) if encoder_layers is None else encoder_layers))
    memo = _shared_parts(model)
    for stack, numbers in zip(stacks, kept, strict=True):
        memo[id(stack)] = taken = nn.ModuleList(copy.deepcopy(stack[number], memo) for number in numbers)
        _renumber(taken)
        if model.config.model_type in TABLE_IN_FIRST_LAYER and numbers[0] != 0:
            _give_table(taken[0], stack[0], memo)
    shared = copy.deepcopy(model, memo).train(model.training)
    _cut_configs(shared, kept)
    _clean(shared)
    return shared


def _renumber(stack: nn.ModuleList) -> None:
    """Caches find a layer's part by its number."""
    for position, layer in enumerate(stack):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = position


def _give_table(layer: Any, first: Any, memo: dict[int, Any]) -> None:
    """The table of relative positions, from the model's first layer to the one that is first now."""
    attention, source = layer.layer[0].SelfAttention, first.layer[0].SelfAttention
    attention.has_relative_attention_bias = True
    attention.relative_attention_bias = copy.deepcopy(source.relative_attention_bias, memo)


def check_whole(model: nn.Module) -> None:
    """Raises ValueError if some of the model's weights are not there."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.numel() == 0:
            raise ValueError(
                f"parameter {name} of {type(model).__name__} is not there as a whole (offloaded, or sharded by ZeRO-3 "
                "or FSDP), so it can be neither shared nor copied; load the model whole, before any engine takes it"
            )


def _shared_parts(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: tensors stay, hooks go, what PEFT has wrapped stands for its wrapper."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised ones carry more than their values, and train nothing
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    modules = list(model.modules())
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, OrderedDict):
                memo[id(value)] = OrderedDict()
    for module in reversed(modules):  # a wrapper may hold another
        for name in WRAPPED:
            if name in module._modules:
                memo[id(module)] = copy.deepcopy(module._modules[name], memo)
    return memo


def _clean(shared: nn.Module) -> None:
    for module in shared.modules():
        state = vars(module)
        state.pop("_output_capturing_hooks_installed", None)
        if "_hf_hook" not in state:  # accelerate's hooks work as copies; any other forward is the original's
            state.pop("forward", None)
    for name in ("peft_config", "_hf_peft_config_loaded", "generate"):
        vars(shared).pop(name, None)


def _cut_configs(shared: Any, kept: list[list[int]]) -> None:
    config = shared.config
    if not config.is_encoder_decoder:
        _cut_config(config, kept[0])
        return
    for stack, numbers in zip((shared.get_decoder(), shared.get_encoder()), kept, strict=True):
        stack.config.num_layers = len(numbers)
    for one in (config, shared.get_decoder().config, shared.get_encoder().config):
        one.num_decoder_layers = len(kept[0])
    config.num_layers = len(kept[1])


def _cut_config(config: Any, layers: Sequence[int]) -> None:
    """Changes a decoder-only config to one of these layers, its lists with one entry a layer included."""
    count = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if key in INDEX_LISTS and value:
            setattr(config, key, [layers.index(number) for number in value if number in layers])
        elif isinstance(value, list | tuple) and len(value) == count and key not in NO_LAYER_LISTS:
            setattr(config, key, [value[number] for number in layers])
    config.num_hidden_layers = len(layers)


def fingerprint(model: Any) -> str:
    """Equal for models with the same weights, whatever else they are called; cheap, since it only looks at samples.

    It hashes the model type and, of every parameter but embeddings and output layer (which may be resized), name,
    shape and 16 values spread over it, rounded to bfloat16. So a bfloat16 checkpoint has one fingerprint in whatever
    float type it is loaded; a fine-tuned, merged or quantised one has another. PEFT adapters do not count.
    """
    check_whole(model)
    left_out = {id(p) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
                for p in layer.parameters()}  # fmt: skip
    chosen = sorted((item for item in _own_parameters(model) if id(item[1]) not in left_out), key=lambda item: item[0])
    return _digest(model.config.model_type, chosen)


def embeddings(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a model's embedding ("input.weight") and output layer ("output.weight", and a bias if any).

    An output layer that is the embedding has the embedding's; what PEFT has wrapped stands for its wrapper.
    """
    found: dict[str, nn.Parameter] = {}
    for where, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        while layer is not None and (inner := [name for name in WRAPPED if name in layer._modules]):
            layer = layer._modules[inner[0]]
        if layer is not None:
            known = {id(parameter) for parameter in found.values()}
            found |= {f"{where}.{n}": p for n, p in layer.named_parameters(recurse=False) if id(p) not in known}
    return found


def embedding_fingerprint(model: Any, rows: int) -> str:
    """Equal for models with the same embedding and output layer, as `fingerprint` is for the rest.

    Args:
        rows: of the vocabulary; those behind them are padding.
    """
    check_whole(model)
    return _digest(model.config.model_type, [(name, p[:rows]) for name, p in embeddings(model).items()])


def _digest(kind: str, chosen: Sequence[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(repr([kind, *((n, tuple(p.shape)) for n, p in chosen)]).encode())
    samples: dict[torch.device, list[Tensor]] = {}
    for _, parameter in chosen:  # one copy to the host a device
        values = parameter.detach().reshape(-1)
        values = values[:: max(len(values) // SAMPLES, 1)][:SAMPLES].float()
        samples.setdefault(parameter.device, []).append(values)
    for values in samples.values():
        flat = torch.cat(values).cpu()
        flat = flat.masked_fill(flat.abs() < SMALLEST, 0.0).bfloat16()
        digest.update(flat.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters by the names that they have without PEFT's wrappers, whose own are left out."""
    wrappers = [name for name, module in model.named_modules() if any(inner in module._modules for inner in WRAPPED)]
    wrappers = {f"{name}." for name in wrappers}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        ends = [i for i in range(len(parts)) if ".".join(parts[:i]) + "." in wrappers]
        if all(parts[i] in WRAPPED for i in ends):
            yield ".".join(part for part in parts if part not in WRAPPED), parameter
