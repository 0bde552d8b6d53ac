"""Drafting heads as students. The key of `init` is the name of the head's file in `csdraft/heads/kinds`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from csdraft import spec
from csdraft.data.packing import IGNORED, ends_of
from csdraft.heads import kinds as heads
from csdraft.heads.folder import SWITCHING, check_rotary
from csdraft.heads.head import Head, HeadOptions
from csdraft.heads.layers import embeddings, fingerprint, first_layer
from csdraft.heads.stored_head import all_formats, classes_in, head_at
from csdraft.heads.tied import Lender
from csdraft.models import base_model
from csdraft.stored import fit, naming
from csdraft.trainers.split import logits_of
from csdraft.trainers.students._student import Compared, Counts, Logits, Student, check_names
from csdraft.trainers.students.scratch import new_config

__all__ = ["HeadKind", "kinds", "student_of", "students"]

LIKE_TARGET = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps")
"""Settings of the layer that come from the target's config, if it has them."""
STREAMS = ("altup_num_inputs", "hc_mult")
"""What configs call the number of hidden states that a target has for each token."""


class HeadKind(Student):
    """One kind of drafting head.

    Args:
        trains: the class of its heads; None: any.
    """

    rate = 3e-4
    reads_features = needs_target = True

    def __init__(self, trains: type[Head] | None = None):
        self.trains: Any = trains

    @property
    def options(self) -> Any:
        """The dataclass of its keys of `init`."""
        own = self.trains.Options
        return self.trains.InitOptions if own is HeadOptions else own

    @property
    def name(self) -> str:
        return self.trains.__module__.rpartition(".")[2]

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        asked, text = self._asked(options), config.get_text_config(decoder=True)
        with naming(f"init.{self.name}"):
            if config.is_encoder_decoder:
                raise ValueError(f"a {config.model_type!r} target is an encoder-decoder, which no head reads")
            if (states := max(getattr(text, key, None) or 1 for key in STREAMS)) > 1:
                raise ValueError(
                    f"a {config.model_type!r} target has {states} hidden states for each token, and a head reads one; "
                    "draft with another model"
                )
            if asked.draft_vocab is not None and not 0 < asked.draft_vocab <= text.vocab_size:
                raise ValueError(
                    f"draft_vocab={asked.draft_vocab} must be from 1 to {text.vocab_size}, the target's tokens"
                )
            self.trains.fitted(asked, text, text.vocab_size)
        self.layer_config(text, asked)

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        asked, text = self._asked(options), target.config.get_text_config(decoder=True)
        drafted = self._most_frequent(asked.draft_vocab, target, counts)
        head = self.new(text, asked, len(drafted)).float()
        theirs = embeddings(target)
        rows = theirs.get("output.weight", theirs["input.weight"]).detach().float()
        with torch.no_grad():
            head.embed_tokens.weight.copy_(theirs["input.weight"][: text.vocab_size])  # it may have rows for pictures
            head.start(rows[drafted.to(rows.device)].cpu())
        head.d2t.copy_(drafted - torch.arange(len(drafted)))
        head.stored_by = next(kind for kind in all_formats() if kind.__module__.endswith(f".{head.layout}"))
        head.lent = head.lendable()
        for name in head.lent:
            head.get_parameter(name).requires_grad_(False)
        head.base = Lender.of(target, fingerprint(target))
        return head

    def new(self, text: Any, asked: Any, draft_vocab: int) -> Head:
        """A random head for a target of this config."""
        options = self.trains.fitted(asked, text, draft_vocab)
        return self.trains(self.layer_config(text, asked), options, draft_vocab)

    def compared(
        self,
        head: Any,
        states: Mapping[int, Tensor],
        hidden: Tensor,
        target_logits: Logits,
        labels: Tensor,
        inputs: Any,
    ) -> Iterator[Compared | Tensor]:
        """One part for each drafting step."""
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        drafted, steps = head.drafted, head.options.steps
        # Labels as indices into the draft vocabulary.
        numbers = torch.full((head.config.vocab_size,), IGNORED, device=labels.device)  # (vocab,)
        numbers[drafted] = torch.arange(len(drafted), device=labels.device)
        labels = torch.where(labels == IGNORED, labels, numbers[labels.clamp(min=0)])
        weights = [head.options.decay**step for step in range(steps)]
        of_drafted = logits_of(drafted, target_logits)
        features = head.fuse(states)
        for step, output in enumerate(head.unrolled(ids, positions, features, steps)):
            # Entry i predicts token i + 2 + step, as the target does at position i + 1 + step.
            wanted = labels[:, 2 + step :]  # (rows, length - 2 - step)
            length = wanted.shape[1]
            # In one text, positions rise by 1 from token to token: the predicted token is in the entry's own text.
            same = positions[:, 2 + step :] - positions[:, :length] == 2 + step
            counted, weight = (wanted != IGNORED) & same, weights[step] / sum(weights)
            own, theirs = output[:, :length][counted], slice(1 + step, 1 + step + length)  # (positions, width)
            at = hidden[:, theirs][counted.to(hidden.device)]  # (positions, width of the target)
            yield Compared(weight, own, at, wanted[counted], head.draft_logits, of_drafted)
            if (further := head.feature_loss(own, features[:, theirs][counted])) is not None:
                yield weight * further

    def layer_config(self, text: Any, asked: Any) -> Any:
        """The config of the head's layer: the target's shape, and the changes of the options."""
        first = first_layer(text)
        like = {key: value for key in LIKE_TARGET if (value := getattr(first, key, None))}
        rotary = getattr(text, "rope_parameters", None) or {}
        if "rope_theta" in rotary and rotary.get("rope_type") not in SWITCHING:
            like["rope_parameters"] = {key: rotary[key] for key in rotary if key != "partial_rotary_factor"}
        given = fit(asked.config or {}, dict[str, Any], f"init.{self.name}.config")
        spec.check_keys(given, sorted({*LIKE_TARGET, "rope_parameters"}), f"init.{self.name}.config")
        like |= {"model_type": "llama", "hidden_size": text.hidden_size, "num_hidden_layers": 1}
        made = new_config(text, {**like, **given})
        check_rotary(made.rope_parameters, f"init.{self.name}.config")
        return made

    def _asked(self, options: Mapping[str, Any]) -> Any:
        try:
            return fit(options, self.options, f"init.{self.name}")
        except ValueError as error:
            at = f"init.{self.name}"
            raise ValueError(str(error) if at in str(error) else f"{at}: {error}") from error

    def _most_frequent(self, count: int | None, target: Any, counts: Counts | None) -> Tensor:
        """(draft vocab,) ids of the tokens to draft, ascending: the end tokens and the most frequent others."""
        vocab = target.config.get_text_config(decoder=True).vocab_size
        if count is None or count == vocab:
            return torch.arange(vocab)
        if counts is None:
            raise ValueError(
                f"init.{self.name}: draft_vocab={count} is chosen by the training text; give that, or leave it out"
            )
        found = counts().clone()  # (vocab,)
        found[ends_of(target.generation_config)] = 1 << 60
        return found.argsort(descending=True, stable=True)[:count].sort().values

    def load_weights(self, student: Any, folder: str) -> None:
        head: Any = base_model(student)
        stored = head_at(folder)
        check_names(stored.state if stored else {}, head.stored_by.of(head).state, folder)
        head.load_state_dict(stored.state, strict=False)  # type: ignore[union-attr] - else it was refused


@cache
def students() -> dict[str, Student]:
    """Every kind of student by the name of its file, here or among the kinds of heads."""
    found: dict[str, Student] = {}
    for name, made in classes_in(heads, Head):
        if (kind := HeadKind(made)).options is not HeadOptions:
            found[name] = kind
    for file in pkgutil.iter_modules([os.path.dirname(__file__)]):
        if not file.name.startswith("_"):
            module = importlib.import_module(f"{__package__}.{file.name}")
            found[file.name] = getattr(module, module.__all__[0])()
    return found


def kinds() -> dict[str, HeadKind]:
    """The kinds of heads, by name."""
    return {name: kind for name, kind in students().items() if isinstance(kind, HeadKind)}


def student_of(model: Any) -> Student:
    """The kind by which a student in training is compared and loaded: its head's, an adapter's, or a whole model's."""
    model = base_model(model)
    if isinstance(model, Head):
        return HeadKind(type(model))
    return students()["lora" if vars(model).get("peft_config") else "whole"]
