"""`model.generate(..., assistant=...)`: the only file that touches transformers' GenerationMixin."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Collection, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from csdraft.cascade import CascadeDrafter, as_drafter, options_of
from csdraft.checks.generate_options import check_early, effective
from csdraft.checks.request import ask_model, check_processors, check_request
from csdraft.decoding.cache import cross_attention_cache, export_cache
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.graphs import Mode
from csdraft.decoding.interfaces import Drafter, Schedule, Verifier
from csdraft.decoding.loop import open_call, run
from csdraft.decoding.output import Output
from csdraft.decoding.reader import Sources
from csdraft.decoding.readers import ReadingOptions
from csdraft.decoding.reported import keep, last_report_of, report_of
from csdraft.decoding.safe_drafter import SafeDrafter
from csdraft.decoding.session import Session
from csdraft.decoding.text import Text
from csdraft.models import base_model
from csdraft.options import NAMES, Options
from csdraft.reports.recorder import Recorder
from csdraft.reports.report import Report

__all__ = ["decode", "enable", "generate", "install", "report"]

OPTIONS = ("options", *NAMES)
"""Keywords of `generate` that csdraft adds beside `assistant`."""


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    assistant: Any = None,
    options: Options | None = None,
    verifier: Verifier | str | None = None,
    schedule: Schedule | str | None = None,
    row_seeds: Sequence[int] | None = None,
    strict: bool | None = None,
    diagnose: bool | None = None,
    reuse: bool | None = None,
    graphs: Mode | None = None,
    encoder_input_ids: Tensor | None = None,
    given: Collection[str] | None = None,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Decodes with drafts; pass it as `model.generate(..., custom_generate=csdraft.decode, assistant=...)`.

    `generate` calls it with everything prepared. After `import csdraft`, `model.generate(..., assistant=...)` does the
    same and also supports `streamer` and `stop_strings`, which transformers does not pass to callables.

    Args:
        assistant: "auto", a `csdraft.Drafter`, a model, or the path or Hub id of a saved cascade; None decodes plainly
            with csdraft's own loop.
        options: how to decode, all fields in one object; see `csdraft.Options`.
        verifier, schedule, row_seeds, strict, diagnose, reuse, graphs: the same fields, one by one. A field that is
            given twice must have the same value.
        encoder_input_ids: (rows, source) the encoder's input, which an encoder-decoder's drafters also read; passed by
            the patched `generate`.
        given: names of the keywords that the user passed to `generate`; passed by the patched `generate`.
    """
    single = {"verifier": verifier, "schedule": schedule, "row_seeds": row_seeds, "strict": strict, "reuse": reuse}
    own = Options.of(options, **single, diagnose=diagnose, graphs=graphs)
    input_ids = input_ids.long()  # as plain `generate` returns them
    drafter = as_drafter(assistant, model)
    chosen: Any = options_of(drafter, own)
    rule = chosen.verifier
    if not rule.lossless:
        _warn_of_loss(repr(rule))
    safe, seeds = SafeDrafter(drafter, rule, bool(chosen.strict)), chosen.row_seeds
    check_request(
        model, input_ids, generation_config, model_kwargs, given, stopping_criteria, streamer, synced_gpus, seeds
    )
    mask, cache = _padding(model, model_kwargs), model_kwargs.get(GENERATE_CACHE)
    past = cache if cache is not None and cache.get_seq_length() > 0 else None
    _plan(safe, model, _first_prompt(input_ids, mask, encoder_input_ids, model_kwargs), generation_config)
    reading = _reading(model, safe, chosen)
    rest = seeds, _sources(model, input_ids, encoder_input_ids, model_kwargs, safe), mask, past, reading
    ledger = Recorder(input_ids.shape[0], bool(chosen.diagnose))
    call = open_call(model, input_ids, logits_processor, stopping_criteria, generation_config, rule, *rest, ledger)
    ledger.check(call.sampler)
    check_processors(rule, call.chooser.processing)
    safe.check(call)
    ask_model(model, model_kwargs)  # the last check, since it runs forwards

    output = Output(generation_config, call.rows, streamer)
    call.chooser.stopping.kept = output.scores
    target = call.session(model)
    target.pinned = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    run(call, safe, rule, safe.start(chosen.schedule, call), output)

    report, used = ledger.report(call), safe.drafter  # the drafter, or the cascade that the planner chose instead
    report.planned = used.forecast if isinstance(used, CascadeDrafter) else None
    inner = base_model(assistant) if isinstance(assistant, nn.Module) else drafter
    keep(report, assistant, inner, drafter, used, model)
    sequences = output.sequences(input_ids, call.texts)
    if target.pinned and cache is not None:  # the user may continue from it
        _fill(cache, target, call.texts, sequences, mask)
    call.close(failed=safe.failure is not None)
    return output.pack(sequences, report, cache, model_kwargs.get("encoder_outputs"))


