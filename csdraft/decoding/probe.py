"""Asks a model whether drafts would change its text: ragged rows and a tree read from a cache, against plain reads.

Class and config do not tell everything: some families mask by slot inside their own attention, count positions
themselves, or share state between rows. Such a model gives other logits here, and is refused instead of writing
another text. The answer is remembered, by class and config, for as long as the process lives.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Request
from csdraft.decoding.runner import NoCache
from csdraft.decoding.sampling import Processing, Sampler
from csdraft.decoding.scores import Head
from csdraft.decoding.session import Session
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.decoding.traits import traits_of

__all__ = ["difference"]

KNOWN_EXACT = {
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
}
"""Classes of transformers that `make families` finds exact, and that are used most: they are not asked."""

LONGEST_SPAN = 64
"""A window or chunk up to which the probe's texts reach beyond it."""

TREE = Draft((11, 12, 13, 14), (ROOT, ROOT, 1, 2), (0,) * 4, (float("nan"),) * 4)
"""Two branches, of which the second goes on."""

_LOCK = threading.Lock()
_answers: dict[str, str | None] = {}
_models: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def difference(model: nn.Module) -> str | None:
    """Why drafts would change what `model` writes; None if they do not. A few short forwards, at a model's first use.

    A model in training mode is not asked: dropout makes its text another one each time anyway. Nor is an
    encoder-decoder: those that are not refused are known.
    """
    if type(model).__name__ in KNOWN_EXACT and type(model).__module__.startswith("transformers."):
        return None
    if model.training or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return None
    with _LOCK:
        if model in _models:
            return _models[model]
    key = f"{type(model).__module__}.{type(model).__qualname__} {_described(model)}"
    if key not in _answers:
        answer = _compare(model)
        with _LOCK:
            _answers[key] = answer
    with _LOCK:
        _models[model] = _answers[key]
    return _answers[key]


def _described(model: nn.Module) -> str:
    """The model's config, attention and dtype, without the names of the place it came from."""
    config: Any = model.config
    options = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    attention = config.get_text_config(decoder=True)._attn_implementation
    return f"{attention} {model.dtype} {json.dumps(options, sort_keys=True, default=str)}"


@torch.no_grad()
def _compare(model: nn.Module) -> str | None:
    name = type(model).__name__
    try:
        found, wanted = _logits(model)
    except NoCache as error:
        return str(error)
    except Exception as error:  # whatever a model does with what it cannot read
        return (
            f"{name} cannot read ragged rows and trees from a cache ({type(error).__name__}: {error}), as drafted "
            "decoding does; call generate without assistant="
        )
    scale = wanted.max() - wanted.min()
    off = float((found - wanted).abs().max() / scale)
    if off <= torch.finfo(model.dtype).eps ** 0.5:  # type: ignore[arg-type]
        return None
    return (
        f"{name} computes other logits (off by {off:.1%} of their range) when rows of different lengths and the "
        "branches of a draft are read together: its attention goes by slots of the cache rather than by positions; "
        "call generate without assistant="
    )


def _logits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(compared, vocab) float32: as drafted decoding reads them, and as the model alone does."""
    span = traits_of(model).longest_span
    tokens = _tokens(model, (span if span <= LONGEST_SPAN else 0) + 9)
    texts = [Text(torch.tensor(tokens)), Text(torch.tensor(tokens[3:]))]
    vocab = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
    head = Head(Processing([], 2), Stopping([]), Sampler(True, [0, 0], vocab))
    session = Session(model, head, 2, len(tokens) + 16, None, vocab, texts)
    session.score([Request(row, text, Draft()) for row, text in enumerate(texts)], choose=False)
    draft = Draft(tuple(tokens[2 * node] for node in range(4)), TREE.parents, TREE.levels, TREE.confidence)
    texts[1].append(tokens[:2])
    scores = session.score([Request(row, text, draft) for row, text in enumerate(texts)], choose=False)
    texts[0].append([draft.tokens[1]])  # the second branch is accepted: its slots move
    later = session.score([Request(0, texts[0], Draft())], choose=False)
    found = [view.raw(node) for view in scores for node in (ROOT, 0, 3)] + [later[0].raw(ROOT)]
    paths = [[*text, *path] for text in (tokens, [*tokens[3:], *tokens[:2]]) for path in _paths(draft)]
    wanted = [_alone(model, path) for path in [*paths, [*tokens, draft.tokens[1]]]]
    return torch.stack(found).float().cpu(), torch.stack(wanted).float().cpu()


def _paths(draft: Draft) -> list[list[int]]:
    return [[draft.tokens[node] for node in draft.path(end)] for end in (ROOT, 0, 3)]


def _alone(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """(vocab,) logits after `tokens`, read in one forward without a cache."""
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)  # type: ignore[operator,union-attr]
    return model(input_ids=ids, use_cache=False, return_dict=True).logits[0, -1]


def _tokens(model: nn.Module, count: int) -> list[int]:
    """Ordinary token ids, all different where the vocabulary allows: none that stands for an image, or an end."""
    config: Any = model.config
    special = set()
    for part in (config, config.get_text_config(decoder=True)):
        for key, value in vars(part).items():
            if key.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list | tuple) else [value])
    vocab = config.get_text_config(decoder=True).vocab_size
    ordinary = [token for token in range(3, vocab) if token not in special] or list(range(vocab))
    step = max(len(ordinary) // (count + 1), 1)
    return [ordinary[(i * step) % len(ordinary)] for i in range(1, count + 1)]
