"""Serving engines that drafters are exported to: their names, how they are started, and `ServedHead`, which says what
they would refuse.

The facts are read from vLLM 0.33.0, SGLang 0.5.23 and speculators 0.9.0. What an engine needs of one kind of head is
in the file of its format, in `csdraft/heads/formats`; `ServedHead.faults` compares it with a folder.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csdraft.heads.formats._speculators import (
    COPIES,
    LAYER,
    MODEL_TYPE,
    layout_places,
    missing_places,
    t2d_fault,
    value_at,
)
from csdraft.heads.on_target import OnTarget
from csdraft.stored import shown

__all__ = [
    "EMBEDDING",
    "ENGINES",
    "SIZED_ROTARY",
    "WHOLE",
    "Found",
    "ServedHead",
    "ServedTarget",
    "context_fault",
    "serve_command",
    "with_embedding",
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


Found = tuple[Mapping[str, Tensor], Collection[str], Collection[str]]
"""A folder's tensors by the names of `shapes`, as an engine finds them; names that may be missing; others."""


class ServedHead(OnTarget):
    """What serving engines make of a stored head; `StoredHead` is the rest of it.

    Attributes:
        complete: the class of the complete head.
        methods: what engines call drafting with such a head, by keys of `ENGINES`.
        asked_of_vllm: keys that vLLM's speculative config needs beside the method, the folder, and the depth.
        embedding_for: engines that need the target's embedding in the folder; the others take the target's own.
    """

    methods: Mapping[str, str] = {}
    asked_of_vllm: Mapping[str, Any] = {}
    embedding_for: Collection[str] = ()
    complete: Any
    options: Any

    def network(self, target: Any = None) -> Any:
        """A complete head without the stored weights.

        Args:
            target: the model that it is for; without it, only the shapes are right.
        """
        return self.complete(self.config, self.options)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the complete head that a folder may hold, by their names there."""
        with torch.device("meta"):
            whole = self.network()
        full = len(whole.d2t) == self.config.vocab_size
        return {name: tuple(t.shape) for name, t in whole.state_dict().items() if name != "d2t" or not full}

    @property
    def target_width(self) -> int:
        """Width of the target's hidden states."""
        return getattr(self.options, "target_width", self.config.hidden_size)

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The target's hidden states that its options name; k is the one after k blocks."""
        return ()

    @property
    def deepest(self) -> int | None:
        """How many tokens it can draft per round in an engine; None: any number."""
        return None

    def refusals(self, engine: str, names: Collection[str]) -> Iterator[str]:
        """What an engine of `methods` cannot do with such a head; `names` are those of a folder's tensors."""
        return iter(())

    def places(self, engine: str, said: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        """Places of a folder's config.json, such as `a.b[0]`, and the values with which an engine loads this head.

        Args:
            engine: a key of `methods`.
            said: config.json with the keys of `transformer_layer_config` among the others.
        """
        return {}

    def as_read(self, engine: str, tensors: Mapping[str, Tensor]) -> Found:
        """What an engine finds in a folder with these tensors."""
        ignored = COPIES if engine == "speculators" else {"t2d"}
        return tensors, set() if engine in self.embedding_for else {EMBEDDING}, ignored

    def faults(
        self, engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
    ) -> list[str]:
        """Why an engine would not load a folder with this head, or load it as another head.

        Args:
            engine: a key of `ENGINES`.
            config, tensors: of the folder.
            target: the model that it is to draft for; without it, sizes are not compared.
        """
        nested = self._nested(config)
        if engine not in self.methods:
            return [f"it does not load {self.what}s of this layout; decode with csdraft"]
        if nested and engine == "sglang":
            return [f"{LAYER}: it reads no folders of speculators; export with --to sglang"]
        if not nested and engine == "speculators":
            return [f"{LAYER} is missing: the folder has another layout; export with --to speculators"]
        found = [*self.refusals(engine, tensors.keys()), *self._differences(engine, config)]
        found += self._tensor_faults(*self.as_read(engine, tensors))
        if target is not None:
            found += self._target_faults(target)
        if engine == "sglang":
            found += context_fault(self.config.max_position_embeddings, target)
        if engine == "speculators":
            found += t2d_fault(tensors, self.config.vocab_size)
        if engine == "speculators" and not found:  # vLLM reads the same folder
            found = [f"vLLM: {fault}" for fault in self.faults("vllm", config, tensors, target)]
        return found

    def _nested(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json has the layout of speculators; other formats do not read its keys."""
        return "speculators" in self.methods and (MODEL_TYPE in config or isinstance(config.get(LAYER), Mapping))

    def _differences(self, engine: str, config: Mapping[str, Any]) -> Iterator[str]:
        """Of what a config.json says, and the engine reads, all that is not so of this head."""
        said, nested = {key: value for key, value in config.items() if value is not None}, self._nested(config)
        said = {**(said.get(LAYER) or {}), **said} if nested else said
        right = dict(self.places(engine, said))
        if nested:
            right |= layout_places(kind := self.methods["speculators"], engine)
            yield from (f"{place} is missing" for place in missing_places(kind, engine, config))
        for place, values in right.items():
            if (value := value_at(said, place)) not in values:
                yield f"{place}={shown(value)} must be {values[0]!r} for this head: `csdraft export` writes that"
        if (layers := list(self.read_layers)) != sorted(set(layers)):
            yield f"the hidden states after blocks {layers} must rise: it takes them in the target's order"
        if engine == "speculators" and self.target_width != (width := self.config.hidden_size):
            yield f"target_hidden_size={self.target_width} must be hidden_size={width} for it; use --to vllm"

    def _tensor_faults(
        self, tensors: Mapping[str, Tensor], optional: Collection[str], ignored: Collection[str]
    ) -> Iterator[str]:
        """What is wrong with tensors that `as_read` has found."""
        wanted = self.shapes()
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

    def _target_faults(self, target: ServedTarget) -> Iterator[str]:
        """Why it cannot draft for this target."""
        own = {"vocab_size": self.config.vocab_size, "target_hidden_size": self.target_width}
        theirs = {"vocab_size": target.vocab_size, "target_hidden_size": target.hidden_size}
        for key, size in own.items():
            if size != theirs[key]:
                yield f"{key}={size}, the target {target.name} has {theirs[key]}; name the head's own target"
        if max(self.read_layers, default=-1) >= target.layers:
            yield (
                f"it reads the hidden states after blocks {list(self.read_layers)}: the target has {target.layers} "
                "blocks, and after the last one csdraft reads the normed state, engines another or none; train a head "
                "of lower layers"
            )


def context_fault(positions: Any, target: ServedTarget | None) -> Iterator[str]:
    """SGLang refuses a drafter whose longest text is shorter than the target's."""
    if target is not None and target.positions is not None and (positions or 0) < target.positions:
        yield (
            f"max_position_embeddings={positions} is less than the target's {target.positions}; start it with "
            f"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 or --context-length {positions}"
        )
