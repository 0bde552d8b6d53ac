"""Asks a model whether drafts would change its text: ragged rows and a tree read from a cache, against plain reads.

Class and config do not tell everything: some families mask by slot inside their own attention, count positions
themselves, or share state between rows. Such a model gives other logits here, and is refused instead of writing
another text. The answer is remembered, by class and config, for as long as the process lives. Of a model with hooks,
or otherwise changed since its class made it, it is remembered for the model and these changes alone.
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
from csdraft.decoding.reader import Sources, home
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.session import Session
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.decoding.traits import traits_of

__all__ = ["difference", "padding_difference"]

Question = Callable[[nn.Module], str | None]

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
"""Classes of transformers that `make families` finds exact, and that are used most: they are not asked as they are."""

LONGEST_SPAN = 64
"""A window or chunk up to which the probe's texts reach beyond it."""

STEPS = 3
"""Tokens that plain `generate` writes for a comparison."""

TREE = Draft((11, 12, 13, 14), (ROOT, ROOT, 1, 2), (0,) * 4, (float("nan"),) * 4)
"""Two branches, of which the second continues."""

STEPPED = 1
"""Of the texts that are compared, which one is also read in steps: the first row's, and its draft's first branch."""

_LOCK = threading.Lock()
_answers: dict[str, str | None] = {}
_models: WeakKeyDictionary[nn.Module, dict[Question, tuple[object, str | None]]] = WeakKeyDictionary()


def difference(model: nn.Module) -> str | None:
    """Why drafts would change what `model` writes; None if they do not. A few short forwards, at a model's first use.

    A model in training mode is not asked: dropout makes its text another one each time anyway. Nor is an
    encoder-decoder: those that are not refused are known.
    """
    return _answer(model, _compare)


def padding_difference(model: nn.Module) -> str | None:
    """Why a padded row of `model` is read otherwise in plain `generate` than with drafts; None if it is not."""
    return _answer(model, _compare_padded)


def _answer(model: nn.Module, question: Question) -> str | None:
    """Asked once for each model class and config; once for each model and each state that it was put in."""
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
    """Whether its config asks for nothing but attention to earlier tokens."""
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    both_ways = any(value for key, value in vars(text).items() if "bidirectional" in key or "prefix_lm" in key)
    return not both_ways and getattr(text, "is_causal", True) is not False


def _described(model: nn.Module) -> str:
    """The model's config, attention and dtype, without the names of the place it came from."""
    config: Any = model.config
    options = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    attention = config.get_text_config(decoder=True)._attn_implementation
    return f"{attention} {model.dtype} {json.dumps(options, sort_keys=True, default=str)}"


@torch.no_grad()
def _compare(model: nn.Module) -> str | None:
    name = type(model).__name__
    changes = f" (with {changed})" if (changed := described(model)) else ""
    try:
        found, alone, stepped = _logits(model)
    except NoCache as error:
        return str(error)
    except Exception as error:  # whatever a model does with what it cannot read
        return (
            f"{name}{changes} fails ({type(error).__name__}) when it reads rows of different lengths, and the "
            "branches of a draft, together from its cache, as drafted decoding does; call generate without assistant="
        )
    most = torch.finfo(model.dtype).eps ** 0.5  # type: ignore[arg-type]
    if (off := _off(found, alone)) > most:
        return (
            f"{name}{changes} computes other logits (off by {off:.1%} of their range) when it reads rows of different "
            "lengths, and the branches of a draft, together from its cache than when it reads each text alone, so "
            "that drafts would change its text; call generate without assistant="
        )
    if stepped is not None and (off := _off(found[STEPPED], stepped)) > most:
        return (
            f"{name}{changes} computes other logits (off by {off:.1%} of their range) for a token that it reads by "
            "itself, as plain generate does, than for the same token among others, so that drafts would change its "
            "text; call generate without assistant="
        )
    return None


