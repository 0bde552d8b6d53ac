"""Makes a model from some layers of another, over the same weights: the base of a self-drafting adapter.

Draft & Verify (arXiv 2309.08168) and LayerSkip (arXiv 2404.16710) draft with some of the target's layers. Here these
layers are a second set of modules over the same tensors, so the target is never changed or switched.
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
    "check_layers", "embedding_fingerprint", "embeddings", "fingerprint", "first_layer", "layer_stacks",
    "shared_layers",
]  # fmt: skip

T5_LIKE = ("t5", "mt5", "umt5")
TABLE_IN_FIRST_LAYER = ("t5", "mt5")
"""Families whose first layer holds the table of relative positions for all layers."""
WRAPPED = ("base_layer", "original_module", "token_adapter")
"""Where PEFT's layers keep the module that they wrap."""
INDEX_LISTS = ("mlp_only_layers",)
"""Keys of configs that list numbers of layers. Other lists with as many entries as layers have one for each layer."""
NO_LAYER_LISTS = ("architectures", "eos_token_id", "suppress_tokens", "begin_suppress_tokens")
SAMPLES, SMALLEST = 16, 2.0**-14
"""How many values of each tensor a fingerprint reads; values below `SMALLEST` count as 0: float16 rounds them."""


def first_layer(config: Any) -> Any:
    """The config of a model's first layer; that of the whole model unless its layers differ in size."""
    return config.per_layer_config[0] if config.is_heterogeneous else config


def check_layers(config: Any, layers: Any, encoder_layers: Any = None) -> None:
    """Raises ValueError unless these layers can be taken out of a model of this config.

    Args:
        config: of a causal LM or a T5-like model.
        layers: numbers of (decoder) layers, in rising order.
        encoder_layers: the same for a T5-like model's encoder; None: all of them.
    """
    name, text_only = config.model_type, config.is_encoder_decoder or config.get_text_config(decoder=True) is config
    reasons = {
        f"of encoder-decoders only {T5_LIKE} can be cut": config.is_encoder_decoder and name not in T5_LIKE,
        "it reads more than text; use a text-only checkpoint": not text_only,
        "its layers differ in size, or each has an embedding": (
            config.is_heterogeneous or getattr(config, "hidden_size_per_layer_input", 0)
        ),
    }
    for reason in (reason for reason, applies in reasons.items() if applies):
        raise ValueError(f"layers cannot be taken out of a {name!r} model: {reason}")
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
    """A model with some layers of `model`, and its embeddings, last norm and output layer, over the same tensors.

    Its parameters are new objects without gradients, so no flag of `model` changes. It has none of `model`'s hooks and
    PEFT adapters, and ignores an overridden `forward`.

    Args:
        model: a causal LM or a T5-like model with whole parameters, on the devices where they will stay: if either
            model is moved or cast later, the two no longer share them.
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
        for position, layer in enumerate(taken):  # by which caches find them
            for module in (module for module in layer.modules() if "layer_idx" in vars(module)):
                vars(module)["layer_idx"] = position
        if model.config.model_type in TABLE_IN_FIRST_LAYER and numbers[0] != 0:
            _give_table(taken[0], stack[0], memo)
    shared = copy.deepcopy(model, memo).train(model.training)
    _cut_configs(shared, kept)
    _clean(shared)
    return shared


def _give_table(layer: Any, first: Any, memo: dict[int, Any]) -> None:
    """Copies the table of relative positions from the model's first layer to the new first one."""
    attention, source = layer.layer[0].SelfAttention, first.layer[0].SelfAttention
    attention.has_relative_attention_bias = True
    attention.relative_attention_bias = copy.deepcopy(source.relative_attention_bias, memo)


def check_whole(model: nn.Module) -> None:
    """Raises ValueError if some of the model's weights are not in memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.numel() == 0:
            raise ValueError(
                f"parameter {name} of {type(model).__name__} is not there as a whole (offloaded, or sharded by ZeRO-3 "
                "or FSDP), so it can be neither shared nor copied; load the model whole, before an engine shards it"
            )


def _shared_parts(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: it shares tensors, drops hooks, and replaces PEFT's wrappers by what they wrap."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised ones hold more than their values, and are never trained
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    modules = list(model.modules())
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, OrderedDict):
                memo[id(value)] = OrderedDict()
    for module in reversed(modules):  # a wrapper may hold another
        if (inner := _wrapped(module)) is not None:
            memo[id(module)] = copy.deepcopy(inner, memo)
    return memo


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper of PEFT keeps; None if it is no wrapper."""
    return next((inner for name in WRAPPED if (inner := module._modules.get(name)) is not None), None)


