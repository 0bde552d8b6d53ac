"""A saved cascade drafts as the one in memory did, carries what it needs, and refuses what it was not made for."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import csdraft
from csdraft import cascade as cascade_module
from csdraft import hub, loading
from csdraft.decoding.states import cost_label
from csdraft.drafters.suffix import Suffix
from csdraft.reports.report import Report
from csdraft.schedules.stop_head import StopHead
from csdraft.tables.acceptance_head import AcceptanceHead
from csdraft.tables.bigram import BigramTable
from csdraft.tables.outputs import OutputTable
from csdraft.trees.best_first import BestFirst
from tests.tiny import fresh, noisy, prompt, tiny

K = [[3, 4, 4], [0, 2, 5], [0, 0, 6]]
SAMPLING = {"do_sample": True, "row_seeds": [5], "max_new_tokens": 24}


def small_cascade(**options) -> csdraft.CascadeDrafter:
    table = BigramTable.build([list(range(3, 90))], 97)
    medium, small = noisy(tiny("llama"), 0.1), noisy(tiny("llama"), 0.3)
    defaults = {"k_matrix": K, "lenience": [2.0, 3.0], "schedule": {"type": "fixed", "depth": 11}}
    return csdraft.CascadeDrafter([medium, small, csdraft.MaxGram(bigram=table)], **(defaults | options))


def tokenizer_of(*words: str) -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A cascade on disk, that has drafted before."""
    folder = tmp_path_factory.mktemp("saved") / "my-cascade"
    cascade = small_cascade()
    tiny("llama").generate(**prompt(), assistant=cascade, max_new_tokens=12)
    cascade.save_pretrained(folder, tokenizer=tokenizer_of("a", "b"))
    return folder


def edited(folder: Path, to: Path, **changes) -> Path:
    """A copy of a saved cascade with another document."""
    document = json.loads((folder / hub.DOCUMENT).read_text()) | changes
    to.mkdir()
    shutil.copytree(folder / "models", to / "models")
    shutil.copytree(folder / "tables", to / "tables")
    (to / hub.DOCUMENT).write_text(json.dumps(document))
    return to


def test_round_trip(saved):
    """Options, tokens and every drafter's part in them: greedy and sampling."""
    target, first = tiny("llama"), small_cascade()
    second = csdraft.CascadeDrafter.from_pretrained(saved, target=target, tokenizer=tokenizer_of("a", "b"))
    assert (second.k_matrix, second.lenience) == (first.k_matrix, first.lenience)
    assert (second.verifier, second.schedule) == (first.verifier, first.schedule)
    assert second.drafters[2] == first.drafters[2]
    for options in ({"max_new_tokens": 24}, SAMPLING):
        texts = [target.generate(**prompt(), assistant=cascade, **options).tolist() for cascade in (first, second)]
        assert texts[0] == texts[1]
        assert first.last_report.lengths == second.last_report.lengths
        assert first.last_report.levels == second.last_report.levels


def test_a_saved_cascade_has_these_files_and_no_others(saved):
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert files == {
        "cascade.json",
        "provenance.json",
        "README.md",
        "custom_generate/generate.py",
        "tables/bigram.safetensors",
        *(
            f"models/LlamaForCausalLM{number}/{name}"
            for number in ("", "-2")
            for name in ("config.json", "generation_config.json", "model.safetensors")
        ),
    }
    document = json.loads((saved / "cascade.json").read_text())
    assert document["format"] == 1
    assert document["csdraft"] == csdraft.__version__
    assert document["target"]["name"] == "LlamaForCausalLM"
    assert document["target"]["vocab_size"] == 97
    assert document["target"]["tokenizer"].startswith("sha256:")
    assert document["models"]["LlamaForCausalLM-2"] == {"folder": "models/LlamaForCausalLM-2"}
    assert [drafter["type"] for drafter in document["drafters"]] == ["model", "model", "max_gram"]
    assert document["k_matrix"] == K
    assert document["verifier"] == {"type": "match"}


def test_model_card_and_provenance(saved):
    card, provenance = (saved / "README.md").read_text(), json.loads((saved / "provenance.json").read_text())
    assert card.startswith("---\nlibrary_name: csdraft\ntags:")
    assert "| 1 | 12 |" in card  # one call, 12 tokens
    assert provenance["measured"]["emitted"] == 12
    assert provenance["versions"]["torch"] == version("torch")
    assert provenance["models"]["LlamaForCausalLM"]["dtype"] == "float32"


