"""vLLM keeps as many drafted tokens of what csdraft exports as csdraft does, round by round, and writes its own text.

It lives in an environment of its own, since it wants another torch: CSDRAFT_VLLM names that environment's Python, and
`scripts/install_vllm.sh FOLDER` makes it. vLLM runs on the CPU, in float32.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csdraft import ModelDrafter
from csdraft.export import export_drafter
from csdraft.trainers.objective import Distillation, Objective
from csdraft.trainers.students import make_student, save_student
from tests.tiny import VOCAB, fresh, noisy, tokenizer

PYTHON = os.environ.get("CSDRAFT_VLLM", "")
SCRIPT = Path(__file__).with_name("vllm_process.py")
DEPTH, TOKENS, LENGTH, PROMPT = 3, 40, 128, 6
OBJECTIVE = Objective({"forward_kl": 1.0}, chunk=1024)

LAYERS, SOME = {"layers": [0, 2, 3]}, {"draft_vocab": 60}
ALL_NORMS = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
HEADS: dict[str, tuple[str, dict[str, Any], dict[str, bool]]] = {
    "eagle3": ("eagle3", LAYERS | SOME, {}),
    "eagle3-all": ("eagle3", {"layers": [1, 3]}, {}),
    "eagle3-norms": ("eagle3", LAYERS | SOME, ALL_NORMS),
    "eagle3-fc_norm": ("eagle3", LAYERS, {"fc_norm": True}),
    "eagle3-qwen3": ("eagle3", LAYERS | SOME, {"qk_norm": True}),
    "eagle": ("eagle", {"noise": 0.0}, {}),
    "hass": ("hass", {"noise": 0.0}, {}),
    "parallel": ("parallel", LAYERS | SOME | {"blocks": 2}, {}),
    "parallel-all": ("parallel", {"layers": [1, 3]}, {"fc_norm": True, "norm_before_residual": True}),
    "parallel-qwen3": ("parallel", LAYERS | {"blocks": 2}, {"qk_norm": True}),
    "dflash": ("dflash", {"layers": [1, 2, 3], "blocks": 2} | SOME, {}),
    "dflash-all": ("dflash", {"layers": [1, 3], "blocks": 1}, {}),
}
"""Kind, what `init` of a recipe is asked for, and variants that it does not know."""
FOR_SPECULATORS = ("eagle3", "eagle3-norms", "eagle3-qwen3", "parallel", "parallel-all", "dflash", "dflash-all")
MODELS = ("student", "adapter", "tied")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="CSDRAFT_VLLM names no Python with vLLM"),
]


# What drafts.


@cache
def target() -> Any:
    """vLLM's attention on a CPU has no heads of fewer than 32 numbers."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return fresh("llama", num_hidden_layers=4, initializer_range=0.2, **sizes)


@cache
def texts() -> Tensor:
    """(rows, length) prompts, and what the target writes after them."""
    torch.manual_seed(0)
    return written(torch.randint(3, VOCAB, (4, PROMPT)))


def written(ids: Tensor, **options: Any) -> Tensor:
    how = {"do_sample": False, "eos_token_id": None, "max_new_tokens": TOKENS} | options
    return target().generate(ids, attention_mask=torch.ones_like(ids), **how)


def learned(student: Any, steps: int) -> Any:
    """A student that has learned to draft some of `texts()`."""
    step, ids = Distillation(student, target(), OBJECTIVE).train(), texts()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 0.01)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for _ in range(steps):
        optimizer.zero_grad()
        step(input_ids=ids, position_ids=positions, labels=ids, total=float(ids.numel())).backward()
        optimizer.step()
    return student.eval()


def head(kind: str, options: dict[str, Any], flags: dict[str, bool]) -> Any:
    torch.manual_seed(0)
    counts = texts().flatten().bincount(minlength=VOCAB)
    made: Any = make_student(target(), init={kind: {"steps": DEPTH} | options}, counts=lambda: counts)
    if flags:
        plain, made = made, type(made)(made.config, replace(made.options, **flags))
        made.load_state_dict(plain.state_dict(), strict=False)
        made.lent, made.base, made.stored_by = plain.lent, plain.base, plain.stored_by
        frozen = {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}
        for name in frozen:
            made.get_parameter(name).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:  # a bug must not hide behind a one
                parameter.add_(0.2 * torch.randn_like(parameter))
    return learned(made, 150 if kind == "dflash" else 40)


def model(name: str, folder: Path) -> nn.Module:
    """A whole model that drafts: with the target's sizes, an adapter on one, or tied to the target."""
    student = noisy(target(), 0.08)
    if name == "adapter":
        student.save_pretrained(folder / "base")
        made = make_student(target(), str(folder / "base"), peft={"r": 4, "lora_alpha": 8})
        torch.manual_seed(0)
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if "lora_B" in key:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return made
    if name == "tied":
        made = make_student(target(), init={"from_target": {"layers": [0, 1, 3], "tie_to_target": True}})
        return learned(made, 40)
    return student


# What is asked, and what is found.


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("target")
    target().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def ours(drafter: str, early: bool) -> list[list[int]]:
    """The tokens that each round of csdraft adds to each text.

    Args:
        early: whether the drafter drafts beside the prompt, as whole models do in csdraft and not in vLLM. It starts
            one token later then, after a round of one token as in vLLM.
    """
    rounds = []
    for row in texts():
        chain: Any = ModelDrafter(drafter, depth=DEPTH)
        how = {"assistant": chain, "schedule": "fixed", "max_new_tokens": TOKENS - early}
        assert torch.equal(written(row[None, : PROMPT + early], **how)[0], row)
        rounds.append([1] * early + chain.last_report.lengths[0])
    return rounds


def theirs(command: str, folder: Path) -> list[list[int]]:
    """The tokens that each step of vLLM adds to each text, if it is started as a printed command starts it."""
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    drafter = json.loads(words[4]) if len(words) > 3 else None
    asked = {"model": words[2], "drafter": drafter, "prompts": texts()[:, :PROMPT].tolist(), "tokens": TOKENS}
    (folder / "asked.json").write_text(json.dumps(asked | {"length": LENGTH}), encoding="utf-8")
    done = subprocess.run([PYTHON, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert [text["tokens"] for text in found] == texts()[:, PROMPT:].tolist()
    return [text["steps"] for text in found]


def kept(rounds: list[list[int]]) -> float:
    """Tokens a round, without the first, in which the prompt is read."""
    return sum(sum(row[1:]) for row in rounds) / sum(len(row) - 1 for row in rounds)


def test_it_writes_the_targets_text(verifier, tmp_path):
    assert theirs(f"vllm serve {verifier}", tmp_path) == [[1] * TOKENS] * len(texts())


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "vllm") for name in (*HEADS, *MODELS)),
        *((name, "speculators") for name in FOR_SPECULATORS),
    ],
)
def test_it_keeps_as_many_drafted_tokens(verifier, tmp_path, name, engine):
    stored, out = str(tmp_path / "stored"), str(tmp_path / "out")
    save_student(head(*HEADS[name]) if name in HEADS else model(name, tmp_path), stored)
    command = export_drafter(stored, out, engine, verifier, DEPTH)
    wanted, found = ours(stored, early=name in MODELS), theirs(command, tmp_path)
    print(f"{name}, {engine}: {kept(found):.3f} tokens a round in vLLM, {kept(wanted):.3f} in csdraft")
    assert kept(wanted) > 1.1
    assert found == wanted