def _clean(shared: nn.Module) -> None:
    for module in shared.modules():
        state = vars(module)
        state.pop("_output_capturing_hooks_installed", None)
        if "_hf_hook" not in state:  # accelerate's hooks work as copies; any other forward is the original's
            state.pop("forward", None)
    for name in ("peft_config", "_hf_peft_config_loaded", "generate"):
        vars(shared).pop(name, None)


def _cut_configs(shared: Any, kept: list[list[int]]) -> None:
    """Changes the model's configs, with their lists of one entry per layer, to the layers that are kept."""
    config, layers = shared.config, kept[0]
    if config.is_encoder_decoder:
        for stack, numbers in zip((shared.get_decoder(), shared.get_encoder()), kept, strict=True):
            stack.config.num_layers = len(numbers)
        for one in (config, shared.get_decoder().config, shared.get_encoder().config):
            one.num_decoder_layers = len(layers)
        config.num_layers = len(kept[1])
        return
    count = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if key in INDEX_LISTS and value:
            setattr(config, key, [layers.index(number) for number in value if number in layers])
        elif isinstance(value, list | tuple) and len(value) == count and key not in NO_LAYER_LISTS:
            setattr(config, key, [value[number] for number in layers])
    config.num_hidden_layers = len(layers)


def fingerprint(model: Any) -> str:
    """A hash that is equal for models with the same weights. It is cheap, since it reads only samples of them.

    It hashes the model type, and the name, shape and 16 values of every parameter, spread over it and rounded to
    bfloat16. Embeddings and the output layer are left out, since they may be resized. So a bfloat16 checkpoint has the
    same fingerprint in every float type; a fine-tuned, merged or quantised one has another. It ignores PEFT adapters.
    """
    check_whole(model)
    left_out = {id(p) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
                for p in layer.parameters()}  # fmt: skip
    chosen = sorted((item for item in _own_parameters(model) if id(item[1]) not in left_out), key=lambda item: item[0])
    return _digest(model.config.model_type, chosen)


def embeddings(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a model's embedding ("input.weight") and output layer ("output.weight", and a bias if any).

    An output layer that is tied to the embedding is left out. PEFT's wrappers are replaced by what they wrap.
    """
    found: dict[str, nn.Parameter] = {}
    for where, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        while layer is not None and (inner := _wrapped(layer)) is not None:
            layer = inner
        if layer is not None:
            known = {id(parameter) for parameter in found.values()}
            found |= {f"{where}.{n}": p for n, p in layer.named_parameters(recurse=False) if id(p) not in known}
    return found


def embedding_fingerprint(model: Any, rows: int) -> str:
    """As `fingerprint`, for the embedding and the output layer.

    Args:
        rows: how many tokens there are; later rows are padding.
    """
    check_whole(model)
    return _digest(model.config.model_type, [(name, p[:rows]) for name, p in embeddings(model).items()])


def _digest(kind: str, chosen: Sequence[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(repr([kind, *((n, tuple(p.shape)) for n, p in chosen)]).encode())
    samples: dict[torch.device, list[Tensor]] = {}
    for _, parameter in chosen:  # one copy to the host for each device
        values = parameter.detach().reshape(-1)
        values = values[:: max(len(values) // SAMPLES, 1)][:SAMPLES].float()
        samples.setdefault(parameter.device, []).append(values)
    for values in samples.values():
        flat = torch.cat(values).cpu()
        flat = flat.masked_fill(flat.abs() < SMALLEST, 0.0).bfloat16()
        digest.update(flat.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters without PEFT's own, by the names that they have without PEFT's wrappers."""
    wrappers = [name for name, module in model.named_modules() if _wrapped(module) is not None]
    wrappers = {f"{name}." for name in wrappers}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        ends = [i for i in range(len(parts)) if ".".join(parts[:i]) + "." in wrappers]
        if all(parts[i] in WRAPPED for i in ends):
            yield ".".join(part for part in parts if part not in WRAPPED), parameter
