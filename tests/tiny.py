"""Tiny random models of every family, and drafters whose mistakes are scripted: what the tests decode with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from torch import Tensor, nn

from csdraft.decoding.draft import Draft, DraftProbs
from csdraft.decoding.interfaces import Budget, Context, Drafter

VOCAB, PAD, EOS, BOS = 97, 0, 1, 2
WINDOW = 16
"""Shorter than any text of these tests."""

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "tie_word_embeddings": False,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", COMMON),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", COMMON),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", COMMON | {"head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", COMMON | {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", COMMON | {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        COMMON | {"head_dim": 8, "sliding_window": WINDOW, "num_hidden_layers": 3, "layer_types": SLIDING},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        COMMON | {"head_dim": 8, "sliding_window": WINDOW, "num_hidden_layers": 3, "layer_types": SLIDING},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", COMMON),
    "opt": ("OPTConfig", "OPTForCausalLM", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", "FalconForCausalLM", COMMON | {"alibi": False}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "flan": ("T5Config", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
}
REFUSED: dict[str, tuple[str, str, dict]] = {
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", COMMON | {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "alibi": ("FalconConfig", "FalconForCausalLM", COMMON | {"alibi": True}),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1}
             | {"decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
             | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}),
}  # fmt: skip
CAUSAL = [name for name in FAMILIES if name not in ("t5", "flan")]
ENCODER_DECODERS = ["t5", "flan"]
SHARP = {"gemma2": 2.0, "t5": 0.3, "flan": 0.3}
"""Factor on the output layer, so that greedy texts are neither one token repeated nor full of near ties."""


def attentions(family: str) -> list[str]:
    """The attention implementations that a family has."""
    model_class = getattr(transformers, FAMILIES[family][1])
    return ["sdpa", "eager"] if model_class._supports_sdpa else ["eager"]


def fresh(family: str, seed: int = 0, attention: str | None = None, **changes: object) -> nn.Module:
    """A new random model; `changes` go to its config."""
    config_name, model_name, options = (FAMILIES | REFUSED)[family]
    config = getattr(transformers, config_name)(**(options | changes))
    model_class = getattr(transformers, model_name)
    torch.manual_seed(seed)
    kwargs = {} if attention is None else {"attn_implementation": attention}
    model = model_class._from_config(config, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if config.is_encoder_decoder and "block" in name and parameter.dim() > 1:
                parameter.normal_(std=1.0 if "relative" in name else 0.35)
            else:  # biases and norms too: a bug must not hide behind a zero
                parameter.add_(0.05 * torch.randn_like(parameter))
        head = model.get_output_embeddings()
        if head is not None:
            head.weight.mul_(SHARP.get(family, 1.0))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


@cache
def tiny(family: str, attention: str | None = None) -> nn.Module:
    """The family's model, made once; tests must not change it."""
    return fresh(family, attention=attention)


@cache
def narrow(family: str) -> nn.Module:
    """A model whose window is shorter than the depth of a draft."""
    return fresh(family, sliding_window=3)


def noisy(model: nn.Module, scale: float = 0.1, seed: int = 1) -> nn.Module:
    """A copy with disturbed weights: a drafter that is often right and often wrong."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.dim() > 1:
                parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return copied


@cache
def drafter_of(family: str, attention: str | None = None, scale: float = 0.1) -> nn.Module:
    """`noisy(tiny(...))`, made once."""
    return noisy(tiny(family, attention), scale)


def prompt(length: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """One row."""
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ragged_batch(lengths: Sequence[int] = (20, 3, 11, 17), seed: int = 0, side: str = "left") -> dict[str, Tensor]:
    """Rows of these lengths, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        at = slice(ids.shape[1] - length, None) if side == "left" else slice(0, length)
        ids[row, at] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(family: str, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """One row, or a ragged batch, padded on the side that the family's tokenizers pad."""
    if rows == 1:
        return prompt(seed=seed)
    return ragged_batch((20, 3, 11, 17)[:rows], seed, "right" if family in ENCODER_DECODERS else "left")


def continuations(output: Tensor, inputs: dict[str, Tensor], family: str = "llama") -> list[list[int]]:
    """Per row of `generate`'s output, the text as sessions count it: no padding before it, all new tokens."""
    if family in ENCODER_DECODERS:
        return [row.tolist() for row in output]
    mask = inputs["attention_mask"]
    return [row[mask.shape[1] - int(mask[i].sum()) :].tolist() for i, row in enumerate(output)]


@dataclass(frozen=True, eq=False)
class Scripted(Drafter):
    """Proposes what the text will be, with mistakes.

    Args:
        texts: (rows,) the whole text of each row, prompt included; beyond its end random tokens are proposed.
        wrong: chance that a node's token is wrong.
        branches: children a node has on the way that is right; 1 makes chains.
        depth: tokens a round.
        seed: of the mistakes, which differ from round to round.
        before: called with each call of `propose` first.
        vocabulary: what mistakes are made of.
    """

    texts: Sequence[Sequence[int]]
    wrong: float = 0.3
    branches: int = 1
    depth: int = 5  # type: ignore[assignment]
    seed: int = 0
    before: Callable[[Sequence[Context]], None] | None = None
    vocabulary: Sequence[int] = range(3, VOCAB)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        if self.before is not None:
            self.before(contexts)
        return [self._one(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def _one(self, context: Context, budget: Budget) -> Draft:
        start = len(context.text) + len(context.path)
        rng = random.Random(hash((self.seed, context.row, start)))
        tokens, parents = list(context.draft.tokens), list(context.draft.parents)
        right = self.texts[context.row]
        frontier = [(context.tip, True)]  # (node, whether its path is right)
        for position in range(start, start + min(budget.depth, budget.room)):
            coming = right[position] if position < len(right) else rng.choice(self.vocabulary)
            grown = []
            for node, on_the_way in frontier:
                carried = rng.sample(self.vocabulary, self.branches if on_the_way else 1)
                if on_the_way and rng.random() >= self.wrong:
                    carried[rng.randrange(len(carried))] = coming
                for token in dict.fromkeys(carried):
                    tokens.append(token)
                    parents.append(node)
                    if (on_the_way and token == coming) or rng.random() < 0.6:
                        grown.append((len(tokens) - 1, on_the_way and token == coming))
            frontier = grown
        old, new = context.draft, len(tokens) - len(context.draft)
        distribution = old.probs and DraftProbs(old.probs.kind, old.probs.rows + (None,) * new)
        levels = old.levels + (context.call.level(self),) * new
        return Draft(tuple(tokens), tuple(parents), levels, old.confidence + (float("nan"),) * new, distribution)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One printable character a token, for the models above."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "</s>", "<s>", *(chr(ord("!") + i) for i in range(VOCAB - 3))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)


def on_target(layers: Sequence[int], **more: object) -> dict:
    """`init` of a student on the target's own layers: self-drafting."""
    return {"from_target": {"layers": layers, "shared": True, **more}}
