"""The package speculators computes the same as csdraft, from a folder that either of them has written.

It lives in a folder of its own, since it wants another transformers: CSDRAFT_SPECULATORS names it, and
`scripts/install_speculators.sh FOLDER` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from csdraft import ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.cli import main
from csdraft.heads.formats.eagle3 import Eagle3Head
from tests.heads.learned import SHAPE, new_head, target, texts
from tests.tiny import tokenizer

PACKAGES = os.environ.get("CSDRAFT_SPECULATORS", "")
SCRIPT = Path(__file__).with_name("speculators_process.py")
STEPS, LAYERS, DRAFTED = 3, (0, 1, 2), range(3, 63)
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_output": True},
    "fc_norm": {"fc_norm": True},
}
SMALLEST = 1e-5
"""Share of the largest logit by which they may differ: they add numbers in another order."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACKAGES, reason="CSDRAFT_SPECULATORS names no folder with speculators"),
]


@torch.no_grad()
def inputs() -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """A text, and the target's hidden states on it by tap."""
    ids = texts()[:1, :24]
    return ids, dict(enumerate(target()(ids, output_hidden_states=True).hidden_states))


@torch.no_grad()
def ours(head: Any) -> torch.Tensor:
    """(steps, length - 1, draft vocab)"""
    ids, states = inputs()
    positions = torch.arange(ids.shape[1])[None]
    steps = head.unrolled(ids, positions, head.fuse(states), STEPS)
    return torch.stack([head.draft_logits(output[0, :-1]) for output in steps])


def exported(name: str, draft_vocab: int, seed: int = 0) -> Any:
    return new_head(seed, LAYERS, draft_vocab, **VARIANTS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Heads that csdraft has exported, heads that speculators has made, and the logits of all by speculators."""
    folder = tmp_path_factory.mktemp("speculators")
    verifier = str(folder / "target")
    target().save_pretrained(verifier)
    tokenizer().save_pretrained(verifier)
    (folder / "asked").mkdir()
    (folder / "heads").mkdir()
    for name, flags in VARIANTS.items():
        for draft_vocab in (60, 97):
            stored, out = folder / "stored" / f"{name}-{draft_vocab}", folder / "heads" / f"{name}-{draft_vocab}"
            Eagle3Head.of(exported(name, draft_vocab)).save(stored)
            assert main(["export", str(stored), str(out), "--to", "speculators", "--target", verifier]) == 0
        asked = {"layer": SHAPE, "verifier": verifier, "drafted": list(DRAFTED)} | flags
        asked["eagle_aux_hidden_state_layer_ids"] = LAYERS
        (folder / "asked" / f"{name}-theirs.json").write_text(json.dumps(asked))
    ids, states = inputs()
    joined = torch.cat([states[tap] for tap in LAYERS], -1)
    positions = torch.arange(ids.shape[1] - 1)[None]
    given = {"input_ids": ids[:, 1:], "hidden_states": joined[:, :-1], "position_ids": positions}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, folder / "inputs.safetensors")
    environment = os.environ | {"PYTHONPATH": PACKAGES}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder


def theirs(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "logits" / f"{name}.safetensors")["logits"]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest of all steps, as a share of the largest logit; a step that reads beyond the text does not count."""
    length, largest = one.shape[1], float(one.abs().max())
    return max(float((one[s, : length - s] - other[s, : length - s]).abs().max()) for s in range(STEPS)) / largest


@pytest.mark.parametrize("draft_vocab", [60, 97])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_computes_what_an_exported_head_does(folder, name, draft_vocab):
    found = theirs(folder, f"{name}-{draft_vocab}")
    share = difference(found, ours(exported(name, draft_vocab)))
    print(f"{name}, {draft_vocab} tokens: {share:.2g}")
    assert share < SMALLEST
    assert difference(found, ours(exported(name, draft_vocab, seed=1))) > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_head_that_it_has_saved_computes_the_same_here(folder, name):
    loaded: Any = as_drafter(ModelDrafter(folder / "heads" / f"{name}-theirs"), target()).network
    share = difference(theirs(folder, f"{name}-theirs"), ours(loaded))
    print(f"{name}, made by speculators: {share:.2g}")
    assert loaded.drafted.tolist() == list(DRAFTED)
    assert share < SMALLEST
    assert difference(theirs(folder, f"{name}-60"), ours(loaded)) > 0.1
