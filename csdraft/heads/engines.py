"""Serving engines that drafters are exported to: their names, how they are started, and what they all need.

The facts are read from vLLM 0.33.0, SGLang 0.5.23 and speculators 0.9.0. What an engine needs of one kind of head is
in the file of its format, in `csdraft/heads/formats`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "EMBEDDING", "ENGINES", "SIZED_ROTARY", "WHOLE", "ServedTarget", "context_fault", "serve_command", "target_faults",
    "tensor_faults", "with_embedding",
]  # fmt: skip

ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "speculators": "speculators"}
"""Their names on the command line, and in messages. vLLM also reads the folders of speculators."""
WHOLE = {"vllm": "draft_model", "sglang": "STANDALONE"}
"""What engines call drafting with a whole model."""
SIZED_ROTARY = ("default", "linear", "llama3")
"""Kinds of rotary embedding where `max_position_embeddings` only limits the length of a text."""

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class ServedTarget:
    """The model that an exported drafter drafts for.

    Attributes:
        name: its path or Hub id.
        architectures, vocab_size, hidden_size, layers, positions: from its config.json; `positions` is the longest
            text, or None if the config does not say.
        embedding: loads its embedding, (vocab, width).
    """

    name: str
    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    layers: int
    positions: int | None
    embedding: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, config: Any, embedding: Callable[[], Tensor]) -> ServedTarget:
        """The target with this transformers config."""
        text = config.get_text_config(decoder=True)
        return cls(
            name,
            tuple(config.architectures or ()),
            text.vocab_size,
            text.hidden_size,
            text.num_hidden_layers,
            getattr(text, "max_position_embeddings", None),
            lambda: embedding()[: text.vocab_size],  # some have rows that are no tokens
        )


def serve_command(
    engine: str, method: str, target: str, drafter: str, tokens: int, more: Mapping[str, Any] | None = None
) -> str:
    """The shell command that serves a target with a drafter.

    Args:
        engine: a key of `ENGINES`.
        method: the engine's name for this kind of drafting.
        target, drafter: paths or Hub ids.
        tokens: how many are drafted per round.
        more: keys of vLLM's speculative config beside these.
    """
    if engine == "speculators":
        return f"vllm serve {shlex.quote(drafter)}"
    if engine == "vllm":
        options = json.dumps({"method": method, "model": drafter, "num_speculative_tokens": tokens, **(more or {})})
        return f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(options)}"
    return (
        f"python -m sglang.launch_server --model-path {shlex.quote(target)} --speculative-algorithm {method} "
        f"--speculative-draft-model-path {shlex.quote(drafter)} --speculative-num-steps {tokens} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
    )


def architecture(config: Mapping[str, Any]) -> str:
    """The first architecture that a config.json names; '' if it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def with_embedding(tensors: dict[str, Tensor], target: ServedTarget, needed: bool) -> dict[str, Tensor]:
    """Tensors with the target's embedding if that is needed; otherwise without an embedding that equals it."""
    own = tensors.pop(EMBEDDING, None)
    if own is None and not needed:
        return tensors
    theirs = target.embedding()
    own = theirs.to(tensors["fc.weight"].dtype, copy=True) if own is None else own
    if needed or own.shape != theirs.shape or not torch.equal(own, theirs.to(own)):
        tensors[EMBEDDING] = own
    return tensors


def tensor_faults(
    tensors: Mapping[str, Tensor],
    optional: Collection[str],
    ignored: Collection[str],
    wanted: Mapping[str, tuple[int, ...]],
) -> Iterator[str]:
    """What is wrong with a folder's tensors.

    Args:
        tensors, optional, ignored: see `StoredHead.as_read`.
        wanted: the shapes of the tensors that the engine reads.
    """
    for name, shape in wanted.items():
        if name not in tensors:
            if name not in optional:
                yield f"{name} is missing"
        elif tuple(tensors[name].shape) != shape:
            yield f"{name} has shape {tuple(tensors[name].shape)}, its config.json asks for {shape}"
        elif name == "d2t" and tensors[name].dtype != torch.int64:
            yield f"d2t is {tensors[name].dtype}, it reads torch.int64"
        elif name != "d2t" and not tensors[name].is_floating_point():
            yield f"{name} is {tensors[name].dtype}, it reads float types"
    if unknown := sorted(tensors.keys() - wanted.keys() - set(ignored)):
        yield f"{', '.join(unknown[:4])} is not a tensor that it reads for this config.json"


def target_faults(target: ServedTarget, width: int, vocab: int, layers: Collection[int]) -> Iterator[str]:
    """Why a head cannot draft for this target.

    Args:
        width: of the hidden states that the head reads.
        vocab: how many tokens the head's own target has.
        layers: the hidden states that the head reads, k for the one after k blocks.
    """
    for key, size, theirs in (
        ("vocab_size", vocab, target.vocab_size),
        ("target_hidden_size", width, target.hidden_size),
    ):
        if size != theirs:
            yield f"{key}={size}, the target {target.name} has {theirs}; name the head's own target"
    if layers and max(layers) >= target.layers:
        yield (
            f"it reads the hidden states after blocks {list(layers)}: the target has {target.layers} blocks, and "
            "after the last one csdraft reads the normed state, engines another or none; train a head of lower layers"
        )


def context_fault(positions: Any, target: ServedTarget | None) -> Iterator[str]:
    """SGLang refuses a drafter whose longest text is shorter than the target's."""
    if target is not None and target.positions is not None and (positions or 0) < target.positions:
        yield (
            f"max_position_embeddings={positions} is less than the target's {target.positions}; start it with "
            f"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 or --context-length {positions}"
        )
