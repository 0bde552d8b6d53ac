"""What the Hub would receive, byte for byte, from a stand-in of its HTTP API in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_standin import Hub, standin
from trainers.pair import make_pair, settings

ROOT = Path(__file__).parent.parent

CASCADE = """
import csdraft, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
target = AutoModelForCausalLM.from_pretrained(f"{folder}/target")
cascade = csdraft.CascadeDrafter([f"{folder}/student", csdraft.MaxGram()], k_matrix=[[2, 4], [0, 2]])
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/target")
cascade.save_pretrained(f"{folder}/cascade", tokenizer=tokenizer, target=target)
print(cascade.push_to_hub("me/cascade", tokenizer=tokenizer, target=target))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def hub() -> Hub:
    with standin() as running:
        yield running


def program(hub: Hub, *command: str) -> str:
    """Runs Python with the stand-in as the Hub; settings of the Hub are read when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_cascade_is_uploaded_as_it_is_saved(folder, hub):
    assert "/me/cascade/commit/" in program(hub, "-c", CASCADE, str(folder))
    sent, saved = hub.repos["me/cascade"], contents(folder / "cascade")
    sent.pop(".gitattributes", None)
    assert sent.keys() == saved.keys() >= {"cascade.json", "README.md", "custom_generate/generate.py"}
    changing = {"provenance.json", "README.md"}  # the time, and the folder's name
    assert all(sent[name] == saved[name] for name in sent.keys() - changing)
    assert set(hub.tokens) == {"Bearer hf_test"}


def test_a_drafter_is_uploaded_with_its_card(folder, hub):
    script = folder / "push.py"
    options = settings(
        folder, "pushed", max_steps=2, hub_model_id="me/drafter", eval_prompts=f"{folder}/prompts.jsonl",
        eval_on_start=True, eval_strategy="steps", eval_steps=2, eval_new_tokens=8,
    )  # fmt: skip
    script.write_text(
        "import json, sys\n"
        "from csdraft.trainers.distill import DistillArguments\n"
        "from csdraft.trainers.run import distill\n"
        f"trainer = distill(DistillArguments(**json.loads({json.dumps(json.dumps(options))})))\n"
        "print(trainer.push_to_hub())\n"
    )
    program(hub, str(script))
    sent, saved = hub.repos["me/drafter"], contents(folder / "pushed")
    sent.pop(".gitattributes", None)
    assert sent == {name: content for name, content in saved.items() if not name.startswith("checkpoint-")}
    card, origin = sent["README.md"].decode(), json.loads(sent["provenance.json"])
    assert "speculative-decoding" in card
    assert "| block efficiency, greedy |" in card
    assert "before" in card
    assert origin["steps"] == 2
    assert origin["versions"]["torch"] == torch.__version__
    assert str(folder) not in card + json.dumps(origin)
    assert "model.safetensors" in sent
    assert "tokenizer.json" in sent
