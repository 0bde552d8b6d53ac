"""Replay: recorded texts decoded again by csdraft's own loop, with a recording in the model's place.

How many tokens a round a drafter without a model yields on the texts of a large model is a property of the texts: the
model's choice after the text so far is the token that was recorded there. So block efficiency on a 7B model's outputs
is measured exactly without the model, in seconds. Texts must have been written greedily for that to be what the model
would do with the drafter; of sampled texts it is what would happen if the same tokens were drawn.

What a recording cannot tell: logits, the choice after anything that was not written (a draft is kept only as far as it
agrees with the text, trees too), and seconds, so that schedules which measure time have nothing to go by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import MaxLengthCriteria

from csdraft.decoding.call import Call
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Drafter, Request, Schedule, Verifier
from csdraft.decoding.ledger import Ledger, ModelUse
from csdraft.decoding.loop import run
from csdraft.decoding.output import Output
from csdraft.decoding.processing import Processing
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.session import Session
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.reports.recorder import Recorder
from csdraft.reports.report import Report
from csdraft.schedules.fixed import Fixed
from csdraft.verifiers.match import Match

__all__ = ["NotRecorded", "Recording", "replay"]

NO_CHOICE = -1
"""After tokens that were never written: no draft carries it."""


class NotRecorded(ValueError):
    """A drafter or a verifier asked for something that only the model itself could tell."""


@dataclass(frozen=True)
class Recording:
    """One text that a model wrote.

    Attributes:
        prompt: token ids that the model was given.
        output: token ids that it wrote, the end-of-text token included if it wrote one.
        task: what kind of text this is, for tables.
        group: recordings that belong together, such as the turns of one talk; "" stands alone.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    task: str = "all"
    group: str = ""

    def __post_init__(self) -> None:
        if not self.prompt or not self.output:
            raise ValueError(f"a recording of {len(self.prompt)} + {len(self.output)} tokens: both need at least one")


class Record(nn.Module):
    """What stands in the model's place: the whole texts, prompts included, by row."""

    def __init__(self, texts: Sequence[Sequence[int]]):
        super().__init__()
        self.texts = texts


def replay(
    recordings: Iterable[Recording],
    drafter: Drafter,
    vocab: int,
    eos: Iterable[int] = (),
    schedule: Schedule | None = None,
    verifier: Verifier | None = None,
) -> Iterator[Report]:
    """Decodes each recorded text again, one call each and in order, and yields its report.

    Args:
        recordings: what a model wrote.
        drafter: what is measured. What it learns from one call it keeps for the next ones, as it would in service.
        vocab: the model's number of tokens.
        eos: tokens that end a text. A text that does not end with one was cut by a limit, which is then kept to.
        schedule: how much to draft; as much as the drafter likes if None.
        verifier: the acceptance rule; match if None.

    Raises:
        NotRecorded: the drafter needs the model's logits, or the verifier did not keep to the text.
    """
    eos = frozenset(eos)
    for recording in recordings:
        yield _replay(recording, drafter, vocab, eos, schedule or Fixed(), verifier or Match())


def _replay(
    recording: Recording, drafter: Drafter, vocab: int, eos: frozenset[int], schedule: Schedule, verifier: Verifier
) -> Report:
    if drafter.models():
        raise NotRecorded(
            f"{type(drafter).__name__} runs a model, which a recording cannot feed with its target's states or time; "
            "replay drafters that have none"
        )
    prompt, tokens = torch.tensor(recording.prompt), [*recording.prompt, *recording.output]
    stopping = Stopping([] if tokens[-1] in eos else [MaxLengthCriteria(len(tokens))])
    stopping.eos = eos
    chooser = TokenChooser(Processing([], 1), stopping, Sampler(True, [0], vocab))
    ledger = Recorder(rows=1)
    call = RecordedCall(Record([tokens]), chooser, [Text(prompt)], len(tokens), ledger)
    drafter.check(call)
    policy = schedule.start(call, drafter)
    run(call, drafter, verifier, policy, Output(GenerationConfig(), 1), strict=True)
    if call.texts[0].tokens != tokens:
        raise NotRecorded(f"{type(verifier).__name__} left the recorded text; replay with a lossless verifier")
    return ledger.report(call)


class RecordedCall(Call):
    """A call whose target is a record."""

    def __init__(self, target: Record, chooser: TokenChooser, texts: Sequence[Text], capacity: int, ledger: Ledger):
        super().__init__(target, chooser, texts, capacity, None, ledger=ledger)
        self._sessions[id(target)] = RecordedSession(target, chooser, ledger.model(target, "Record"))


class RecordedSession(Session):
    """Answers from a record what a session would have to ask its model."""

    def __init__(self, record: Record, chooser: TokenChooser, use: ModelUse):
        self.model, self.chooser, self.vocab = record, chooser, chooser.sampler.vocab
        self.texts = record.texts
        self.reader: Any = Unused()
        self.use, self.pinned, self.imported = use, False, 0

    def score(
        self, requests: Sequence[Request], choose: bool = True, chooser: TokenChooser | None = None
    ) -> list[Any]:
        self.use.forwards += 1
        return [RecordedScores(self.chooser, self.texts[r.row], r) for r in requests]

    def room(self, row: int, text: Text) -> int:
        return 1 << 30

    def unread(self, row: int, text: Text) -> int:
        return 1

    def forget(self) -> None:
        pass

    def retire(self, live: Sequence[int]) -> None:
        pass


class Unused:
    """A reader that reads nothing and has no cache."""

    def __init__(self) -> None:
        self.cache, self.graphs, self.device = Empty(), None, torch.device("cpu")


class Empty:
    bytes = 0


class RecordedScores:
    """A view of one request: the recorded token after every node that agrees with the text."""

    def __init__(self, chooser: TokenChooser, recorded: Sequence[int], request: Request):
        self.chooser, self.row, self.text, self.draft = chooser, request.row, request.text, request.draft
        self.recorded = recorded
        self._written = _written(self.draft, recorded, len(self.text))

    def position(self, node: int) -> int:
        return len(self.text) + self.draft.depth(node)

    def choice(self, node: int) -> int:
        """The recorded token; one that no draft carries after a node that was never written."""
        position = self.position(node)
        known = (node == ROOT or self._written[node]) and position < len(self.recorded)
        return self.recorded[position] if known else NO_CHOICE

    def probs(self, node: int) -> Tensor:
        token = self.choice(node)
        if token == NO_CHOICE:
            raise NotRecorded(
                "the distribution after tokens that were never written is not recorded; use verifier 'match'"
            )
        one_hot = torch.zeros(self.chooser.sampler.vocab)
        one_hot[token] = 1.0
        return one_hot

    def ends(self, node: int, token: int) -> bool:
        path = [self.draft.tokens[above] for above in self.draft.path(node)]
        return self.chooser.stopping.ends(self.row, self.text, path, token)

    def soft(self, node: int, token: int) -> float:
        raise NotRecorded("the model's probabilities are not recorded, only what it chose")

    def __getattr__(self, name: str) -> Any:
        raise NotRecorded(f"{name!r} of the model's scores is not recorded, only what it chose")


def _written(draft: Draft, recorded: Sequence[int], length: int) -> list[bool]:
    """(nodes,) whether the text says the same up to and with each node."""
    written: list[bool] = []
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        position = length + draft.depth(node) - 1
        above = parent == ROOT or written[parent]
        written.append(above and position < len(recorded) and recorded[position] == token)
    return written
