"""Saved cascades are input from strangers: each fault is one ValueError that names the file and the key."""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from csdraft import CascadeDrafter, Horizontal, MaxGram, ModelDrafter, Vertical, loading, spec
from csdraft.drafters.datastore import Datastore
from csdraft.drafters.n_grammys import NGrammys
from csdraft.drafters.reference import Reference
from csdraft.drafters.suffix import Suffix
from csdraft.drafters.token_recycling import TokenRecycling
from csdraft.drafters.translated import Translated
from csdraft.models import load_model
from csdraft.reports.report import Planned, Report
from csdraft.schedules.stop_head import StopHead
from csdraft.tables.acceptance_head import AcceptanceHead
from csdraft.tables.adjacency import AdjacencyTable
from csdraft.tables.bigram import BigramTable
from csdraft.tables.corpus import CorpusIndex
from csdraft.tables.documents import DocumentTable
from csdraft.tables.outputs import OutputTable
from csdraft.tables.successors import SuccessorTable
from csdraft.trainers.students import make_student, save_student
from csdraft.trees.best_first import BestFirst
from csdraft.trees.sequoia import Sequoia
from csdraft.verifiers.deferral import Deferral
from tests.tiny import fresh, noisy, on_target, prompt, tiny, tokenizer

TEXT = [3 + 7 * i % 90 for i in range(200)]