@functools.cache
def _warn_of_loss(rule: str) -> None:
    """Warns once for each rule."""
    warnings.warn(
        f"verifier {rule} is not lossless: the text may differ from what the target alone would write; "
        "use 'match' for the target's own text",
        UserWarning,
        stacklevel=3,
    )


def _padding(model: PreTrainedModel, inputs: dict) -> Tensor | None:
    """(rows, prompt) 0 where a text is padded; None if none is."""
    mask = inputs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    return None if mask is None or bool(mask.all()) else mask


def _first_prompt(input_ids: Tensor, mask: Tensor | None, encoder_input_ids: Tensor | None, inputs: dict) -> Tensor:
    """(1, length) the first row's prompt without padding; for an encoder-decoder, the encoder's input."""
    if encoder_input_ids is not None:
        input_ids, mask = encoder_input_ids, inputs.get("attention_mask")
    prompt = input_ids[0] if mask is None else input_ids[0][mask[0].bool()]
    return prompt[None]


def _plan(safe: SafeDrafter, model: PreTrainedModel, prompt: Tensor, config: Any) -> None:
    """Replaces a cascade with `k_matrix="auto"` by the one that the planner chooses."""
    if isinstance(safe.drafter, CascadeDrafter):
        options = {key: getattr(config, key) for key in PLANNED_FOR}
        safe.drafter = safe.attempt(lambda cascade: cascade.planned(model, prompt, options), safe.drafter)


def report(of: Any, last: bool = False) -> Report | None:
    """The merged report of all calls with this assistant or target; None if there were none.

    Nothing is set on a model, and its reports are dropped with it. Drafters also have them as `drafter.report` and
    `drafter.last_report`.

    Args:
        of: what was passed as `assistant=`: a drafter, a model, a path, or a name such as "auto"; or the target.
        last: report the last call only.
    """
    found = (last_report_of if last else report_of)(of)
    if found is None and isinstance(of, nn.Module) and (inner := base_model(of)) is not of:
        return report(inner, last)  # inside a wrapper, such as torch.compile's
    return found


def _reading(model: PreTrainedModel, drafter: Drafter, options: Options) -> ReadingOptions:
    """How the models read; raises ValueError if the drafter needs what the target does not have."""
    if (taps := drafter.taps()) and model.config.is_encoder_decoder:
        raise ValueError(
            f"the drafter reads hidden states {sorted(taps)} of the target, and an encoder-decoder has none"
        )
    graphs: Mode = "auto" if options.graphs is None else options.graphs
    return ReadingOptions(options.reuse is not False, graphs, taps)