def test_tables_of_drafters_and_schedules_come_along(tmp_path):
    """Trees, earlier outputs and a trained head: all in the folder, all back."""
    size = {"mean": 3, "scale": 3, "w1": (2, 3), "b1": 2, "w2": 2, "b2": ()}
    head = AcceptanceHead(**{name: np.full(shape, 0.5, np.float32) for name, shape in size.items()})
    outputs = OutputTable()
    outputs.add(list(range(3, 90)))
    drafters = [csdraft.ModelDrafter(noisy(tiny("llama"), 0.1), tree=BestFirst(2, 6)), Suffix(outputs=outputs)]
    cascade = csdraft.CascadeDrafter(drafters, [[2, 4], [0, 0]], schedule=StopHead(head, threshold=0.6))
    cascade.save_pretrained(tmp_path)
    again = csdraft.CascadeDrafter.from_pretrained(tmp_path, target=tiny("llama"))
    assert again.schedule == cascade.schedule
    assert again.drafters[0].tree == BestFirst(2, 6)
    assert again.drafters[1].outputs.outputs == outputs.outputs
    texts = [
        tiny("llama").generate(**prompt(), assistant=each, max_new_tokens=12).tolist() for each in (cascade, again)
    ]
    assert texts[0] == texts[1]


def test_nothing_measured_no_table(tmp_path):
    csdraft.CascadeDrafter([csdraft.MaxGram()]).save_pretrained(tmp_path / "c")
    card = (tmp_path / "c" / "README.md").read_text()
    assert "Measured" not in card
    assert json.loads((tmp_path / "c" / hub.DOCUMENT).read_text())["target"]["vocab_size"] is None
    assert not (tmp_path / "c" / "models").exists()
    assert csdraft.CascadeDrafter.from_pretrained(tmp_path / "c", target=tiny("llama")).drafters == (
        csdraft.MaxGram(),
    )


def test_no_path_of_this_machine_is_written(tmp_path):
    """A path says nothing elsewhere, and may say too much."""
    noisy(tiny("llama")).save_pretrained(tmp_path / "small")
    tiny("llama").save_pretrained(tmp_path / "big")
    target = type(tiny("llama")).from_pretrained(tmp_path / "big")
    cascade = csdraft.CascadeDrafter([str(tmp_path / "small"), csdraft.MaxGram()])
    cascade.save_pretrained(tmp_path / "c", target=target)
    assert json.loads((tmp_path / "c" / hub.DOCUMENT).read_text())["target"]["name"] == "big"
    assert (tmp_path / "c" / "models" / "small").is_dir()
    for path in (tmp_path / "c").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_saving_over_what_was_loaded(tmp_path):
    """The weights may still be mapped from the files that are replaced; what is no longer used goes."""
    folder, target = tmp_path / "c", tiny("llama")
    small_cascade().save_pretrained(folder)
    loaded = csdraft.CascadeDrafter.from_pretrained(folder, target=target)
    before = target.generate(**prompt(), assistant=loaded, max_new_tokens=12)
    loaded.save_pretrained(folder)
    again = csdraft.CascadeDrafter.from_pretrained(folder, target=target)
    assert target.generate(**prompt(), assistant=again, max_new_tokens=12).tolist() == before.tolist()
    assert again.last_report.levels == loaded.last_report.levels
    csdraft.CascadeDrafter([csdraft.MaxGram()]).save_pretrained(folder)
    assert not (folder / "models").exists()
    assert not list(folder.glob(".saving-*"))


def test_a_model_card_edited_by_hand_stays(tmp_path):
    cascade = csdraft.CascadeDrafter([csdraft.MaxGram()])
    cascade.save_pretrained(tmp_path / "c")
    (tmp_path / "c" / "README.md").write_bytes(b"mine, \xff")
    cascade.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "README.md").read_bytes() == b"mine, \xff"


def test_a_failed_save_leaves_the_earlier_one(tmp_path):
    folder = tmp_path / "c"
    csdraft.CascadeDrafter([csdraft.MaxGram(7)]).save_pretrained(folder)
    unsaved = noisy(tiny("llama"))
    unsaved.save_pretrained = lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        csdraft.CascadeDrafter([unsaved]).save_pretrained(folder)
    assert csdraft.CascadeDrafter.from_pretrained(folder).drafters == (csdraft.MaxGram(7),)
    assert not list(folder.glob(".saving-*"))


