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
from csdraft.trainers.students import save_student
from tests.heads.kinds import new
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
    "qwen3": {"qk_norm": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "parallel": {"layers": [0, 1, 2], "blocks": 2},
    "dflash": {"layers": [1, 2], "blocks": 2},
}
"""Heads of several tokens from one forward, as `tests.heads.kinds.new` makes them."""
OF_BLOCKS = {"mask_token_id": 5, "blocks": 2}
ASKED: dict[str, dict[str, Any]] = {
    **{name: {"kind": "eagle3", **flags} for name, flags in VARIANTS.items() if name != "qwen3"},
    "qwen3": {"kind": "eagle3", "family": "qwen3"},
    "peagle": {"kind": "peagle", **OF_BLOCKS},
    "peagle-qwen3": {"kind": "peagle", "family": "qwen3", "fc_norm": True, **OF_BLOCKS},
    "dflash": {
        "kind": "dflash", "family": "qwen3", "block_size": 1 + STEPS, "aux_hidden_state_layer_ids": [1, 2], **OF_BLOCKS
    },
}  # fmt: skip
"""Random heads that the package makes."""
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
    if name in OTHERS:
        return new(name, seed, draft_vocab=draft_vocab, **OTHERS[name])
    return new_head(seed, LAYERS, draft_vocab, **VARIANTS[name])


def wanted(asked: dict[str, Any], verifier: str) -> dict[str, Any]:
    """What the process is asked for."""
    base = {"layer": SHAPE, "verifier": verifier, "drafted": list(DRAFTED), "family": "llama", "blocks": 1}
    layers = {} if asked["kind"] == "dflash" else {"eagle_aux_hidden_state_layer_ids": LAYERS}
    return base | layers | asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Heads that csdraft has exported, heads that speculators has made, and the logits of all by speculators."""
    folder, (ids, states) = tmp_path_factory.mktemp("speculators"), inputs()
    verifier = str(folder / "target")
    target().save_pretrained(verifier)
    tokenizer().save_pretrained(verifier)
    (folder / "asked").mkdir()
    (folder / "heads").mkdir()
    for name in (*VARIANTS, *OTHERS):
        for draft_vocab in (60, 97):
            stored, out = folder / "stored" / f"{name}-{draft_vocab}", folder / "heads" / f"{name}-{draft_vocab}"
            save_student(exported(name, draft_vocab), stored)
            assert main(["export", str(stored), str(out), "--to", "speculators", "--target", verifier]) == 0
    for name, asked in ASKED.items():
        (folder / "asked" / f"{name}-theirs.json").write_text(json.dumps(wanted(asked, verifier)))
    given = {"ids": ids} | {str(layer): state for layer, state in states.items()}
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
    """The largest of all steps, as a share of the largest logit.

    A step that reads beyond the text does not count, nor a block that is longer than the text that is left.
    """
    length, largest = one.shape[1], float(one.abs().max())
    ends = [min(length - s, *(int(x[s].any(-1).nonzero().max()) + 1 for x in (one, other))) for s in range(STEPS)]
    assert min(ends) > length - 2 * STEPS
    return max(float((one[s, :end] - other[s, :end]).abs().max()) for s, end in enumerate(ends)) / largest


@pytest.mark.parametrize("draft_vocab", [60, 97])
@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_it_computes_what_an_exported_head_does(folder, name, draft_vocab):
    found = theirs(folder, f"{name}-{draft_vocab}")
    share = difference(found, ours(exported(name, draft_vocab)))
    print(f"{name}, {draft_vocab} tokens: {share:.2g}")
    assert share < SMALLEST
    assert difference(found, ours(exported(name, draft_vocab, seed=1))) > 0.1


@pytest.mark.parametrize("name", ASKED)
def test_a_head_that_it_has_saved_computes_the_same_here(folder, tmp_path, name):
    """Also after csdraft has written it again."""
    there = folder / "heads" / f"{name}-theirs"
    loaded: Any = as_drafter(ModelDrafter(there), target()).network
    share = difference(theirs(folder, f"{name}-theirs"), ours(loaded))
    print(f"{name}, made by speculators: {share:.2g}")
    assert loaded.drafted.tolist() == list(DRAFTED)
    assert share < SMALLEST
    assert difference(theirs(folder, "dflash-60" if name == "dflash" else "plain-60"), ours(loaded)) > 0.1
    asked = ["export", str(there), str(tmp_path / "out"), "--target", str(folder / "target"), "--to", "speculators"]
    assert main(asked) == 0
    again: Any = as_drafter(ModelDrafter(tmp_path / "out"), target()).network
    assert torch.equal(ours(again), ours(loaded))
