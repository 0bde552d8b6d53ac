"""The next-token module that a target carries itself (multi-token prediction: DeepSeek-V3, arXiv 2412.19437).

Entry i joins norm(embedding of token i + 1) and norm(hidden state of token i) by one matrix. A decoder layer of the
target's own class reads that, and after a norm the target's output layer makes the logits of token i + 2. The hidden
state is the one after the target's last norm. In a draft it is the module's own output, after the module's norm.
Transformers' `generate(use_mtp=True)` does the same. One module can draft any number of tokens this way, although it
was mostly trained for the first.

A target may have several modules. Then module k drafts token k alone, and reads the output of module k - 1 in place of
the target's hidden state; see `Modules`.

A module is transformers' `MtpLayer`. Its weights are in the target's own folder, where the target's class leaves
them unread: in `model.layers.N` with N from the number of the target's layers on (DeepSeek-V3, GLM-4.5), or in `mtp`
(Mellum, in the layout of Qwen3-Next). Transformers' `MtpModel` converts names and experts. The embedding and the
output layer are the target's; copies of them in the folder are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.decoding.cache_names import cache_name
from csdraft.decoding.traits import FULL, SLIDING
from csdraft.heads.folder import INDEX, WEIGHTS, file_at, read_tensors
from csdraft.heads.head import LENDABLE, Head, HeadOptions
from csdraft.heads.layers import check_whole, embeddings
from csdraft.heads.on_target import OnTarget, called, frozen, name_only, set_parameter
from csdraft.heads.self_draft import MTP, write_document

__all__ = ["OWN", "Mtp", "OwnModule"]

SOME = 4
"""Names of tensors that a message lists."""
TEXT, RESUMED = -1, -2
"""Marks of features from the target: the entry before is of the same forward, or was read earlier."""
NUMBERED = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Mtp(Head):
    """A target's module as a head.

    Args:
        config: of the module; its class is the target's, and it has one layer for each module.
        modules: `MtpLayer`s; this class has one.
        rotary: makes the rotary embedding, of the target's class.
        kind: the layer's kind of attention, if the rotary embedding depends on it.
        window: how many entries it sees, itself included; None: all. A draft must be less deep than that.
    """

    attention_layers = 1
    frozen_output = True

    def __init__(self, config: Any, modules: Any, rotary: nn.Module, kind: str | None, window: int | None):
        super().__init__(config, HeadOptions(steps=len(modules)))
        if window is not None:  # `near` applies it, not the cache
            self.config.layer_types = self.config.sliding_window = None
        self.mtp, self.rotary, self.kind, self.window = nn.ModuleList(modules), rotary, kind, window
        self._cache_name = cache_name(type(modules[0]).forward) or ""

    @classmethod
    def layers_of(cls, options: HeadOptions) -> int:
        return options.steps

    @property
    def deepest(self) -> int | None:
        return None if self.window is None else self.window - 1

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """The target's config says how experts run."""
        return True

    def unrolled(self, *_: Any) -> Iterator[Tensor]:
        raise ValueError("a target's own next-token module is not trained by csdraft; train a head: init={...}")

    def make_buffers(self) -> None:
        """Does nothing: the rotary embedding is given."""

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        mask = mask if self.window is None else near(mask, position_ids, cache, self.window)
        return self.run(0, embedded, features, position_ids, mask, cache)

    def run(
        self, number: int, embedded: Tensor, hidden: Tensor, position_ids: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) output of one module, from embeddings and hidden states of the same shape."""
        kind = {} if self.kind is None else {"layer_type": self.kind}
        rotary = self.rotary(embedded, position_ids=position_ids, **kind)
        places = {"position_ids": position_ids, self._cache_name: cache}
        return self.mtp[number](embedded, hidden, position_embeddings=rotary, attention_mask=mask, **places)


class Modules(Mtp):
    """Several modules as one head, which drafts as many tokens.

    Module k at entry i joins token i + 1 with the output of module k - 1 at entry i - 1, or for k = 0 with the
    target's hidden state of token i, and predicts token i + 2. So after a text module 0 drafts the first token; module
    1 reads that token beside the output of module 0, and drafts the second. All modules read all of the text, each
    with keys and values of its own. Module k has no entry before entry k, so nothing sees those.

    A feature has one hidden state for each module, and a mark. In one from the target these are the target's and those
    that the modules have made of the entry before, which may be of the same forward. In a head's own output they are
    the modules' own, and the mark is how many tokens have been drafted, from 1 on. In a draft, modules that have
    drafted already run with the others, on states that mean nothing, and nothing reads what they make.
    """

    @property
    def deepest(self) -> int:
        return len(self.mtp) if self.window is None else min(len(self.mtp), self.window - 1)

    @property
    def feature_width(self) -> int:
        return len(self.mtp) * self.config.hidden_size + 1

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        padded = super().fuse(states)
        padded[..., -1] = TEXT
        return padded

    def resumed(self, features: Tensor, before: Tensor) -> Tensor:
        width = self.config.hidden_size
        features = features.clone()
        features[0, width:-1], features[0, -1] = before[: -1 - width], RESUMED
        return features

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        width, mark, count = self.config.hidden_size, features[..., -1:], len(self.mtp)
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        drafted = nn.functional.pad(features[..., : -1 - width], (width, 0))  # module k reads what k - 1 has made
        states = torch.where(mark > 0, drafted, features[..., :-1]).split(width, -1)
        masks = [near(mask, position_ids, cache, self.window, first) for first in range(count)]
        outputs: list[Tensor] = []
        for number, hidden in enumerate(states):
            if number:
                before = torch.cat([hidden[:, :1], outputs[-1][:, :-1]], 1)  # of this forward
                hidden = torch.where(mark == TEXT, before, hidden)
            outputs.append(self.run(number, embedded, hidden, position_ids, masks[number], cache))
        return torch.cat([*outputs, mark.clamp(min=0) + 1], -1)

    def draft_logits(self, output: Tensor) -> Tensor:
        number = output[..., -1].long().clamp(1, len(self.mtp)) - 1  # (...)
        states = output[..., :-1].unflatten(-1, (len(self.mtp), -1))  # (..., modules, width)
        index = number[..., None, None].expand(*number.shape, 1, states.shape[-1])
        return self.lm_head(states.gather(-2, index)[..., 0, :])


def near(mask: Tensor | None, positions: Tensor, cache: Any, window: int | None, first: int = 0) -> Tensor:
    """(rows, 1, queries, slots) bool: what entries see within the window, from the first entry of a module on.

    Slot i holds entry i of the text. Slots of drafted entries may lie behind their positions, but never too far, since
    the window is longer than a draft.
    """
    own, keys = positions[..., None], positions[:, None]  # (rows, queries, 1), (rows, 1, slots)
    if cache is not None:
        slots = cache.get_mask_sizes(positions.shape[1], 0)[0] if mask is None else mask.shape[-1]
        keys = torch.arange(slots, device=positions.device)[None, None]
    mask = (keys <= own)[:, None] if mask is None else mask
    seen = mask & (keys >= first)[:, None]
    if window is not None:
        seen = seen & (keys > own - window)[:, None]
    return seen | (~seen.any(-1, keepdim=True) & mask)  # a padding query must see something


class OwnModule(OnTarget):
    """The module of any target that it is bound to; `bind` reads it from the target's folder."""

    what, use = "drafter", "is the next-token module of a target"

    def __init__(self) -> None:
        super().__init__(name_only(MTP), {})

    def check(self, target: Any) -> None:
        """Raises ValueError if a target has no such module, or one that csdraft cannot draft with."""
        config = target.config.get_text_config(decoder=True)
        count = getattr(config, "num_mtp_layers", None) or 0
        if not count:
            raise ValueError(
                f"{called(target)} has no next-token modules that transformers knows: its config has no "
                f"num_mtp_layers; draft with another drafter than {MTP!r}"
            )
        kinds = getattr(config, "mtp_layer_types", None) or [FULL] * count
        if len(kinds) != count or len({*kinds}) > 1 or kinds[0] not in (FULL, SLIDING):
            raise ValueError(
                f"{called(target)} has num_mtp_layers={count} and mtp_layer_types={list(kinds)}; csdraft drafts with "
                f"modules that are all of one kind, {FULL} or {SLIDING}"
            )

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Head:
        check_whole(target)
        theirs = embeddings(target)
        table = theirs["input.weight"]
        dtype = table.dtype if table.dtype.is_floating_point else torch.float32
        made = _read(target, dtype, table.device)
        # The target's own rotary embedding may lack the module's kind of layer.
        rotary = type(made.rotary_emb)(made.config).to(table.device)
        kind = (getattr(target.config.get_text_config(decoder=True), "mtp_layer_types", None) or (FULL,))[0]
        window = made.config.sliding_window if kind == SLIDING else None
        of_layer, several = kind if made.has_per_layer_rope else None, len(made.layers) > 1
        with torch.device("meta"):
            head = (Modules if several else Mtp)(made.config, list(made.layers), rotary, of_layer, window)
        head.d2t = torch.zeros(len(head.d2t), dtype=torch.long, device=table.device)
        head.lent = dict(LENDABLE)
        for name, source in head.lent.items():
            set_parameter(head, name, frozen(theirs.get(source, table)))  # an output layer may be the embedding
        head.stored_by = OwnModule
        head.config._name_or_path = MTP
        return head.requires_grad_(False).eval()

    def open(self, target: Any, dtype: torch.dtype) -> Any:
        raise ValueError(f"{MTP!r} is a part of the target, which csdraft does not train; train a head: init={{...}}")

    @classmethod
    def of(cls, head: Any, state_dict: Any = None) -> OwnModule:
        return OWN

    def save(self, folder: str | Path) -> None:
        """Writes a drafter.json alone: the weights are in the target's folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_document(folder, MTP, {})


OWN = OwnModule()
"""The only one. It keeps the modules of all targets that it is bound to."""


def _read(target: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' `MtpModel` of a target; ValueError for tensors that are missing, unknown or of another shape."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_layers import MtpModel
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.generic import ContextManagers

    text, path = target.config.get_text_config(decoder=True), target.config.name_or_path
    count = text.num_hidden_layers
    if not path:
        raise ValueError(f"{called(target)} does not say where it was loaded from: load it by from_pretrained")
    revision = getattr(target.config, "_commit_hash", None)
    # A module may lie in a file of its own, which the index names even where the rest is one file.
    files = () if file_at(path, INDEX, revision=revision) else WEIGHTS[:1]
    state = read_tensors(path, files, lambda name: _chosen(name, count), revision=revision)
    if not state:
        raise ValueError(
            f"{path!r} has none of the tensors of its next-token module (mtp.* or layers.{count}.*), which copies of "
            "a model often lack: get its original weights"
        )
    contexts: list[Any] = MtpModel.get_init_context(dtype, False, False, None)
    with ContextManagers(contexts):
        made: Any = MtpModel(target, text.num_mtp_layers)
    made.config._attn_implementation = "sdpa"  # which reads csdraft's masks
    how = LoadStateDictConfig(weight_mapping=made.get_weight_conversions(target), device_map={"": device}, dtype=dtype)
    found, _ = convert_and_load_state_dict_in_model(model=made, state_dict=state, load_config=how)
    made._adjust_missing_and_unexpected_keys(found)
    wrong = {
        "lacks": found.missing_keys,
        "has tensors that transformers does not know for such a module:": found.unexpected_keys,
        "has tensors of another shape than its config.json asks for:": {key for key, *_ in found.mismatched_keys},
        "has tensors that cannot be put together:": set(found.conversion_errors),
    }
    for says, names in wrong.items():
        if names:
            raise ValueError(f"{path!r} {says} {', '.join(sorted(names)[:SOME])} (next-token module)")
    return made


def _chosen(name: str, count: int) -> bool:
    """Whether a tensor of a target with so many layers is of its next-token module."""
    number = NUMBERED.search(name)
    return name.startswith(f"{MTP}.") or (number is not None and int(number[1]) >= count)