def test_saving_replaces_no_strangers_folder(tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=r"not a saved cascade, but has \['models'\].*give a new folder"):
        csdraft.CascadeDrafter([csdraft.MaxGram()]).save_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        csdraft.CascadeDrafter([csdraft.MaxGram()]).save_pretrained(tmp_path / "file")


def test_a_model_used_twice_is_one(tmp_path):
    small = noisy(tiny("llama"))
    nest = csdraft.Vertical(small, csdraft.MaxGram())
    csdraft.CascadeDrafter([nest, small], [4, 4]).save_pretrained(tmp_path / "c")
    loaded = csdraft.CascadeDrafter.from_pretrained(tmp_path / "c")
    assert len(list((tmp_path / "c" / "models").iterdir())) == 1
    assert loaded.drafters[0].reviewer is loaded.drafters[1].model


def test_the_target_as_drafter_is_written_down_not_saved(tmp_path):
    target = tiny("llama")
    csdraft.CascadeDrafter([target, csdraft.MaxGram()], [[3, 4], [0, 5]]).save_pretrained(
        tmp_path / "c", target=target
    )
    document = json.loads((tmp_path / "c" / hub.DOCUMENT).read_text())
    assert document["models"] == {"LlamaForCausalLM": {"target": True}}
    assert not (tmp_path / "c" / "models").exists()
    assert csdraft.CascadeDrafter.from_pretrained(tmp_path / "c", target=target).models() == [target]
    with pytest.raises(ValueError, match="is the target itself: pass target="):
        csdraft.CascadeDrafter.from_pretrained(tmp_path / "c")


# What a cascade was not made for.


def test_another_vocabulary_is_refused(saved):
    other = fresh("llama", vocab_size=120)
    with pytest.raises(ValueError, match=r"has 120 tokens, the cascade was saved for LlamaForCausalLM with 97"):
        csdraft.CascadeDrafter.from_pretrained(saved, target=other)
    with pytest.raises(ValueError, match=r"has 120 tokens"):
        other.generate(**prompt(), assistant=str(saved), max_new_tokens=4)


def test_padding_rows_may_differ_if_the_tokenizer_is_known_to_be_the_same(saved):
    other = fresh("llama", vocab_size=120)
    loaded = csdraft.CascadeDrafter.from_pretrained(saved, target=other, tokenizer=tokenizer_of("a", "b"))
    expected = other.generate(**prompt(), max_new_tokens=8)
    assert other.generate(**prompt(), assistant=loaded, max_new_tokens=8).tolist() == expected.tolist()


