"""Tests with short forwards whether drafts would change a model's text.

Rows of different lengths and a tree of drafted tokens are read from a cache, and the logits are compared with those of
plain reads. Class and config do not tell everything: some families mask by slot inside their own attention, count
positions themselves, or share state between rows. Such a model has other logits here and is refused; without this test
it would write another text.

The process remembers the answer for each class and config. For a model that was changed after it was made, such as by
a hook, the answer holds for this model and these changes only.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from csdraft.checks.altered import alterations, described
from csdraft.decoding.cache import NoCache
from csdraft.decoding.cache_names import GENERATE_CACHE, cache_name
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Request
from csdraft.decoding.processing import Processing
from csdraft.decoding.reader import Sources
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.session import Session
from csdraft.decoding.states import home
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.decoding.traits import traits_of

__all__ = ["difference", "padding_difference"]

Question = Callable[[nn.Module], str | None]

KNOWN_EXACT = {
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM"),
}
"""Widely used classes of transformers that `make families` finds exact. They are only tested if they were changed."""

LONGEST_SPAN = 64
"""If a model's window or chunk is at most this long, the test's texts are longer than it."""

STEPS = 3
"""Tokens that plain `generate` writes for a comparison."""

TREE = Draft((11, 12, 13, 14), (ROOT, ROOT, 1, 2), (0,) * 4, (float("nan"),) * 4)
"""Two branches; the second has two more tokens."""

STEPPED = 1
"""Index of the text that is also read token by token: the first row's, with its draft's first branch."""

_LOCK = threading.Lock()
_answers: dict[str, str | None] = {}
_models: WeakKeyDictionary[nn.Module, dict[Question, tuple[object, str | None]]] = WeakKeyDictionary()


def difference(model: nn.Module) -> str | None:
    """Why drafts would change what `model` writes; None if they would not. A model's first use takes a few forwards.

    A model in training mode is not tested, since its text varies anyway (dropout). Nor is an encoder-decoder: csdraft
    accepts only families that are known to be exact.
    """
    return _answer(model, _compare)


def padding_difference(model: nn.Module) -> str | None:
    """Why plain `generate` reads a padded row of `model` differently than drafted decoding; None if it does not."""
    return _answer(model, _compare_padded)


def _answer(model: nn.Module, question: Question) -> str | None:
    """The answer to a question, computed once for a class and config, or for a changed model and its changes."""
    state = [key for _, _, key in alterations(model)]
    stock = type(model).__name__ in KNOWN_EXACT and type(model).__module__.startswith("transformers.")
    if not state and stock and _causal(model):
        return None
    if model.training or (model.config.is_encoder_decoder and not state):  # type: ignore[union-attr]
        return None
    with _LOCK:
        known = _models.setdefault(model, {})
    if question not in known or known[question][0] != state:
        known[question] = state, question(model) if state else _answer_of_class(model, question)
    return known[question][1]


def _answer_of_class(model: nn.Module, question: Question) -> str | None:
    key = f"{question.__name__} {type(model).__module__}.{type(model).__qualname__} {_described(model)}"
    if key not in _answers:
        _answers[key] = question(model)
    return _answers[key]


def _causal(model: nn.Module) -> bool:
    """Whether the config allows attention to earlier tokens only."""
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    both_ways = any(value for key, value in vars(text).items() if "bidirectional" in key or "prefix_lm" in key)
    return not both_ways and getattr(text, "is_causal", True) is not False


def _described(model: nn.Module) -> str:
    """The model's config, attention and dtype, without where it was loaded from."""
    config: Any = model.config
    options = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    attention = config.get_text_config(decoder=True)._attn_implementation
    return f"{attention} {model.dtype} {json.dumps(options, sort_keys=True, default=str)}"


@torch.no_grad()
def _compare(model: nn.Module) -> str | None:
    name = type(model).__name__ + (f" (with {changes})" if (changes := described(model)) else "")
    try:
        found, alone, stepped = _logits(model)
    except NoCache as error:
        return str(error)
    except Exception as error:  # a model may raise anything about inputs that it does not support
        return (
            f"{name} fails ({type(error).__name__}) when it reads rows of different lengths, and the branches of a "
            "draft, together from its cache, as drafted decoding does; call generate without assistant="
        )
    off, when = _difference(found, alone), "rows of different lengths and branches of a draft together, from its cache"
    if off <= _tolerance(model) and stepped is not None:
        off, when = _difference(found[STEPPED], stepped), "a token together with others, not one token at a time"
    if off <= _tolerance(model):
        return None
    return (
        f"{name} computes other logits (off by {off:.1%} of their range) when it reads {when}, so drafts would change "
        "its text; call generate without assistant="
    )


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of logits, as a share of their range; infinite if one of them is nan."""
    off = float((found - wanted).abs().max() / (wanted.max() - wanted.min()))
    return math.inf if math.isnan(off) else off


def _tolerance(model: nn.Module) -> float:
    """The largest difference that rounding explains."""
    return torch.finfo(model.dtype).eps ** 0.5  # type: ignore[arg-type]


@torch.no_grad()
def _compare_padded(model: nn.Module) -> str | None:
    """Compares plain `generate`'s first logits of two rows, one of them padded, with those of each row alone."""
    tokens = _tokens(model, 8)
    prompts = [tokens, tokens[3:]]
    ids = torch.tensor([tokens, [tokens[0]] * 3 + tokens[3:]], device=home(model)[0])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator]
    worst = 0.0
    for row, prompt in enumerate(prompts):
        for step, logits in enumerate(output.logits):
            wanted = _alone(model, [*prompt, *output.sequences[row, 8 : 8 + step].tolist()]).float()
            worst = max(worst, _difference(logits[row].to(wanted), wanted))
    if worst <= _tolerance(model):
        return None
    return (
        f"plain generate computes other logits (off by {worst:.1%} of their range) for {type(model).__name__} when a "
        "row is padded than when it is not, and drafted decoding reads rows without padding; call generate row by "
        "row, or without assistant="
    )


