"""Reads the folder of a drafting head: its config, the names of its tensors, and the tensors themselves.

`path` is a folder or Hub id here, and `hub` are options of the Hub: revision, token, ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from csdraft.stored import fit, is_hub_id, read_object, shown

__all__ = [
    "BROKEN_CONFIG", "INDEX", "INIT", "QWEN", "SWITCHING", "WEIGHTS", "Names", "check_drafted", "check_place",
    "check_rotary", "check_tensors", "config_at", "file_at", "read_layer", "read_tensors",
    "tensor_names", "write_tensors",
]  # fmt: skip

SWITCHING = ("dynamic", "longrope")
"""Kinds of rotary embedding that change with the length of a text."""
NOT_OF_LAYER = {"dtype", "torch_dtype", "quantization_config", "layer_types"}
"""Keys that say how weights are stored, since a head takes the target's dtype, or what kind each layer is."""
BROKEN_CONFIG = (
    StrictDataclassError, ValueError, TypeError, ZeroDivisionError, AttributeError, LookupError, RuntimeError,
)  # fmt: skip
"""What transformers and torch raise for impossible sizes and options."""
INIT = "csdraft_init"
"""Key of config.json: how csdraft trained a head, in the words of a recipe's `init`. Engines do not read it."""
WEIGHTS: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
QWEN = {"head_dim": 128}
"""Where the defaults of a Qwen 3 config differ from those of a Llama one."""
NOT_READ = "rotary_emb.inv_freq"
"""The end of the name of a tensor that old folders hold: it follows from the config, and no engine reads it."""
BROKEN_FILE = (SafetensorError, EOFError, OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError)
"""What reading a file of tensors raises if it holds something else, beside `UnpicklingError`."""
INDEX = "model.safetensors.index.json"
"""Says which of several files holds which weights."""
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
Names = Callable[[], Collection[str]]
"""Reads the names of a folder's tensors."""


def file_at(path: str, name: str, **hub: Any) -> str | None:
    """Where a file of a folder or Hub id lies on this machine; None if there is no such file."""
    from transformers.utils import cached_file

    return cached_file(path, name, **hub, **QUIET)


def check_place(path: str) -> None:
    """Raises OSError if this is no folder and cannot be a Hub id, and ValueError if it is a saved cascade."""
    if not os.path.exists(path) and not is_hub_id(path):
        raise OSError(f"there is no folder {path!r}")
    if os.path.isfile(os.path.join(path, "cascade.json")) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path!r} is a saved cascade, not a model: name it as assistant=, or as --cascade")


def config_at(path: str, **hub: Any) -> dict[str, Any] | None:
    """The config.json of a folder or Hub id; None if it has none, see `check_place` for errors."""
    check_place(path)
    file = file_at(path, "config.json", **hub)
    return None if file is None else read_object(file)


def weights_at(path: str, names: Sequence[str] = WEIGHTS, **hub: Any) -> str | None:
    """The first of these files that a folder or Hub id has; None if it has none."""
    return next((file for name in names if (file := file_at(path, name, **hub)) is not None), None)


def tensor_names(path: str, **hub: Any) -> frozenset[str]:
    """The names of the tensors of a folder or Hub id; none if they cannot be read."""
    file = file_at(path, INDEX, **hub) or weights_at(path, **hub)
    if file is None:
        return frozenset()
    try:
        if file.endswith(INDEX):
            return frozenset(read_object(file).get("weight_map") or ())
        if file.endswith(WEIGHTS[0]):
            with safe_open(file, "pt") as weights:
                return frozenset(weights.keys())
        return frozenset(map(str, torch.load(file, map_location="cpu", weights_only=True, mmap=True)))
    except (UnpicklingError, *BROKEN_FILE):
        return frozenset()  # loading the file says what is wrong with it