def _sources(
    model: PreTrainedModel, input_ids: Tensor, encoder_input_ids: Tensor | None, inputs: dict, drafter: Drafter
) -> Sources | None:
    """The encoder's inputs and outputs, one row per row of the batch; None for a decoder-only model."""
    if not model.config.is_encoder_decoder:
        return None
    if encoder_input_ids is None and drafter.models():
        raise ValueError(
            "the drafter's models read the encoder's input too, but only encoder_outputs is known: "
            "pass encoder_input_ids=, the (rows, source) ids that encoder_outputs was made from"
        )
    rows = input_ids.shape[0]
    if encoder_input_ids is not None and encoder_input_ids.shape[0] != rows:
        encoder_input_ids = encoder_input_ids.repeat_interleave(rows // encoder_input_ids.shape[0], 0)
    cross = cross_attention_cache(inputs.get(GENERATE_CACHE))
    return Sources(encoder_input_ids, inputs.get("attention_mask"), inputs["encoder_outputs"], cross)


def _fill(cache: Any, target: Session, texts: Sequence[Text], sequences: Tensor, mask: Tensor | None) -> None:
    """Fills the user's cache with what plain `generate` has read: also the padding after rows that ended early.

    Args:
        sequences: (rows, length) what `generate` returns.
        mask: (rows, prompt) 0 where the prompt is padded; None if it is not.
    """
    for text, ids in zip(texts, sequences, strict=True):
        text.append(ids[len(text) + text.padding :].tolist())
    target.settle(texts, sequences.shape[1] - 1)
    kept = torch.ones_like(sequences, dtype=torch.bool)
    if mask is not None:
        kept[:, : mask.shape[1]] = mask.bool()
    export_cache(target.reader.cache, kept[:, :-1], cache)


PLANNED_FOR = ("do_sample", "temperature", "top_k", "top_p", "min_p", "pad_token_id", "eos_token_id")
"""Keys of the generation config that the planner decodes with."""
OTHER_DRAFTERS = ("assistant_model", "assistant_tokenizer")
"""Keywords of `generate` that ask transformers itself to draft."""

_stock_generate = GenerationMixin.generate
_SIGNATURE = inspect.signature(_stock_generate)


@functools.wraps(_stock_generate)
def generate(self: Any, *args: Any, assistant: Any = None, **kwargs: Any) -> Any:
    if assistant is None and all(kwargs.get(name) is None for name in OPTIONS):
        return _stock_generate(self, *args, **kwargs)
    _SIGNATURE.bind_partial(self, *args, **kwargs)  # raises TypeError for an argument that is given twice
    names = list(_SIGNATURE.parameters)[1:-1]
    kwargs |= zip(names, args, strict=False)
    if kwargs.get("custom_generate") is decode:  # the unpatched spelling on a patched model
        del kwargs["custom_generate"]
    if others := [name for name in OTHER_DRAFTERS if kwargs.get(name) is not None]:
        raise ValueError(f"assistant= and {' and '.join(others)}= are two ways to draft; drop one of them")
    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    if kwargs.get("custom_generate") is not None:  # a saved cascade's own shim, which calls back with `assistant`
        return _stock_generate(self, assistant=assistant, **options, **kwargs)
    extra, config = {key: kwargs[key] for key in kwargs if key not in names}, kwargs.get("generation_config")
    check_early(extra, config, self.generation_config)
    strings = effective("stop_strings", extra, config, self.generation_config)
    tokenizer = extra.get("tokenizer")
    if strings is not None and tokenizer is not None:  # transformers drops the tokenizer for callables
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
        made = StopStringCriteria(tokenizer, strings)
        if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # the user's own one wins
            criteria.append(made)
        kwargs["stopping_criteria"] = criteria
        kwargs["stop_strings"] = None  # also those of the model's own generation_config
    encoder_ids = kwargs.pop("encoder_input_ids", None)
    if self.config.is_encoder_decoder and encoder_ids is None:
        encoder_ids = extra.get("input_ids") if kwargs.get("inputs") is None else kwargs["inputs"]
    bound_decode = functools.partial(
        decode,
        assistant=assistant,
        streamer=kwargs.get("streamer"),
        synced_gpus=bool(kwargs.get("synced_gpus")),
        encoder_input_ids=encoder_ids,
        given=tuple(extra),
        **options,
    )
    return _stock_generate(self, **{**kwargs, "custom_generate": bound_decode})


_enabled: WeakSet[nn.Module] = WeakSet()
"""Models that were enabled one by one; a set, so that nothing is set on the models themselves."""


@functools.wraps(_stock_generate)
def _generate_of_enabled(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Drafts for enabled models; all other models decode with transformers' own `generate`."""
    return (generate if self in _enabled else _stock_generate)(self, *args, **kwargs)


def install() -> None:
    """Adds `assistant` and the fields of `Options` to every model's `generate`; other calls do not change."""
    if GenerationMixin.generate in (_stock_generate, _generate_of_enabled):
        GenerationMixin.generate = generate  # type: ignore[method-assign]


def enable(model: nn.Module) -> nn.Module:
    """Adds the keyword `assistant` to the `generate` of one model, which it returns; for CSDRAFT_NO_PATCH=1.

    Nothing is set on the model, which can be copied and saved as before. A copy is not enabled.
    """
    _enabled.add(base_model(model))
    if GenerationMixin.generate is _stock_generate:
        GenerationMixin.generate = _generate_of_enabled  # type: ignore[method-assign]
    return model