def everything() -> CascadeDrafter:
    """A cascade with models, trees, tables of all kinds, tokenizers, nests, a verifier and a schedule with options."""
    parts = {name: np.full(shape, 0.5, np.float32) for name, shape in
             {"mean": 3, "scale": 3, "w1": (2, 3), "b1": 2, "w2": 2, "b2": ()}.items()}  # fmt: skip
    outputs, adjacency = OutputTable(), AdjacencyTable(97)
    outputs.add(TEXT)
    adjacency.update(np.arange(97), np.tile(np.arange(8, dtype=np.int32), (97, 1)))
    small = noisy(tiny("llama"), 0.3)
    drafters = [
        ModelDrafter(noisy(tiny("llama"), 0.1), tree=BestFirst(2, 6)),
        ModelDrafter(small, tree=Sequoia(8, (0.6, 0.2))),
        Horizontal((Vertical(small, MaxGram(bigram=BigramTable.build([TEXT], 97)), 2.0, 3), Suffix(outputs=outputs)),
                   (3, 4)),
        Translated(Datastore(CorpusIndex.build([TEXT])), tokenizer(), tokenizer()),
        NGrammys(table=SuccessorTable(np.full((97, 2, 2), 5))),
        Reference([TEXT]),
        TokenRecycling(table=adjacency),
    ]  # fmt: skip
    row = [3, 2, 7, 4, 4, 4, 4]
    return CascadeDrafter(drafters, row, verifier=Deferral("chow", 0.2), schedule=StopHead(AcceptanceHead(**parts)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strangers") / "c"
    everything().save_pretrained(folder, target=tiny("llama"))
    return folder


# The document.


def document_of(folder: Path) -> Any:
    return json.loads((folder / "cascade.json").read_text())


Keys = tuple[Any, ...]


def places(value: Any, at: Keys = ()) -> Iterator[Keys]:
    """Every key of a document, at every depth."""
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield (*at, key)
        yield from places(inner, (*at, key))


DELETED = object()
EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["half", "all"])
"""Whether each key gets each value, or every second one, the other half for the next key."""
VALUES = [DELETED, None, [], {}, "x", -1, 10**9, 10**400, math.nan, True, [[[1]]]]


def changed(document: Any, at: Keys, value: Any) -> Any:
    twin = copy.deepcopy(document)
    *above, last = at
    inner = twin
    for key in above:
        inner = inner[key]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value
    return twin


def wrong_values(document: Any, every: bool) -> Iterator[tuple[Keys, Any]]:
    """Each key of a document with wrong values."""
    for number, at in enumerate(places(document)):
        for value in VALUES if every else VALUES[number % 2 :: 2]:
            yield at, value


def fault(folder: Path, key: Any) -> str | None:
    """What is wrong with how `folder` is refused; None if it loads, or is refused as it should be."""
    try:
        CascadeDrafter.from_pretrained(folder, target=tiny("llama"))
    except ValueError as error:
        named = "cascade.json" in str(error) and str(key) in str(error)
        return None if named else f"ValueError that does not name {key}: {error}"
    except Exception as error:  # all others are the fault that is looked for
        return f"{type(error).__name__}: {error}"
    return None


@EVERY
@pytest.mark.slow
def test_every_key_with_every_kind_of_wrong_value(saved, tmp_path, monkeypatch, every):
    """Either it works, or one ValueError names cascade.json and the key; neither another exception nor a hang."""
    shutil.copytree(saved, tmp_path / "c")
    small = noisy(tiny("llama"), 0.3)
    monkeypatch.setattr(loading, "load_model", lambda path, **options: small)
    loaded = Translated(MaxGram(), tokenizer(), tokenizer())
    monkeypatch.setattr("csdraft.drafters.translated.TokenizerView", lambda where, name="": loaded.own)
    for table in TABLES:
        monkeypatch.setattr(table, "load", functools.cache(table.load))
    for name in ("types", "get_type_hints"):  # which makes this test four times as fast
        monkeypatch.setattr(spec, name, functools.cache(getattr(spec, name)))
    document, file = document_of(saved), tmp_path / "c" / "cascade.json"
    document["models"] |= {"far": {"id": "me/small", "revision": "abc"}, "same": {"target": True}}
    wrong, tried = [], 0
    for at, value in wrong_values(document, every):
        if at[:1] == ("k_matrix",) and max(at[1:], default=0) > 1:  # all entries are alike
            continue
        key = next(key for key in reversed(at) if isinstance(key, str))
        file.write_text(json.dumps(changed(document, at, value)))
        tried += 1
        if found := fault(tmp_path / "c", key):
            wrong.append(f"{at} = {'deleted' if value is DELETED else repr(value)[:20]}: {found}")
    assert tried > 200
    assert not wrong, f"{len(wrong)} faults, such as\n" + "\n".join(wrong[:20])


BROKEN = {
    "empty": b"",
    "cut": b'{"format": 1, ',
    "binary": bytes(range(256)),
    "no object": b"[]",
    "a word": b'"x"',
    "two marks": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "deep": b"[" * 100_000,
    "twice": b'{"format": 1, "format": 1}',
    "digits": b'{"format": ' + b"1" * 5000 + b"}",
    "utf-16": '{"format": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_json_object(saved, tmp_path, how):
    (tmp_path / "cascade.json").write_bytes(BROKEN[how])
    with pytest.raises(ValueError, match=r"^cascade\.json"):
        CascadeDrafter.from_pretrained(tmp_path)


def test_a_byte_order_mark_is_passed_over(saved, tmp_path):
    CascadeDrafter([MaxGram(7)]).save_pretrained(tmp_path)
    file = tmp_path / "cascade.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert CascadeDrafter.from_pretrained(tmp_path).drafters == (MaxGram(7),)


def test_drafters_nested_too_deep(saved, tmp_path):
    document, nest = document_of(saved), {"type": "max_gram"}
    for _ in range(300):
        nest = {"type": "horizontal", "drafters": [nest], "lengths": [1]}
    (tmp_path / "cascade.json").write_text(json.dumps(document | {"models": {}, "drafters": [nest], "k_matrix": 1}))
    with pytest.raises(ValueError, match=r"cascade\.json.*nested too deep"):
        CascadeDrafter.from_pretrained(tmp_path)


# Nothing outside the folder is opened.


def simple(to: Path, **changes: Any) -> Path:
    """A saved cascade of one model, with another document."""
    CascadeDrafter([noisy(tiny("llama"), 0.1), MaxGram()], 3).save_pretrained(to)
    (to / "cascade.json").write_text(json.dumps(document_of(to) | changes))
    return to


def linked(folder: Path, outside: Path) -> None:
    shutil.move(folder / "models" / "LlamaForCausalLM", outside)
    (folder / "models" / "LlamaForCausalLM").symlink_to(outside)


def linked_weights(folder: Path, outside: Path) -> None:
    file = folder / "models" / "LlamaForCausalLM" / "model.safetensors"
    shutil.move(file, outside)
    file.symlink_to(outside)


def indexed_weights(folder: Path, outside: Path) -> None:
    file = folder / "models" / "LlamaForCausalLM" / "model.safetensors"
    names = dict.fromkeys(load_file(file), str(outside))
    shutil.move(file, outside)
    (file.parent / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def linked_table(folder: Path, outside: Path) -> None:
    BigramTable.build([TEXT], 97).save(outside)
    (folder / "tables").mkdir()
    (folder / "tables" / "bigram.safetensors").symlink_to(outside)


def tokenizer_file(folder: Path, outside: Path) -> None:
    tokenizer().save_pretrained(folder / "tokenizers" / "x")
    (folder / "tokenizers" / "x" / "tokenizer_config.json").write_text(json.dumps({"vocab_file": str(outside)}))


@pytest.mark.parametrize("leave", [linked, linked_weights, indexed_weights, linked_table, tokenizer_file])
def test_files_that_lead_out_of_the_folder(tmp_path, leave):
    folder = simple(tmp_path / "c")
    leave(folder, tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"cascade\.json.*(outside the cascade's folder|elsewhere)"):
        CascadeDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    "drafter",
    [
        {"type": "max_gram", "bigram": "{}/bigram.safetensors"},
        {"type": "datastore", "corpus": "{}/corpus.safetensors"},
        {"type": "suffix", "outputs": "tables/../../bigram.safetensors"},
        {"type": "reference", "documents": "{}/bigram.safetensors"},
        {"type": "model", "model": "{}/model"},
        {"type": "vertical", "reviewer": "{}/model", "drafter": "max_gram"},
        {"type": "translated", "drafter": "max_gram", "tokenizer": "{}/model", "target_tokenizer": "me/other"},
        {"type": "translated", "drafter": "max_gram", "tokenizer": "me/../../other", "target_tokenizer": "me/other"},
    ],
)
def test_options_that_name_a_path(tmp_path, drafter):
    BigramTable.build([TEXT], 97).save(tmp_path / "bigram.safetensors")
    CorpusIndex.build([TEXT]).save(tmp_path / "corpus.safetensors")
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    named = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in drafter.items()}
    with pytest.raises(ValueError, match=r"cascade\.json: drafters\[0\]\.\w+ names .*which does not exist"):
        CascadeDrafter.from_pretrained(simple(tmp_path / "c", models={}, drafters=[named], k_matrix=1))


@pytest.mark.parametrize("entry", [{"id": "{}"}, {"folder": "{}"}, {"folder": "../elsewhere"}, {"id": "elsewhere"}])
def test_models_that_lie_elsewhere(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained(tmp_path / "elsewhere")
    entry = {key: value.format(tmp_path / "elsewhere") for key, value in entry.items()}
    says = r"cascade\.json: models\.LlamaForCausalLM\.(id|folder): .*(not a Hub id|outside)"
    with pytest.raises(ValueError, match=says):
        CascadeDrafter.from_pretrained(simple(tmp_path / "c", models={"LlamaForCausalLM": entry}))


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(tmp_path):
    """To the blobs beside it, which are inside; and the cache itself may be reached by a link."""
    folder = simple(tmp_path / "cache" / "snapshots" / "abc")
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path(*[".."] * len(file.relative_to(folder.parent).parts), "blobs", str(number)))
    (tmp_path / "home").symlink_to(tmp_path / "cache")
    loaded = CascadeDrafter.from_pretrained(tmp_path / "home" / "snapshots" / "abc")
    assert loaded.models()


def test_tokenizers_are_saved_with_the_cascade(tmp_path):
    """Paths say nothing elsewhere; ids of the Hub stay as they are."""
    tokenizer().save_pretrained(tmp_path / "own")
    CascadeDrafter([Translated(MaxGram(), str(tmp_path / "own"), tokenizer())]).save_pretrained(tmp_path / "c")
    shutil.rmtree(tmp_path / "own")
    drafter = document_of(tmp_path / "c")["drafters"][0]
    assert drafter["tokenizer"] == "tokenizers/own"
    assert (tmp_path / "c" / drafter["target_tokenizer"]).is_dir()
    loaded = CascadeDrafter.from_pretrained(tmp_path / "c")
    text = tiny("llama").generate(**prompt(), max_new_tokens=8)
    assert (
        tiny("llama").generate(**prompt(), assistant=loaded, strict=True, max_new_tokens=8).tolist() == text.tolist()
    )


# Code, and weights.


def remote(folder: Path) -> Path:
    """Gives a model's folder a config class of its own, in a file that leaves a mark if it is run."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    return folder


def test_code_of_others_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = simple(tmp_path / "c")
    model = remote(folder / "models" / "LlamaForCausalLM")
    for attempt in (
        CascadeDrafter.from_pretrained,
        lambda path: load_model(str(model)),
        lambda path: ModelDrafter(model),
    ):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            attempt(folder)
    assert not (model / "ran").exists()


def test_the_base_of_an_adapter_runs_no_code_either(tmp_path):
    save_adapter(tmp_path)
    remote(tmp_path / "base")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "base" / "ran").exists()


def save_adapter(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    noisy(tiny("llama")).save_pretrained(folder / "base")
    model = type(tiny("llama")).from_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")


def edit_tensors(file: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def lose(name: str) -> Callable[[Path], None]:
    return lambda file: edit_tensors(file, lambda tensors: tensors.pop(next(key for key in tensors if name in key)))


def resize(name: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[next(key for key in tensors if name in key)] = np.zeros((3, 5), np.float32)

    return lambda file: edit_tensors(file, change)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def absurd(**sizes: Any) -> Callable[[Path], None]:
    """Sizes in a config.json that would take all time or memory to build."""

    def change(file: Path) -> None:
        config = file.parent / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | sizes))

    return change


DAMAGE = [
    (absurd(num_hidden_layers=10**9), r"config.json has num_hidden_layers=1000000000"),
    (absurd(vocab_size=10**10), r"config.json has vocab_size=10000000000"),
    (absurd(intermediate_size=10**10), r"config.json has intermediate_size=10000000000"),
    (lose("layers.0.mlp.up_proj"), r"lacks 1 weight, such as model.layers.0.mlp.up_proj"),
    (lose("lm_head"), r"lacks 1 weight, such as lm_head"),
    (absurd(num_hidden_layers=-1), r"config.json: num_hidden_layers=-1; a model has at least 1"),
    (absurd(num_hidden_layers=0), r"config.json: num_hidden_layers=0; a model has at least 1"),
    (absurd(hidden_size=-32), r"config.json: hidden_size=-32; a model has at least 1"),
    (absurd(_attn_implementation="evil/evil"), r"config.json: _attn_implementation='evil/evil'; .* remove the key"),
    (absurd(attn_implementation="kernels-community/x"), r"config.json: attn_implementation='kernels-community/x'; "),
    (absurd(attn_implementation={"": "evil/evil"}), r"config.json: attn_implementation=\{'': 'evil/evil'\}; "),
    (absurd(_attn_implementation="flash_attention_2"), r"config.json: _attn_implementation='flash_attention_2'; "),
    (absurd(part={"attn_implementation": "evil/evil"}), r"config.json: part: attn_implementation='evil/evil'; "),
    (
        absurd(quantization_config={"quant_method": "hqq"}),
        r"config.json: quantization_config.quant_method='hqq' needs",
    ),
    (resize("embed"), r"do not fit its config.json: model.embed_tokens.weight of shape \(3, 5\), not \(97, 32\)"),
    (cut, r"model.safetensors cannot be read"),
    (emptied, r"model.safetensors cannot be read"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
def test_weights_that_a_file_lacks_are_no_random_numbers(tmp_path, damage, says):
    folder = simple(tmp_path / "c")
    model = folder / "models" / "LlamaForCausalLM"
    damage(model / "model.safetensors")
    with pytest.raises(ValueError, match=rf"cascade\.json: models.LlamaForCausalLM.folder: .*{says}"):
        CascadeDrafter.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{model}.*{says}"):
        ModelDrafter(model)


def test_tied_weights_are_stored_once(tmp_path):
    fresh("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load_model(str(tmp_path))(**prompt()).logits.isfinite().all()


def absurd_rank(file: Path) -> None:
    config = file.parent / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 10**12}))


def no_base(file: Path) -> None:
    config = file.parent / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": ["x"]}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lose("layers.1.self_attn.v_proj.lora_B"),
            r"adapter.*lacks 1 of its weights, such as .*layers.1.self_attn.v_proj",
        ),
        (lambda file: edit_tensors(file, lambda tensors: tensors.clear()), r"lacks 8 of its weights"),
        (resize("lora_A"), r"adapter.* does not fit its base"),
        (cut, r"adapter_model.safetensors cannot be read"),
        (absurd_rank, r"adapter.* does not fit its base"),
        (no_base, r"adapter_config.json: base_model_name_or_path=\['x'\]"),
    ],
)
def test_adapters_that_are_not_whole(tmp_path, damage, says):
    save_adapter(tmp_path)
    before = load_model(str(tmp_path / "adapter"))(**prompt()).logits
    assert not torch.equal(before, load_model(str(tmp_path / "base"))(**prompt()).logits)
    damage(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=says):
        load_model(str(tmp_path / "adapter"))


# Other documents, and tables.


@EVERY
@pytest.mark.slow
def test_every_key_of_a_report(tmp_path, every):
    """A report loads and can be shown, or one ValueError names the file and the key."""
    tiny("llama").generate(**prompt(), assistant=(cascade := CascadeDrafter([MaxGram()])), max_new_tokens=12)
    cascade.report.planned = Planned(["a"], [[3]], 2.0, 1.5, 0.01)
    cascade.report.save(tmp_path / "report.json")
    document, file, wrong = json.loads((tmp_path / "report.json").read_text()), tmp_path / "x.json", []
    for at, value in wrong_values(document, every):
        if at[0] == "summary":
            continue
        key = next(key for key in reversed(at) if isinstance(key, str))
        file.write_text(json.dumps(changed(document, at, value)))
        try:
            loaded = Report.load(file)
            loaded.to_html(tmp_path / "x.html")
            str(loaded + cascade.report)
        except ValueError as error:
            if str(file) not in str(error) or key not in str(error):
                wrong.append(f"{at} = {value!r:.20}: {error}")
        except Exception as error:  # all others are the fault that is looked for
            wrong.append(f"{at} = {value!r:.20}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} faults, such as\n" + "\n".join(wrong[:20])
    for how, content in BROKEN.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.json"):
            Report.load(file)
        assert how


@pytest.mark.parametrize("name", ["drafter.json", "adapter_config.json"])
def test_every_key_of_an_adapters_documents(tmp_path, name):
    """A self-drafting adapter drafts, or one ValueError says what is wrong, where PEFT's own values are not taken."""
    target = fresh("llama", num_hidden_layers=3)
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    save_student(make_student(target, init=on_target([0, 2]), peft=options), tmp_path)
    document, wrong = json.loads((tmp_path / name).read_text()), []
    keys = [at for at in places(document) if name == "drafter.json" or at[0] in ("r", "peft_type", "target_modules")]
    for at in keys:
        key = next(key for key in reversed(at) if isinstance(key, str))
        for value in VALUES:
            (tmp_path / name).write_text(json.dumps(changed(document, at, value)))
            try:
                load_model(str(tmp_path)).bind(target)
            except ValueError as error:
                if str(tmp_path) not in str(error) or (key not in str(error) and name == "drafter.json"):
                    wrong.append(f"{at} = {value!r:.20}: {error}")
            except Exception as error:  # as above
                wrong.append(f"{at} = {value!r:.20}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} faults, such as\n" + "\n".join(wrong[:20])


def test_a_self_drafting_adapter_that_is_not_whole(tmp_path):
    target = fresh("llama", num_hidden_layers=3)
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    for number, (damage, says) in enumerate(
        [(lose("lora_B"), "lacks 1 "), (resize("lora_A"), "fit"), (cut, "cannot")]
    ):
        save_student(make_student(target, init=on_target([0, 2]), peft=options), tmp_path / str(number))
        damage(tmp_path / str(number) / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=says):
            load_model(str(tmp_path / str(number))).bind(target)


def test_a_broken_provenance_is_named(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "provenance.json").write_text("[]")
    with pytest.raises(ValueError, match=r"provenance\.json holds \[\], expected an object"):
        CascadeDrafter([str(tmp_path / "model")]).save_pretrained(tmp_path / "c")


TABLES = [AcceptanceHead, AdjacencyTable, BigramTable, CorpusIndex, DocumentTable, OutputTable, SuccessorTable]


def wrong_tables(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Iterator[tuple[str, dict, dict]]:
    """(what is wrong, arrays, metadata), each array and each word of metadata wrong in turn."""
    yield "no metadata", arrays, {}
    for key in metadata:
        for value in ("", "x", "-1", "1e9"):
            yield f"{key}={value}", arrays, metadata | {key: value}
    for key, values in arrays.items():
        yield f"{key} left out", {k: v for k, v in arrays.items() if k != key}, metadata
        others = [values[:0], values[None], np.full_like(values, -5), np.full_like(values, 2**31 - 1)]
        for other in [*others, *(values.astype(kind) for kind in (np.float64, np.int64, np.int8))]:
            yield f"{key}={other.dtype} {other.shape}", arrays | {key: np.ascontiguousarray(other)}, metadata


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_every_part_of_a_table(saved, tmp_path, table):
    """A table loads, or one ValueError names the file."""
    file, stored = tmp_path / "x.safetensors", saved / "tables" / f"{table.__module__.rpartition('.')[2]}.safetensors"
    with safe_open(stored, "np") as opened:
        metadata, wrong = opened.metadata(), []
    for what, arrays, words in wrong_tables(load_file(stored), metadata):
        save_file(arrays, file, words)
        try:
            table.load(file)
        except ValueError as error:
            if str(file) not in str(error):
                wrong.append(f"{what}: {error}")
        except Exception as error:  # as above
            wrong.append(f"{what}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} faults, such as\n" + "\n".join(wrong)
    whole = stored.read_bytes()
    for broken in (b"", whole[:4], whole[: len(whole) // 2], whole[:-4], b"x" * 100, b"\xff" * 100):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            table.load(file)