def read_tensors(
    path: str, names: Sequence[str] = WEIGHTS, chosen: Callable[[str], bool] = lambda name: True, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of a folder or Hub id.

    Args:
        names: possible names of the file, the preferred one first; several safetensors files with an index will do.
        chosen: whether a tensor of this name is wanted; no others are read from safetensors files.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if (file := weights_at(path, names, **hub)) is not None:
        return _read(file, chosen)
    if (index := file_at(path, INDEX, **hub)) is None:
        raise ValueError(f"{path!r} has none of {', '.join(names)}; get its weights too")
    parts = fit(read_object(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
    state: dict[str, Tensor] = {}
    for name in sorted({part for name, part in parts.items() if chosen(name)}):
        if (file := file_at(path, name, **hub)) is None:
            raise ValueError(f"{path!r} has no {name}; get its safetensors files too")
        state |= _read(file, chosen)
    return state


def _read(file: str, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """The chosen tensors of one file."""
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt") as weights:
                state = {name: weights.get_tensor(name) for name in weights.keys() if chosen(name)}  # noqa: SIM118
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # its message advises to trust the file
        raise ValueError(f"{file} holds other things than tensors, or is cut short; get it as safetensors") from error
    except BROKEN_FILE as error:
        raise ValueError(f"{file} cannot be read ({error}); it may be cut short: get it again") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{file} holds other things than tensors by name; get it as safetensors")
    return {name: tensor for name, tensor in state.items() if chosen(name) and not name.endswith(NOT_READ)}


def write_tensors(file: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, or a pickled one if it ends with .pt; tensors may share memory."""
    from safetensors.torch import save_file

    tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    if str(file).endswith(".pt"):
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})


def check_tensors(
    path: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor], optional: Collection[str] = ()
) -> None:
    """Raises ValueError unless a folder's tensors have the names and shapes of a drafter's own.

    Args:
        own: the drafter's.
        optional: names that may be missing.
    """
    if missing := sorted(own.keys() - state.keys() - set(optional)):
        raise ValueError(f"{path!r} lacks {', '.join(missing[:4])}; with random numbers instead it could not draft")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"{path!r} has tensors that csdraft does not know for such a head: {', '.join(unknown[:4])}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{path!r}: {name} has shape {tuple(tensor.shape)}; for this config and target it must have "
                f"{tuple(own[name].shape)}"
            )
        if tensor.is_floating_point() != own[name].is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"{path!r}: {name} is {tensor.dtype}, not {own[name].dtype}; get unquantised weights")


def check_drafted(state: Mapping[str, Tensor], vocab: int, path: str) -> None:
    """Raises ValueError if `d2t` leads outside the target's vocabulary, twice to one token, or to all in any order."""
    if "d2t" not in state:
        return
    ids = state["d2t"].long() + torch.arange(len(state["d2t"]), device=state["d2t"].device)  # (draft vocab,)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) < len(ids):
        raise ValueError(
            f"{path!r}: d2t must hold offsets (target token - draft token) that lead to different tokens below "
            f"{vocab}; they lead to {int(ids.min())} to {int(ids.max())}, {len(ids.unique())} of {len(ids)} different"
        )
    if len(ids) == vocab and state["d2t"].any():
        raise ValueError(f"{path!r}: d2t reorders all {vocab} tokens: sort the output layer's rows, leave d2t out")


def read_layer(document: Mapping[str, Any], path: str, families: Sequence[str] = ("llama",)) -> Any:
    """The `LlamaConfig` of a head's layer, from a config.json; it ignores keys that such a config does not know.

    Args:
        path: the folder or Hub id.
        families: those that the head may have. Layers of Qwen 3 are those of Llama with normed queries and keys, and
            have another default.

    Raises:
        ValueError: layers of another family, or that compute something else.
    """
    at, family = f"{path}/config.json", document.get("model_type", "llama")
    if family not in families:
        raise ValueError(f"{at}: model_type={shown(family)}; csdraft reads layers of {' and '.join(families)} here")
    kinds = fit(document.get("layer_types") or [], list[Any], f"{at}: layer_types")
    if any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{at}: layer_types={shown(kinds)}; csdraft reads full_attention alone")
    if family == "qwen3":
        document = QWEN | {**document}
    if quantised := document.get("quantization_config"):
        raise ValueError(f"{at}: quantization_config={shown(quantised)}; csdraft reads heads that are not quantised")
    known = {key: value for key, value in document.items() if key not in NOT_OF_LAYER}
    try:
        config: Any = LlamaConfig.from_dict({**known, "num_hidden_layers": 1, "model_type": "llama"})
        LlamaRotaryEmbedding(config)  # it fails if a key is missing or wrong
    except BROKEN_CONFIG as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{at} is not a config of a Llama layer: {said}") from error
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{at}: hidden_act={shown(config.hidden_act)} is unknown; get the head's own config.json")
    check_rotary(config.rope_parameters, at)
    if document.get("logit_scale", 1.0) != 1.0:
        raise ValueError(f"{at}: logit_scale={document['logit_scale']!r}; csdraft reads heads without one")
    config.name_or_path = path
    return config


def check_rotary(parameters: Mapping[str, Any], at: str) -> None:
    """Raises ValueError for rotary embeddings that a head's layer cannot compute."""
    if (kind := parameters.get("rope_type", "default")) in SWITCHING:
        raise ValueError(f"{at}: rope_type={kind!r} changes with the length of a text, which csdraft's heads cannot")
    if (part := parameters.get("partial_rotary_factor") or 1.0) != 1.0:  # transformers' Llama ignores it
        raise ValueError(f"{at}: partial_rotary_factor={shown(part)}; csdraft's heads rotate all of a key")