def _off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of logits, as a share of their range; infinite if one of them is nan."""
    off = float((found - wanted).abs().max() / (wanted.max() - wanted.min()))
    return math.inf if math.isnan(off) else off


@torch.no_grad()
def _compare_padded(model: nn.Module) -> str | None:
    """Of two rows, one with padding before it: the first logits of plain `generate`, and those of each row alone."""
    tokens = _tokens(model, 8)
    prompts = [tokens, tokens[3:]]
    ids = torch.tensor([tokens, [tokens[0]] * 3 + tokens[3:]], device=_home(model))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator]
    worst = 0.0
    for row, prompt in enumerate(prompts):
        for step, logits in enumerate(output.logits):
            wanted = _alone(model, [*prompt, *output.sequences[row, 8 : 8 + step].tolist()]).float()
            worst = max(worst, _off(logits[row].to(wanted), wanted))
    if worst <= torch.finfo(model.dtype).eps ** 0.5:  # type: ignore[arg-type]
        return None
    return (
        f"plain generate computes other logits (off by {worst:.1%} of their range) for the rows of a padded batch of "
        f"{type(model).__name__} than for each row alone, as which drafted decoding reads them; call generate row by "
        "row, or without assistant="
    )


def _logits(model: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """float32 logits: as drafted decoding reads texts, as the model reads each alone, and of one in single steps.

    Returns:
        (compared, vocab) twice, and (vocab,) of number STEPPED of them; None if the model hands no cache out.
    """
    span = traits_of(model).longest_span
    tokens = _tokens(model, (span if span <= LONGEST_SPAN else 0) + 9)
    texts = [Text(torch.tensor(tokens)), Text(torch.tensor(tokens[3:]))]
    vocab = model.config.get_text_config(decoder=True).vocab_size
    chooser = TokenChooser(Processing([], 2), Stopping([]), Sampler(True, [0, 0], vocab))
    source = _source(model)
    sources = Sources(source.expand(2, -1), None) if model.config.is_encoder_decoder else None
    session = Session(model, chooser, 2, len(tokens) + 16, sources, vocab, texts)
    session.score([Request(row, text, Draft()) for row, text in enumerate(texts)], choose=False)
    draft = Draft(tuple(tokens[2 * node] for node in range(4)), TREE.parents, TREE.levels, TREE.confidence)
    texts[1].append(tokens[:2])
    scores = session.score([Request(row, text, draft) for row, text in enumerate(texts)], choose=False)
    texts[0].append([draft.tokens[1]])  # the second branch is accepted: its slots move
    later = session.score([Request(0, texts[0], Draft())], choose=False)
    found = [view.raw(node) for view in scores for node in (ROOT, 0, 3)] + [later[0].raw(ROOT)]
    paths = [[*text, *path] for text in (tokens, [*tokens[3:], *tokens[:2]]) for path in _paths(draft)]
    wanted = [_alone(model, path) for path in [*paths, [*tokens, draft.tokens[1]]]]
    stepped = _stepped(model, paths[STEPPED])
    return torch.stack(found).float().cpu(), torch.stack(wanted).float().cpu(), stepped


def _paths(draft: Draft) -> list[list[int]]:
    return [[draft.tokens[node] for node in draft.path(end)] for end in (ROOT, 0, 3)]


def _alone(model: Any, tokens: Sequence[int]) -> Tensor:
    """(vocab,) logits after `tokens`, read in one forward without a cache, with the inputs that `generate` gives."""
    return model(**_inputs(model, tokens, use_cache=False, is_first_iteration=True)).logits[0, -1]


def _stepped(model: Any, tokens: Sequence[int]) -> Tensor | None:
    """(vocab,) float32 logits after `tokens`, the last of them read by itself, as plain `generate` reads it.

    None if the model hands out no cache by itself.
    """
    before = model(**_inputs(model, tokens[:-1], use_cache=True, is_first_iteration=True))
    cache = before.get(cache_name(before.__init__))
    if cache is None:
        return None
    inputs = _inputs(model, tokens, next_sequence_length=1, use_cache=True, **{GENERATE_CACHE: cache})
    return model(**inputs).logits[0, -1].float().cpu()


def _inputs(model: Any, tokens: Sequence[int], use_cache: bool, **options: Any) -> dict[str, Any]:
    """What `generate` would give the model's forward."""
    ids = torch.tensor([tokens], device=_home(model))
    given = {"attention_mask": torch.ones_like(ids), "use_cache": use_cache, **options}
    if model.config.is_encoder_decoder:
        inputs = model.prepare_inputs_for_generation(ids, **given | {"attention_mask": None})
        inputs["input_ids"] = _source(model)
    else:
        places = torch.arange(len(tokens), device=ids.device)[None]
        inputs = model.prepare_inputs_for_generation(ids, position_ids=places, **given)
    return inputs | {"use_cache": use_cache, "return_dict": True}


def _source(model: nn.Module) -> Tensor:
    """(1, 6) ids that an encoder reads, the same for all texts of the probe."""
    return torch.tensor([_tokens(model, 6)], device=_home(model))


def _home(model: nn.Module) -> torch.device:
    return home(model)[0]


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