def test_another_tokenizer_is_refused(saved):
    prints = [hub.fingerprint(tokenizer_of(*words)) for words in (("b", "a"), ("a", "b"))]
    with pytest.raises(ValueError, match=f"{prints[0]}.*{prints[1]}"):
        csdraft.CascadeDrafter.from_pretrained(saved, tokenizer=tokenizer_of("b", "a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "csdraft": "9.0"}, r"format 2, written by csdraft 9.0; .* up to 1: pip install -U csdraft"),
        ({"format": "1"}, r"format '1', expected 1"),
        ({"lenince": 2}, r"no option 'lenince': did you mean 'lenience'"),
        ({"models": {"LlamaForCausalLM": {"folder": "../x"}}}, r"outside the cascade"),
        ({"models": {"LlamaForCausalLM": {"folder": "/models/x"}}}, r"outside the cascade"),
        ({"models": {"LlamaForCausalLM": "models/x"}}, r"give a folder, a Hub id"),
        ({"models": {"LlamaForCausalLM": {"folder": "a", "id": "b"}}}, r"give a folder, a Hub id"),
        ({"models": {}}, r"cascade.json: drafters\[0\].model names 'LlamaForCausalLM', which does not exist"),
        ({"drafters": [{"type": "max_gran"}]}, r"did you mean 'max_gram'"),
        ({"target": {"vocab": 3}}, r"no option 'vocab': did you mean 'vocab_size'"),
    ],
)
def test_documents_that_are_refused(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        csdraft.CascadeDrafter.from_pretrained(edited(saved, tmp_path / "c", **changes))


def test_a_folder_that_is_no_cascade_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no cascade.json: give a folder"):
        csdraft.CascadeDrafter.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'no-such-cascade' has no cascade.json"):
        csdraft.CascadeDrafter.from_pretrained("no-such-cascade")


# Other ways in.


def test_assistant_as_a_path_is_loaded_once(saved, monkeypatch):
    target = tiny("llama")
    expected = target.generate(**prompt(), max_new_tokens=12)
    loads = []
    monkeypatch.setattr(cascade_module, "_LAST", [])
    monkeypatch.setattr(loading, "load_model", lambda path, **o: loads.append(path) or noisy(target))
    for _ in range(2):
        output = target.generate(**prompt(), assistant=str(saved), max_new_tokens=12)
        assert output.tolist() == expected.tolist()
    assert len(loads) == 2  # the cascade's two models, once
    os.utime(saved / hub.DOCUMENT)
    target.generate(**prompt(), assistant=saved, max_new_tokens=4)
    assert len(loads) == 4  # the files have changed


def test_assistant_as_the_path_of_a_model(tmp_path):
    target = tiny("llama")
    noisy(target).save_pretrained(tmp_path / "small")
    output = target.generate(**prompt(), assistant=str(tmp_path / "small"), max_new_tokens=12)
    assert output.tolist() == target.generate(**prompt(), max_new_tokens=12).tolist()


def test_load_options_reach_the_models(saved):
    loaded = csdraft.CascadeDrafter.from_pretrained(saved, dtype=torch.bfloat16)
    assert [model.dtype for model in loaded.models()] == [torch.bfloat16] * 2


def test_a_cascade_for_an_encoder_decoder_comes_back(tmp_path):
    target = tiny("t5")
    cascade = csdraft.CascadeDrafter([noisy(target), csdraft.MaxGram()], [3, 4])
    cascade.save_pretrained(tmp_path / "c", target=target)
    loaded = csdraft.CascadeDrafter.from_pretrained(tmp_path / "c", target=target)
    expected = target.generate(**prompt(), max_new_tokens=12)
    assert target.generate(**prompt(), assistant=loaded, max_new_tokens=12).tolist() == expected.tolist()
    assert type(loaded.models()[0]) is type(target)


def test_models_that_are_hub_ids_are_asked_of_the_hub(saved, tmp_path, monkeypatch):
    """The cascade's own repository, and models that are named by id and revision."""
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **o: asked.append((repo, file, o)))
    models = {name: {"id": "me/small", "revision": "abc"} for name in ("LlamaForCausalLM", "LlamaForCausalLM-2")}
    folder = edited(saved, tmp_path / "snapshot", models=models)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **o: str(folder))
    monkeypatch.setattr(loading, "load_model", lambda path, **o: asked.append((path, o)) or noisy(tiny("llama")))
    csdraft.CascadeDrafter.from_pretrained("me/my-cascade", revision="v2", dtype="auto")
    assert asked[0] == ("me/my-cascade", hub.DOCUMENT, {"revision": "v2"})
    assert asked[1:] == [("me/small", {"dtype": "auto", "local_base": False, "revision": "abc"})] * 2


def test_what_comes_from_the_hub_is_pinned_to_its_own_revision(tmp_path, monkeypatch):
    """Not to that of main, which may have gone on since."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(tmp_path / "main" / file))
    target, small = noisy(tiny("llama")), noisy(tiny("llama"))
    for model, name, revision in ((target, "me/large", "a" * 40), (small, "me/small", "b" * 40)):
        model.config = copy.deepcopy(model.config)
        model.config._name_or_path, model.config._commit_hash = name, revision
    csdraft.CascadeDrafter([small]).save_pretrained(tmp_path / "c", target=target, copy_models=False)
    document = json.loads((tmp_path / "c" / hub.DOCUMENT).read_text())
    assert document["models"] == {"small": {"id": "me/small", "revision": "b" * 40}}
    assert (document["target"]["name"], document["target"]["revision"]) == ("me/large", "a" * 40)
    origin = json.loads((tmp_path / "c" / "provenance.json").read_text())
    assert origin["models"]["small"]["revision"] == "b" * 40


def test_models_of_the_hub_by_id(tmp_path, monkeypatch):
    """Pinned to the revision that this machine's cache holds; a model that is not from there is copied."""
    cached = lambda repo, file: str(tmp_path / "snapshots" / "abc" / file) if repo == "me/medium" else None  # noqa: E731
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    medium, small = noisy(tiny("llama")), noisy(tiny("llama"))
    medium.config._name_or_path, small.config._name_or_path = "me/medium", "out/small"
    csdraft.CascadeDrafter([medium, small]).save_pretrained(tmp_path / "c", copy_models=False)
    document = json.loads((tmp_path / "c" / hub.DOCUMENT).read_text())
    assert document["models"] == {
        "medium": {"id": "me/medium", "revision": "abc"},
        "small": {"folder": "models/small"},
    }


