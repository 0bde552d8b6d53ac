"""Recipes can be read, name what there is, and, for the bundled pair, run from data to a cascade."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config, TrainingArguments

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.data.generate import GenerateArguments, generate
from csdraft.drafters.suffix import Suffix
from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.run import distill
from csdraft.trainers.students import check_student, make_student, save_student
from recipes.smol.pretrain import PretrainArguments
from recipes.smol.train_tokenizer import TokenizerArguments
from tests.tiny import drafter_of, fresh, inputs_of, tiny, tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "accelerate")
LARGE = {"flan-t5-xxl": "flan", "llama-3.1-8b": "llama", "qwen3-8b": "qwen3", "papers": "flan", "smollm2": "llama"}
"""Families of the folders whose models are not here."""


SHAPES = {
    "llama-3.1-8b": LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
    "qwen3-8b": Qwen3Config(
        intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8, head_dim=128, vocab_size=151936
    ),
}
"""The sizes of targets that are not here; what they leave out is the class's default."""


def script(name: str) -> ModuleType:
    """A file of scripts/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE_CASCADE, GENERATE_DATA, FORECAST = script("make_cascade"), script("generate_data"), script("forecast")
BY_KEY = {"drafters": MAKE_CASCADE.CascadeArguments, "vocab_size": TokenizerArguments, "corpus": PretrainArguments}
BY_KEY |= {"losses": DistillArguments, "count": GenerateArguments, "sampled": GenerateArguments}
"""A key that only recipes of a kind have, and what reads them."""


@cache
def values_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def class_of(path: Path) -> type:
    values = values_of(path)
    return next(kind for key, kind in BY_KEY.items() if key in values)


def read(path: Path, *overrides: str) -> Any:
    """The arguments of a recipe; those of a trainer would refuse bfloat16 where there is no GPU."""
    kind = class_of(path)
    cpu = ["use_cpu=true"] if issubclass(kind, TrainingArguments) else []
    return read_arguments(kind, str(path), [*cpu, *overrides])


def having(kind: type, folders: Mapping[str, Any] | None = None) -> list:
    """The recipes that a class reads, as parameters; those with arms are a class's keys and more."""
    plain = [path for path in RECIPES if "arms" not in values_of(path)]
    found = [path for path in plain if class_of(path) is kind and (folders is None or path.parent.name in folders)]
    assert found
    return [pytest.param(path, id=name_of(path)) for path in found]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").as_posix()


KINDS = dict.fromkeys(BY_KEY.values())


@pytest.mark.parametrize("path", [parameter for kind in KINDS for parameter in having(kind)])
def test_recipes_can_be_read(path):
    args, hints = read(path), get_type_hints(class_of(path))
    for key in values_of(path):
        value, hint = getattr(args, key), hints[key]
        if hint in (bool, int, float, str):
            fits = type(value) is hint or (hint is float and type(value) is int)
            assert fits, f"{key}={value!r} is a {type(value).__name__}, not a {hint.__name__}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_recipes(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize("path", having(DistillArguments))
def test_losses_and_students_exist(path):
    args = read(path)
    assert args.objective.terms
    if path.parent.name not in LARGE:
        return
    family = LARGE[path.parent.name]
    model: Any = fresh(family, **shape(path))
    check_student(model.config, args.student, args.init, args.peft)
    if args.peft is not None:
        student = make_student(model, None if args.student is None else fresh(family), args.init, args.peft)
        trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        assert all(any(f".{module}." in name for name in trained) for module in args.peft["target_modules"])


def shape(path: Path) -> dict[str, Any]:
    """As many layers as the real target has, and as many tokens where a recipe counts on them."""
    if path.parent.name == "smollm2":
        return {"num_hidden_layers": 30, "vocab_size": 49152}
    layers = {"flan-t5-xxl": 24, "papers": 24, "llama-3.1-8b": 32, "qwen3-8b": 36}[path.parent.name]
    tokens = {"vocab_size": SHAPES[path.parent.name].vocab_size} if path.stem == "eagle3" else {}
    return {"num_layers": layers} if LARGE[path.parent.name] == "flan" else {"num_hidden_layers": layers} | tokens


