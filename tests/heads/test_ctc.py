"""What only CTC heads do: distributions of tokens from frames, against a sum over all paths."""

from __future__ import annotations

from itertools import groupby, product
from typing import Any

import pytest
import torch

from csdraft.heads.kinds.ctc import CtcOptions
from csdraft.trainers.students import check_student
from tests.heads.kinds import new
from tests.heads.learned import target


def collapsed(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in groupby(path) if symbol != blank)


@pytest.mark.parametrize("drafted", [(), (2,), (2, 2), (1, 0), (0, 3, 0), (1, 1, 1)])
def test_tokens_are_drafted_from_the_sum_over_all_paths(drafted):
    """Of 4 frames with 4 tokens and a blank: 625 paths."""
    head: Any = new("ctc", draft_vocab=4, frames=4, steps=4)
    torch.manual_seed(0)
    frames = torch.randn(1, 4, 32)
    with torch.no_grad():
        head.lm_head.weight.mul_(4)
        head.blank.weight.mul_(4)
        normed = head.norm(frames)
        probs = torch.cat([head.lm_head(normed), head.blank(normed)], -1).softmax(-1)[0].double()  # (frames, symbols)
        weights = torch.zeros(4, dtype=torch.double)
        for path in product(range(5), repeat=4):
            text = collapsed(path, 4)
            if text[: len(drafted)] == drafted and len(text) > len(drafted):
                weights[text[len(drafted)]] += torch.stack([probs[i, symbol] for i, symbol in enumerate(path)]).prod()
        output = head.begun(frames)
        for token in drafted:
            output = head.taken(head.drafted[torch.tensor([token])], output)
        found = head.draft_logits(output).softmax(-1)[0].double()
    if float(weights.sum()):  # (1, 1, 1) and one more take seven frames
        assert torch.allclose(found, weights / weights.sum(), atol=1e-5)
    assert torch.isfinite(found).all()


def test_conditionals_of_a_text_are_its_ctc_loss():
    """Times the chance that nothing comes after it: torch's own loss."""
    head: Any = new("ctc", draft_vocab=6, frames=5, steps=5)
    torch.manual_seed(1)
    frames, text = torch.randn(1, 5, 32), [3, 3, 0]
    with torch.no_grad():
        normed = head.norm(frames)
        symbols = torch.cat([head.blank(normed), head.lm_head(normed)], -1).log_softmax(-1)  # blank first
        wanted = -torch.nn.functional.ctc_loss(
            symbols.transpose(0, 1), torch.tensor([text]) + 1, torch.tensor([5]), torch.tensor([3]), reduction="sum"
        )
        output, total, after = head.begun(frames), torch.zeros(1), torch.zeros(1)
        for token in [*text, None]:
            state = head._state(output)
            ends = torch.logaddexp(state.held[..., -1], state.ended[..., -1])
            goes_on = (head.draft_logits(output)).logsumexp(-1)
            begins = torch.logaddexp(ends, goes_on)
            if token is None:
                after = ends - begins
                break
            total = total + head.draft_logits(output)[..., token] - begins
            output = head.taken(head.drafted[torch.tensor([token])], output)
    assert torch.allclose(total + after, wanted, atol=1e-4)


def test_a_token_that_it_cannot_draft_leaves_a_distribution():
    """A reviewing head meets such tokens."""
    head: Any = new("ctc", draft_vocab=6)
    unknown = next(token for token in range(97) if token not in head.drafted.tolist())
    with torch.no_grad():
        output = head.taken(torch.tensor([unknown]), head.begun(torch.randn(1, 5, 32)))
        found = head.draft_logits(output).softmax(-1)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(), torch.tensor(1.0))


def test_fewer_frames_than_tokens_are_refused():
    with pytest.raises(ValueError, match="frames=2"):
        check_student(target().config, init={"ctc": {"layers": [0, 1, 3], "frames": 2, "steps": 3}})


def test_a_stored_head_needs_a_frame_for_each_token():
    with pytest.raises(ValueError, match="frames=3 of a CTC head that drafts steps=4"):
        CtcOptions(steps=4, frames=3)