# PEFT.


def adapted(base: Path, **more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = type(tiny("llama")).from_pretrained(base)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | more)
    return peft.get_peft_model(model, config).eval()


def test_an_adapter_is_saved_without_its_base_and_comes_back(tmp_path):
    """A PEFT folder without its base, as PEFT itself would write it."""
    target = tiny("llama")
    noisy(target).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    first = csdraft.CascadeDrafter([model, csdraft.MaxGram()], [3, 4], schedule="fixed")
    with pytest.warns(UserWarning, match=r"needs its base .* which is not saved"):
        first.save_pretrained(tmp_path / "c")
    files = {path.name for path in (tmp_path / "c" / "models").rglob("*") if path.is_file()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ValueError, match=r"adapter_config.json.*base_model_name_or_path.*local_bases=True"):
        target.generate(**prompt(), assistant=str(tmp_path / "c"), max_new_tokens=4)
    second = csdraft.CascadeDrafter.from_pretrained(tmp_path / "c", target=target, local_bases=True)
    inputs = prompt()
    logits = [cascade.models()[0](**inputs).logits for cascade in (first, second)]
    assert torch.equal(*logits)
    assert not torch.allclose(logits[0], noisy(target)(**inputs).logits)
    target.generate(**inputs, assistant=second, max_new_tokens=12)
    with pytest.warns(UserWarning, match="needs its base"):
        second.save_pretrained(tmp_path / "again")  # a model that transformers itself gave the adapter
    third = csdraft.CascadeDrafter.from_pretrained(tmp_path / "again", local_bases=True)
    assert torch.equal(third.models()[0](**inputs).logits, logits[0])


@pytest.mark.filterwarnings("ignore:adapter 'default' needs its base")
def test_an_adapter_on_the_embedding_takes_no_copy_of_it_along(tmp_path):
    noisy(tiny("llama")).save_pretrained(tmp_path / "base")
    first = csdraft.CascadeDrafter([adapted(tmp_path / "base", target_modules=["q_proj", "embed_tokens"])], 3)
    first.save_pretrained(tmp_path / "c")
    (file,) = (tmp_path / "c" / "models").rglob("adapter_model.safetensors")
    assert all("lora_" in name for name in load_file(file))
    second = csdraft.CascadeDrafter.from_pretrained(tmp_path / "c", local_bases=True)
    assert torch.equal(*(cascade.models()[0](**prompt()).logits for cascade in (first, second)))


