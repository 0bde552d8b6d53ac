"""A tiny target and an EAGLE-3 head that has learned to draft for it: what the tests of heads decode with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from csdraft.heads.formats.eagle3 import Eagle3Head
from csdraft.heads.kinds.eagle3 import Eagle3, Eagle3Options
from csdraft.heads.layers import fingerprint
from csdraft.heads.tied import Lender
from tests.tiny import VOCAB, fresh, ragged_batch

LAYERS = (0, 1, 3)
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2}
PROMPTS = (20, 3, 11)


@cache
def target() -> Any:
    return fresh("llama", num_hidden_layers=3)


def new_head(seed: int = 0, layers: tuple[int, ...] = LAYERS, draft_vocab: int = 60, **flags: bool) -> Eagle3:
    """A random head for `target()`, which drafts some of its tokens."""
    embedding = target().get_input_embeddings().weight  # a first call seeds, too
    torch.manual_seed(seed)
    made = Eagle3(LlamaConfig(**SHAPE), Eagle3Options(draft_vocab, layers=layers, target_width=32, **flags)).eval()
    with torch.no_grad():
        made.embed_tokens.weight.copy_(embedding)
        for name, parameter in made.named_parameters():
            if "norm" in name:  # a bug must not hide behind a one
                parameter.add_(0.2 * torch.randn_like(parameter))
    made.embed_tokens.weight.requires_grad_(False)
    made.d2t.copy_(torch.randperm(VOCAB)[:draft_vocab].sort().values - torch.arange(draft_vocab))
    made.lent, made.stored_by = {"embed_tokens.weight": "input.weight"}, Eagle3Head
    made.base = Lender("tiny", None, fingerprint(target()), VOCAB)
    return made


@cache
def texts() -> Tensor:
    """(rows, length) what the target writes after the prompts, greedily and not, and what they begin with."""
    inputs = ragged_batch(PROMPTS)
    torch.manual_seed(0)
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        for how in [{"do_sample": False}, *[{"do_sample": True, "top_k": 3}] * 4]:
            made = target().generate(ids[mask.bool()][None], max_new_tokens=40, eos_token_id=None, **how)
            rows.append(made[0, :40])
    return torch.stack(rows)


@cache
def learned(steps: int = 60, **flags: bool) -> Eagle3:
    """A head that drafts what the target writes here, often; tests must not change it."""
    made, ids = new_head(**flags), texts()[::5]  # the greedy ones
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        states = target()(ids, output_hidden_states=True).hidden_states
    as_drafted = torch.full((VOCAB,), -100)
    as_drafted[made.drafted] = torch.arange(len(made.d2t))
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 0.015)
    for _ in range(steps):
        loss = torch.zeros(())
        for step, output in enumerate(made.unrolled(ids, positions, made.fuse(dict(enumerate(states))), 3)):
            labels = as_drafted[ids[:, 2 + step :]]
            logits = made.draft_logits(output[:, : labels.shape[1]])
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.requires_grad_(False)


@cache
@torch.no_grad()
def states_along(text: tuple[int, ...]) -> tuple[Tensor, ...]:
    """(1, length, width) each, the target's hidden states."""
    return target()(torch.tensor([text]), output_hidden_states=True).hidden_states


@torch.no_grad()
def naive(head: Any, text: list[int], path: list[int], read: dict[Any, Any] | None = None) -> tuple[Tensor, Tensor]:
    """(vocab,) logits after a text and some drafted tokens, and the head's output: without any cache.

    Args:
        read: what this has returned for other paths after this text, so that no path is read again.
    """
    states = states_along(tuple(text[:-1]))
    features = head.fuse({tap: states[tap][0] for tap in head.taps})  # (length - 1, feature width)
    entries, read = [*text[1:], *path], {} if read is None else read
    for steps in range(len(path) + 1):
        place, count = tuple(path[:steps]), len(text) - 1 + steps
        if place not in read:
            output = head(torch.tensor([entries[:count]]), features[None, :count], torch.arange(count)[None])
            read[place] = output.logits[0, -1], output.hidden_states[0][0, -1]
        if steps < len(path):
            features = torch.cat([features[:count], read[place][1][None]])
    return read[tuple(path)]
