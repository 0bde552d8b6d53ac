"""Medusa heads in folders of the original layout: what csdraft writes and reads, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from csdraft import ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.cli import main
from csdraft.heads.formats.medusa import MedusaHead
from csdraft.heads.formats.own import OwnHead
from csdraft.heads.stored_head import head_at
from csdraft.models import load_model
from csdraft.trainers.students import make_student, save_student
from tests.heads.kinds import learned, new, weights_in
from tests.heads.learned import naive, target, texts
from tests.heads.spied import GREEDY

TARGET = "base_model_name_or_path"
SAID = {"medusa_num_heads": 3, "medusa_num_layers": 2, TARGET: "someone/target"}


class Residual(nn.Module):
    """A block as the paper has it; its tensors are called `linear.weight` and `linear.bias`."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))


def original(heads: int = 3, blocks: int = 2, width: int = 32, vocab: int = 97, seed: int = 0) -> nn.ModuleList:
    """Heads as the original code builds them, at random."""
    torch.manual_seed(seed)
    made = [[Residual(width) for _ in range(blocks)] + [nn.Linear(width, vocab, bias=False)] for _ in range(heads)]
    return nn.ModuleList(nn.Sequential(*layers) for layers in made)


def folder_of(folder: Path, config: dict[str, Any], state: dict[str, Tensor], name: str = "medusa_lm_head.pt") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".pt"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name)
    return folder


@torch.no_grad()
def check_logits(head: Any, wanted: nn.ModuleList) -> None:
    """Each head's logits from the target's last hidden state, whatever is drafted in between."""
    text, drafted = texts()[0, :12].tolist(), [5, 6, 7, 8]
    last = target()(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1][0, -1]
    for number, one in enumerate(wanted):
        logits, _ = naive(head, text, drafted[:number])
        assert torch.allclose(logits, one(last), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors"])
def test_a_folder_of_the_original_layout_drafts(tmp_path, recwarn, prefix, name):
    wanted = original()
    folder_of(tmp_path, SAID, {f"{prefix}{key}": tensor for key, tensor in wanted.state_dict().items()}, name)
    check_logits(as_drafter(ModelDrafter(tmp_path), target()).network, wanted)
    assert not recwarn.list
    plain = target().generate(texts()[:1, :9], pad_token_id=0, **GREEDY)
    how = {"schedule": "fixed", "strict": True, "pad_token_id": 0}
    assert torch.equal(target().generate(texts()[:1, :9], assistant=str(tmp_path), **how, **GREEDY), plain)


def test_what_is_written_fits_the_original_heads(tmp_path):
    """Strictly, by the original's names; what it computes is the same."""
    head = learned("medusa", draft_vocab=None, layers=2)
    save_student(head, tmp_path)
    file, state = weights_in(tmp_path)
    assert file.name == "medusa_lm_head.pt"
    wanted = original(seed=1)
    wanted.load_state_dict(state)
    check_logits(head, wanted)
    document = json.loads((tmp_path / "config.json").read_text())
    assert {key: document[key] for key in SAID} == SAID | {TARGET: head.base.name}
    again = make_student(target(), str(tmp_path))
    assert again.stored_by is MedusaHead
    assert again.medusa_head[2][0].linear.weight.requires_grad
    check_logits(again, wanted)


def test_a_draft_vocabulary_is_kept_in_csdrafts_own_layout(tmp_path):
    save_student(new("medusa"), tmp_path)
    assert isinstance(head_at(str(tmp_path)), OwnHead)
    assert "medusa_num_heads" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"medusa_num_heads": 2}, "medusa_num_heads is 2: all 3 of the file are read"),
        ({"medusa_num_heads": None}, "medusa_num_heads is not set: all 3 of the file are read"),
        ({"medusa_num_layers": None}, "medusa_num_layers is not set: 2 is assumed"),
        ({TARGET: None}, "any target of width 32 with 97 tokens"),
    ],
)
def test_what_a_config_leaves_open_is_said_once(tmp_path, changes, says):
    """Published configs say two heads where the file holds five."""
    wanted, config = original(), {key: value for key, value in (SAID | changes).items() if value is not None}
    folder_of(tmp_path, config, wanted.state_dict())
    with pytest.warns(UserWarning, match=says) as warned:
        stored: Any = load_model(str(tmp_path))
    assert len(warned) == 1
    check_logits(stored.bind(target()), wanted)


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({}, {"1.0.linear.bias": None}, r"lacks medusa_head\.1\.0\.linear\.bias"),
        ({}, {"0.2.weight": None}, r"lacks medusa_head\.0\.2\.weight"),
        ({}, {"1.2.bias": torch.ones(97)}, r"does not know.*medusa_head\.1\.2\.bias"),
        ({}, {"1.2.weight": torch.ones(97, 31)}, r"1\.2\.weight has shape \(97, 31\)"),
        ({"medusa_num_heads": 4}, {}, r"lacks medusa_head\.3\."),
        ({"medusa_num_heads": 10**9}, {}, "medusa_num_heads=1000000000"),
        ({"medusa_num_layers": 1}, {}, r"lacks medusa_head\.0\.1\.weight"),
        ({"medusa_num_heads": "three"}, {}, "medusa_num_heads='three'"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, config, tensors, says):
    state = {key: tensor for key, tensor in (original().state_dict() | tensors).items() if tensor is not None}
    folder_of(tmp_path, SAID | config, state)
    with pytest.raises(ValueError, match=says):
        load_model(str(tmp_path))


def test_heads_of_another_target_are_refused(tmp_path):
    folder_of(tmp_path, SAID, original(width=24).state_dict())
    stored: Any = load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"hidden_size=24.* has 32"):
        stored.bind(target())


def test_a_whole_model_that_was_saved_with_heads_is_no_head(tmp_path):
    folder_of(tmp_path, {**SAID, "model_type": "llama", "num_hidden_layers": 2}, original().state_dict())
    assert head_at(str(tmp_path)) is None


def test_inspect_says_what_it_is_and_who_loads_it(tmp_path, capsys):
    folder_of(tmp_path, SAID, original().state_dict())
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "3 Medusa heads of 2 blocks" in printed
    assert "someone/target; width 32, 97 tokens" in printed
    assert printed.count("would not: it does not load Medusa heads of this layout") == 3