def _logits(model: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """float32 logits after some texts, read in three ways.

    Returns:
        (texts, vocab) as drafted decoding reads them; (texts, vocab) each text read alone; (vocab,) text number
        STEPPED with its last token read by itself, or None if the model returns no cache.
    """
    span = traits_of(model).longest_span
    tokens = _tokens(model, (span if span <= LONGEST_SPAN else 0) + 9)
    texts = [Text(torch.tensor(own, device="cpu")) for own in (tokens, tokens[3:])]
    vocab = model.config.get_text_config(decoder=True).vocab_size
    chooser = TokenChooser(Processing([], 2), Stopping([]), Sampler(True, [0, 0], vocab))
    source = _source(model)
    sources = Sources(source.expand(2, -1), None) if model.config.is_encoder_decoder else None
    session = Session(model, chooser, 2, len(tokens) + 16, sources, vocab, texts)
    session.score([Request(row, text, Draft()) for row, text in enumerate(texts)], choose=False)
    draft = Draft(tuple(tokens[2 * node] for node in range(4)), TREE.parents, TREE.levels, TREE.confidence)
    texts[1].append(tokens[:2])
    scores = session.score([Request(row, text, draft) for row, text in enumerate(texts)], choose=False)
    texts[0].append([draft.tokens[1]])  # the second branch is accepted, so its keys and values move
    later = session.score([Request(0, texts[0], Draft())], choose=False)
    found = [view.raw(node) for view in scores for node in (ROOT, 0, 3)] + [later[0].raw(ROOT)]
    drafted = [[draft.tokens[node] for node in draft.path(end)] for end in (ROOT, 0, 3)]
    paths = [[*text, *path] for text in (tokens, [*tokens[3:], *tokens[:2]]) for path in drafted]
    wanted = [_alone(model, path) for path in [*paths, [*tokens, draft.tokens[1]]]]
    stepped = _stepped(model, paths[STEPPED])
    return torch.stack(found).float().cpu(), torch.stack(wanted).float().cpu(), stepped


def _alone(model: Any, tokens: Sequence[int]) -> Tensor:
    """(vocab,) logits after `tokens`, read in one forward without a cache, with the inputs that `generate` passes."""
    return model(**_inputs(model, tokens, use_cache=False, is_first_iteration=True)).logits[0, -1]


def _stepped(model: Any, tokens: Sequence[int]) -> Tensor | None:
    """(vocab,) float32 logits after `tokens`, the last of them read by itself, as plain `generate` reads it.

    None if the model returns no cache.
    """
    before = model(**_inputs(model, tokens[:-1], use_cache=True, is_first_iteration=True))
    cache = before.get(cache_name(before.__init__))
    if cache is None:
        return None
    inputs = _inputs(model, tokens, next_sequence_length=1, use_cache=True, **{GENERATE_CACHE: cache})
    return model(**inputs).logits[0, -1].float().cpu()


def _inputs(model: Any, tokens: Sequence[int], use_cache: bool, **options: Any) -> dict[str, Any]:
    """What `generate` would pass to the model's forward."""
    ids = torch.tensor([tokens], device=home(model)[0])
    given = {"attention_mask": torch.ones_like(ids), "use_cache": use_cache, **options}
    if model.config.is_encoder_decoder:
        inputs = model.prepare_inputs_for_generation(ids, **given | {"attention_mask": None})
        inputs["input_ids"] = _source(model)
    else:
        places = torch.arange(len(tokens), device=ids.device)[None]
        inputs = model.prepare_inputs_for_generation(ids, position_ids=places, **given)
    return inputs | {"use_cache": use_cache, "return_dict": True}


def _source(model: nn.Module) -> Tensor:
    """(1, 6) ids for an encoder, the same for all texts."""
    return torch.tensor([_tokens(model, 6)], device=home(model)[0])


def _tokens(model: nn.Module, count: int) -> list[int]:
    """`count` ids of ordinary tokens, no image or end tokens; all different if the vocabulary is large enough."""
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
