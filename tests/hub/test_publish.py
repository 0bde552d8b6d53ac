"""What the Hub would receive, byte for byte, from a stand-in of its HTTP API in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import csdraft
from csdraft.hub import command, upload
from csdraft.trainers.arguments import read_values
from csdraft.trainers.publish import card, provenance
from csdraft.trainers.run import distill
from csdraft.trainers.students import added_share, make_student
from tests import forked
from tests.hub.standin import Hub, standin
from tests.tiny import on_target
from tests.trainers.pair import arguments, make_pair, settings

ROOT = Path(__file__).parents[2]

UPLOADS = """
import importlib, json, sys
import huggingface_hub
importlib.reload(huggingface_hub.constants)  # what they say of the Hub, this process was forked with
huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
import csdraft
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.run import distill
from csdraft.hub import upload
folder = sys.argv[1]
for name in ("first", "second"):
    upload(Path(folder, name), "me/new", revision="v2")
target = AutoModelForCausalLM.from_pretrained(f"{folder}/target")
cascade = csdraft.CascadeDrafter([f"{folder}/student", csdraft.MaxGram()], k_matrix=[[2, 4], [0, 2]])
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/target")
cascade.save_pretrained(f"{folder}/cascade", tokenizer=tokenizer, target=target)
print(cascade.push_to_hub("me/cascade", tokenizer=tokenizer, target=target))
distill(DistillArguments(**json.loads(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def hub() -> Hub:
    with standin() as running:
        yield running


def program(hub: Hub, *command: str) -> str:
    """What a script says that runs in a process of its own, with the stand-in as the Hub."""
    environment = {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    status, said = forked.run(command, environment=environment)
    assert status == 0, said
    return said


@pytest.fixture(scope="module")
def said(folder: Path, hub: Hub) -> str:
    """What the program says that uploads a cascade, two folders to a branch, and a drafter once it is trained."""
    for name in ("first", "second"):
        (folder / name).mkdir()
        (folder / name / f"{name}.txt").write_text(name)
    options = settings(
        folder, "pushed", max_steps=2, hub_model_id="me/drafter", push_to_hub=True,
        eval_prompts=f"{folder}/prompts.jsonl", eval_on_start=True, eval_strategy="steps",
        eval_steps=2, eval_new_tokens=8,
    )  # fmt: skip
    (folder / "uploads.py").write_text(UPLOADS)
    return program(hub, str(folder / "uploads.py"), str(folder), json.dumps(options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_cascade_is_uploaded_as_it_is_saved(folder, hub, said):
    assert "/me/cascade/commit/" in said
    sent, saved = hub.repos["me/cascade"], contents(folder / "cascade")
    sent.pop(".gitattributes", None)
    assert sent.keys() == saved.keys() >= {"cascade.json", "README.md", "custom_generate/generate.py"}
    changing = {"provenance.json", "README.md"}  # the time, and the folder's name
    assert all(sent[name] == saved[name] for name in sent.keys() - changing)
    assert set(hub.tokens) == {"Bearer hf_test"}
    assert 'assistant="me/cascade"' in sent["README.md"].decode()  # what a reader of the Hub copies must load
    assert 'assistant="cascade"' in saved["README.md"].decode()


@pytest.mark.usefixtures("said")
def test_a_branch_is_made_for_the_upload(hub):
    """Of a repository that is new, and of one that has it."""
    assert all(hub.repos["me/new@v2"][f"{name}.txt"] == name.encode() for name in ("first", "second"))
    assert not {"first.txt", "second.txt"} & hub.repos["me/new"].keys()


@pytest.mark.parametrize("name", ["user/", "/name", "user/name/more", "", "user/a name"])
def test_what_is_no_hub_id(name, tmp_path):
    with pytest.raises(ValueError, match="give 'user/name'"):
        upload(tmp_path, name)


@pytest.mark.usefixtures("said")
def test_a_drafter_is_uploaded_with_its_card(folder, hub):
    sent, saved = hub.repos["me/drafter"], contents(folder / "pushed")
    sent.pop(".gitattributes", None)
    assert sent == {
        name: content for name, content in saved.items() if not name.startswith(("checkpoint-", "finished"))
    }
    text, origin = sent["README.md"].decode(), json.loads(sent["provenance.json"])
    assert "speculative-decoding" in text
    assert re.search(r"\| block efficiency, greedy \|( \d\.\d\d \[\d\.\d\d, \d\.\d\d\] \|){2}\n", text)
    assert "On 6 held-out prompts, chains of 5" in text
    assert "Licence: not known." in text
    assert "before" in text
    assert 'assistant="me/drafter"' in text
    assert origin["steps"] == 2
    assert (origin["data"]["name"], origin["data"]["revision"]) == ("texts.jsonl", None)
    assert origin["data"]["rows"] > 64  # long texts are several
    assert origin["versions"]["torch"] == version("torch")
    assert str(folder) not in text + json.dumps(origin)
    assert "model.safetensors" in sent
    assert "tokenizer.json" in sent
    sizes = [AutoModelForCausalLM.from_pretrained(folder / name).num_parameters() for name in ("pushed", "target")]
    assert origin["added_parameters"] == sizes[0] / sizes[1]
    assert f"adds {100 * sizes[0] / sizes[1]:.2f} % of the target's parameters" in text


def test_a_cascade_says_on_what_its_drafters_were_trained(folder):
    trainer = distill(arguments(folder, "told", max_steps=1, save_strategy="no"))
    cascade = csdraft.CascadeDrafter([str(folder / "told")])
    cascade.save_pretrained(folder / "told-cascade", target=trainer.target)
    told = json.loads((folder / "told-cascade/provenance.json").read_text())
    trained = told["models"]["told"]["trained"]
    assert trained == {key: provenance(trainer)[key] for key in ("command", "target", "data", "steps")}
    assert trained["target"] == {"name": "target", "revision": None}
    assert trained["data"]["tokens"] > 1000
    assert told["command"].startswith(Path(sys.argv[0]).name)
    assert str(folder) not in json.dumps(told)


@pytest.mark.slow
def test_data_is_told_apart_by_its_rows(folder):
    """Equal rows have an equal checksum, whatever they are called; others have not."""
    found = []
    (folder / "copy.jsonl").write_text((folder / "texts.jsonl").read_text())
    for name, limit in (("texts", None), ("copy", None), ("texts", 63)):
        args = arguments(folder, "rows", dataset=f"{folder}/{name}.jsonl", dataset_limit=limit, max_steps=1)
        found.append(provenance(distill(args))["data"])
        shutil.rmtree(folder / "rows")
    assert found[0]["checksum"] == found[1]["checksum"] != found[2]["checksum"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hub_token=hf_abc", "--hf-token", "hf_abc", "max_new_tokens=5"], "run.py max_new_tokens=5"),
        (["tokenizer=me/small", "x=hf_abcdef"], "run.py tokenizer=me/small x=hf_..."),
        (
            ["target=/home/me/large", "drafters=[/home/me/small, max_gram]"],
            "run.py target=large drafters=[small, max_gram]",
        ),
        (
            ["dataset=me/chats:en@abc", "output_dir=out/x", "~/models/small"],
            "run.py dataset=me/chats:en@abc output_dir=out/x small",
        ),
    ],
)
def test_a_command_is_told_without_secrets_and_folders(words, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/run.py", *words])
    assert command() == told


def test_a_self_drafter_says_how_little_it_adds(folder):
    """Trained, the card has the figure; with the bundled recipe it is below 2 % of the target."""
    peft = {"r": 1, "target_modules": ["q_proj"]}
    args = arguments(folder, "own", student=None, init=on_target([0, 1]), peft=peft, max_steps=1, save_strategy="no")
    trainer = distill(args)
    lora = sum(p.numel() for name, p in trainer.student.named_parameters() if "lora_" in name)
    share = lora / trainer.target.num_parameters()
    assert f"It adds {100 * share:.2f} % of the target's parameters" in (folder / "own" / "README.md").read_text()
    target = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "smol-target")
    recipe = read_values(str(ROOT / "recipes/smol/self_draft.yaml"), [])
    assert 0.005 < added_share(make_student(target, init=recipe["init"], peft=recipe["peft"]), target) < 0.02


def test_a_card_names_licence_and_base_models(folder, hub):
    """The target's licence, unless another is given; ids of the Hub are base models, folders are not."""
    (folder / "target/README.md").write_text("---\nlicense: other\nlicense_name: a-licence\nlicense_link: L\n---\n")
    try:
        trainer = distill(arguments(folder, "licensed", max_steps=1, save_strategy="no"))
        text = (folder / "licensed/README.md").read_text()
        assert text.startswith(
            "---\nlibrary_name: transformers\nlicense: other\nlicense_name: a-licence\nlicense_link: L\n"
        )
        assert "Licence: a-licence, that of target." in text
        assert "base_model" not in text
        args = {"license": "mit", "resume_from_checkpoint": False, "max_steps": 1, "save_strategy": "no"}
        distill(arguments(folder, "licensed", **args))
    finally:
        (folder / "target/README.md").unlink()
    text = (folder / "licensed/README.md").read_text()
    assert "\nlicense: mit\n" in text
    assert "Licence: mit, as given by its author." in text
    origin = provenance(trainer)
    origin["target"]["name"], origin["arguments"]["student"] = "me/large", "me/small"
    assert "\nbase_model:\n- me/large\n- me/small\ntags:\n" in card("drafter", origin)


@pytest.mark.slow
def test_the_interval_is_that_of_a_bootstrap_over_prompts(folder):
    trainer = distill(arguments(folder, "interval", max_steps=1, save_strategy="no", eval_new_tokens=12,
                                eval_prompts=f"{folder}/prompts.jsonl", per_device_eval_batch_size=4))  # fmt: skip
    figures = trainer.evaluate()
    evaluation = trainer.evaluation
    found = evaluation.block_efficiencies(evaluation.run(trainer.target, trainer.student), "greedy")
    assert figures["eval_prompts"] == len(found) == 6
    assert min(found) <= figures["eval_block_efficiency_low"] <= figures["eval_block_efficiency"]
    assert figures["eval_block_efficiency"] <= figures["eval_block_efficiency_high"] <= max(found)
    evaluations = [dataclasses.replace(trainer.evaluation, _written={}) for _ in (0, 1)]
    parts = [
        evaluation.run(trainer.target, trainer.student, slice(rank, None, 2))
        for rank, evaluation in enumerate(evaluations)
    ]
    merged = {key: sum(part.get(key, 0) for part in parts) for key in parts[0].keys() | parts[1].keys()}
    assert trainer.evaluation.grade(merged) == pytest.approx({k[5:]: v for k, v in figures.items()}, rel=1e-6)