def test_adapters_that_are_refused(tmp_path):
    noisy(tiny("llama")).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(ValueError, match=r"adapters \['default', 'second'\].*merge_and_unload"):
        csdraft.CascadeDrafter([model]).save_pretrained(tmp_path / "c")
    model = adapted(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = None
    model.get_base_model().config._name_or_path = ""
    with pytest.raises(ValueError, match=r"base of adapter 'default' has no path or Hub id"):
        csdraft.CascadeDrafter([model]).save_pretrained(tmp_path / "c")


def test_a_merged_adapter_is_an_ordinary_model(tmp_path):
    noisy(tiny("llama")).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base").merge_and_unload()
    csdraft.CascadeDrafter([model]).save_pretrained(tmp_path / "c")
    loaded = csdraft.CascadeDrafter.from_pretrained(tmp_path / "c")
    assert torch.equal(loaded.models()[0](**prompt()).logits, model(**prompt()).logits)


# The shim.

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids, folder = torch.arange(3, 23)[None], sys.argv[2]
plain = model.generate(ids, max_new_tokens=16)
assert "csdraft" not in sys.modules
options = {"custom_generate": folder, "trust_remote_code": True, "max_new_tokens": 16}
class Streamer:
    def put(self, value): self.tokens.extend(value.flatten().tolist())
    def end(self): self.ended = True
streamer = Streamer()
streamer.tokens = []
drafted = model.generate(ids, assistant=folder, streamer=streamer, **options)
assert drafted.tolist() == plain.tolist() == [streamer.tokens] and streamer.ended
assert "csdraft" in sys.modules
sys.modules["csdraft"].install()
assert model.generate(ids, assistant=folder, **options).tolist() == plain.tolist()
try:
    model.generate(ids, **options)
except ValueError as error:
    assert "pass this repository" in str(error)
else:
    raise AssertionError("no assistant, no error")
"""


@pytest.mark.slow
def test_the_shim_runs_under_plain_transformers(saved, tmp_path):
    """Offline, streamer included, in a process that has not imported csdraft, nor lets it patch; then patched too."""
    tiny("llama").save_pretrained(tmp_path / "target")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "CSDRAFT_NO_PATCH": "1"}
    environment["PYTHONPATH"] = str(Path(csdraft.__file__).parent.parent)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "target"), str(saved)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_shim_says_what_to_install(saved):
    code = (saved / "custom_generate" / "generate.py").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "csdraft.hook", None)
        with pytest.raises(ImportError, match="pip install -U csdraft"):
            exec(compile(code, "generate.py", "exec"), {})


def test_costs_come_along_by_target_and_device(tmp_path):
    """What was measured is where a cascade starts from that is loaded on the same device."""
    cascade, target = csdraft.CascadeDrafter([csdraft.MaxGram()]), tiny("llama")
    target.generate(**prompt(), assistant=cascade, max_new_tokens=24, min_new_tokens=24)
    cascade.save_pretrained(tmp_path / "one", target=target)
    again = csdraft.CascadeDrafter.from_pretrained(tmp_path / "one", target=target)
    ((at, table),) = again.memory.saved.items()
    assert at == cost_label(target) != cost_label(fresh("llama", num_hidden_layers=3)), "a namesake has its own costs"
    assert any(rows == 1 and width == 1 for rows, _, width, _ in table)
    again.memory.saved["elsewhere"] = [(1, 9, 1, 0.5)]
    again.save_pretrained(tmp_path / "two", target=target)
    assert csdraft.CascadeDrafter.from_pretrained(tmp_path / "two").memory.saved["elsewhere"] == [(1, 9, 1, 0.5)]
    target.generate(**prompt(), assistant=again, max_new_tokens=8)
    ((_, _, learned),) = again.memory.entries()
    assert learned.costs.groups[1, 9].count(1) >= 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[1, 9, 1, "fast"]], r"tables/costs.json: costs\.x\[0\]\[3\]="),
        ([[1, 9, 1, -1.0]], r"tables/costs.json: costs\.x\[0\]="),
        ([[1, 9, 1, 1e9]], r"seconds from 0 to 3600"),
        ([[1, 9, 0, 1.0]], r"costs\.x\[0\]="),
        ([[1 << 40, 9, 1, 1.0]], r"costs\.x\[0\]="),
        ([[1, 9, 1]], r"costs\.x\[0\]="),
        ([[True, 9, 1, 1.0]], r"costs\.x\[0\]\[0\]="),
        ([[1, 9, 1, 0.5]] * 10_001, "at most 10000"),
        (None, r"costs\.x=None"),
        (float("nan"), "not a finite number"),
    ],
)
def test_a_strangers_costs_are_checked(tmp_path, table, message):
    csdraft.CascadeDrafter([csdraft.MaxGram()]).save_pretrained(tmp_path)
    path = tmp_path / "tables" / "costs.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": 1, "costs": {"x": table}}))
    with pytest.raises(ValueError, match=message):
        csdraft.CascadeDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("document", [[], {"format": 2, "costs": {}}, {"format": 1}, {"format": 1, "cost": {}}])
def test_a_costs_table_of_another_kind_is_refused(tmp_path, document):
    csdraft.CascadeDrafter([csdraft.MaxGram()]).save_pretrained(tmp_path)
    (tmp_path / "tables").mkdir(exist_ok=True)
    (tmp_path / "tables" / "costs.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"tables/costs\.json"):
        csdraft.CascadeDrafter.from_pretrained(tmp_path)


def test_a_report_says_why(tmp_path):
    cascade = csdraft.CascadeDrafter([csdraft.MaxGram()])
    tiny("llama").generate(**prompt(), assistant=cascade, max_new_tokens=48, min_new_tokens=48)
    assert " pay: " in cascade.report.why or "drafting does not pay: " in cascade.report.why
    assert cascade.report.why in " ".join(str(cascade.report).split())  # it may take two lines
    cascade.report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").why == cascade.report.why