@pytest.mark.parametrize("name", SHAPES)
def test_readmes_have_the_forecast_of_the_recipe(name, tmp_path):
    SHAPES[name].save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    args = read(ROOT / "recipes" / name / "eagle3.yaml", f"target={tmp_path}")
    lines = FORECAST.forecast(args, processes=8, tflops=200)
    page = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    said = page.partition("<!-- forecast -->")[2].partition("<!-- /forecast -->")[0]
    assert said.strip().splitlines()[1:-1] == lines
    found = [line.split()[:2] for line in lines if re.match(r" *[\d.]+ [MG]B  ", line)]
    parts = [float(number) / {"MB": 1000, "GB": 1}[unit] for number, unit in found]
    assert abs(sum(parts[:-1]) - parts[-1]) < 0.5
    assert parts[-1] < 70, "the recipe is for GPUs of 80 GB"


def test_a_forecast_counts_what_a_step_keeps():
    """Near what a real step keeps on a CPU, whose attention keeps other things beside its inputs and output."""
    head: Any = make_student(fresh("llama", num_hidden_layers=3), init={"eagle3": {"layers": [0, 1, 2], "steps": 3}})
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(2 * 64).reshape(2, 64) % 97
    positions = torch.arange(64).expand(2, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for output in head.unrolled(ids, positions, head.fuse({tap: torch.rand(2, 64, 32) for tap in head.taps}), 3):
            head.draft_logits(output[:, :1])
    own = {parameter.untyped_storage().data_ptr() for parameter in head.parameters()}
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    with torch.device("meta"):
        assert 0.7 * real < FORECAST.kept_bytes(head.to("meta"), 2, 64, 3) < 1.3 * real


@pytest.mark.parametrize(
    ("init", "said"),
    [("{medusa: {}}", "no forecast for Medusa heads"), ("{from_target: {layers: [0]}}", "recipes that make a head")],
)
def test_a_forecast_that_cannot_be_made_is_refused(init, said):
    args = read(ROOT / "recipes" / "smol" / "medusa.yaml", f"init={init}")
    with pytest.raises(ValueError, match=said):
        FORECAST.forecast(args, processes=1, tflops=200)


@pytest.mark.parametrize("path", having(MAKE_CASCADE.CascadeArguments, LARGE))
def test_cascades_draft(path):
    """With tiny models in the place of paths."""
    args, family = read(path), LARGE[path.parent.name]
    models = (drafter_of(family, scale=0.1 * number) for number in range(1, 9))
    copying = {"max_gram": MaxGram, "suffix": Suffix}
    drafters = [copying[name]() if name in copying else ModelDrafter(next(models)) for name in args.drafters]
    cascade = CascadeDrafter(drafters, args.k_matrix, args.lenience, args.verifier, args.schedule)
    inputs, options = inputs_of(family), {"max_new_tokens": 24, "do_sample": False}
    target: Any = tiny(family)
    plain = target.generate(**inputs, **options)
    assert torch.equal(target.generate(**inputs, **options, assistant=cascade, strict=True), plain)
    assert cascade.report.emitted >= 1


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory that looks like the checkout and may be written to."""
    for name in ("models", "recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = (
    "max_steps=2", "per_device_train_batch_size=2", "warmup_steps=1", "logging_steps=1", "save_steps=2",
    "eval_steps=2", "eval_limit=2", "eval_new_tokens=8", "disable_tqdm=true", "max_length=64",
)  # fmt: skip
"""Overrides of a training recipe."""


def smol(name: str, *overrides: str) -> Any:
    return read(ROOT / "recipes" / "smol" / f"{name}.yaml", *overrides)


@pytest.mark.slow
def test_the_bundled_pair_from_data_to_cascade(folder):
    """All the recipes of `smol` that make drafters, with a few rows and steps."""
    data = smol("data", "count=16", "dataset_limit=8", "begin=32", "max_new_tokens=16")
    assert len(generate(data, GENERATE_DATA.open_drafter(data.assistant))) == 16

    trainer = distill(smol("distill", "student=models/smol-drafter", *SHORT))
    assert trainer.state.global_step == 2
    assert trainer.state.best_model_checkpoint is not None
    for name in ("lora", "self_draft", "eagle3", "hass", "medusa", "parallel"):
        distill(smol(name, *SHORT))

    MAKE_CASCADE.make_cascade(smol("cascade"))
    own = smol("cascade", "drafters=[out/smol/self-draft, {type: max_gram, depth: 4}]", "output_dir=out/smol/own")
    MAKE_CASCADE.make_cascade(own)

    target = AutoModelForCausalLM.from_pretrained("models/smol-target", dtype=torch.float32)
    words = AutoTokenizer.from_pretrained("models/smol-target")
    inputs = words("import os\nimport sys\n\n\ndef main():\n", return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=24)
    for path in ("out/smol/cascade", "out/smol/own"):
        cascade = CascadeDrafter.from_pretrained(path, target=target, tokenizer=words)
        drafted = target.generate(**inputs, assistant=cascade, schedule="fixed", strict=True, max_new_tokens=24)
        assert torch.equal(drafted, plain)
        assert cascade.report.block_efficiency > 1
    assert torch.equal(target.generate(**inputs, assistant="out/smol/drafter-lora", max_new_tokens=24), plain)


def test_a_cascade_says_what_is_wrong(folder):
    def made(*overrides: str) -> None:
        MAKE_CASCADE.make_cascade(smol("cascade", *overrides))

    with pytest.raises(ValueError, match="no drafter at 'out/smol/drafter-distilled'; give a folder"):
        made()
    with pytest.raises(ValueError, match="nearest known keys are k_matrix"):
        made("kmatrix=5")
    with pytest.raises(ValueError, match="is one drafter; give a list"):
        made("drafters=models/smol-drafter")
    with pytest.raises(ValueError, match="does not fit 1 drafters"):
        made("drafters=[max_gram]")
    with pytest.raises(ValueError, match="no drafter of type 'max_gran'"):
        made("drafters=[{type: max_gran}]", "k_matrix=5")


@pytest.mark.slow
@pytest.mark.slow
def test_an_encoder_decoder_from_data_to_cascade(folder):
    """The recipes of `flan-t5-xxl` with tiny models in the place of theirs."""
    names = ("target", "base")
    for name, model in zip(names, (tiny("flan"), drafter_of("flan")), strict=True):
        save_student(model, folder / name, tokenizer())
    for name in ("train", "gsm8k"):
        prompts = Path("out/flan-t5-xxl/prompts") / f"{name}.jsonl"
        prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(f'{{"prompt": "Question{i}:{i}+{i}?"}}\n' for i in range(8)))

    def flan(name: str, *overrides: str) -> Any:
        path = ROOT / "recipes" / "flan-t5-xxl" / f"{name}.yaml"
        return read(path, "target=target", "target_dtype=float32", *overrides)

    data = flan("data", "max_new_tokens=12")
    assert len(generate(data, GENERATE_DATA.open_drafter(data.assistant))) == 8
    for name in ("distill", "lora"):
        distill(flan(name, "student=base", "bf16=false", "report_to=none", *SHORT))

    target: Any = tiny("flan")
    inputs = tokenizer()("Question9:9+9?", return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False)
    cascade = CascadeDrafter(
        ["out/flan-t5-xxl/base", "out/flan-t5-xxl/base-lora", MaxGram()], [[2, 2, 2], [0, 1, 2], [0, 0, 2]]
    )
    drafted = target.generate(**inputs, max_new_tokens=16, do_sample=False, assistant=cascade, strict=True)
    assert torch.equal(drafted, plain)
