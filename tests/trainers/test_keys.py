"""Keys of recipes: every one is in its script's help and in the docs with default and meaning, from its dataclass."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from csdraft.data.generate import GenerateArguments
from csdraft.data.target_cache import CacheArguments, FeatureArguments
from csdraft.trainers.arguments import make_arguments, read_values
from csdraft.trainers.command import help_of, keys_of, markdown, one_line_errors, recipe_parser
from csdraft.trainers.distill_arguments import DistillArguments
from csdraft.trainers.students._kind import students
from recipes.smol.pretrain import PretrainArguments
from recipes.smol.train_tokenizer import TokenizerArguments

ROOT = Path(__file__).parent.parent.parent
KINDS = {
    "scripts/distill_drafter": DistillArguments,
    "scripts/generate_data": GenerateArguments,
    "scripts/cache_logits": CacheArguments,
    "scripts/cache_features": FeatureArguments,
    "recipes/smol/pretrain": PretrainArguments,
    "recipes/smol/train_tokenizer": TokenizerArguments,
}


@pytest.mark.parametrize("script", KINDS)
def test_help_lists_every_key(script):
    kind = KINDS[script]
    assert f"run_script(__doc__, {kind.__name__}," in (ROOT / f"{script}.py").read_text()
    told = recipe_parser("What it does.", kind).format_help()
    assert help_of(kind) in told
    lines = [line.split() for line in told.splitlines() if line.startswith("  ") and line[2] != " "]
    assert {field.name for field in fields(kind) if field.init} <= {words[0] for words in lines}
    assert all(key.help for key in keys_of(kind))


def test_a_key_has_its_default_and_its_group():
    keys = {key.name: key for key in keys_of(DistillArguments)}
    assert (keys["max_length"].default, keys["max_length"].inherited) == ("512", False)
    assert (keys["losses"].default, keys["packing"].default, keys["student"].default) == (
        "{forward_kl: 1.0}", "true", "none",
    )  # fmt: skip
    assert (keys["save_steps"].default, keys["save_steps"].inherited) == ("500", True)
    assert not keys["learning_rate"].inherited, "its default is another than that of transformers"
    own = [field.name for field in fields(DistillArguments)]
    assert {key.name for key in keys.values()} == set(own) >= {field.name for field in fields(TrainingArguments)}
    assert "| `max_length` | `512` |" in markdown(DistillArguments)
    assert "save_steps" not in markdown(DistillArguments)


def test_a_key_without_a_meaning_is_an_error():
    @dataclass
    class Silent:
        told: int = field(default=1, metadata={"help": "Something."})
        silent: int = 2

    with pytest.raises(ValueError, match=r"Silent\.silent has no help"):
        keys_of(Silent)


def test_none_is_what_the_help_says_it_is():
    """Of keys that may be none; others keep the word."""
    given = {"use_cpu": True, "output_dir": "nowhere", "dataset_limit": "none", "eval_prompts": "none"}
    args = make_arguments(DistillArguments, given | {"report_to": "none", "dataset_limit": "none"})
    assert (args.dataset_limit, args.eval_prompts, args.report_to) == (None, None, [])
    assert make_arguments(DistillArguments, given | {"dataset_limit": "1e3"}).dataset_limit == 1000
    assert type(make_arguments(DistillArguments, given | {"max_length": 48.0}).max_length) is int
    assert make_arguments(DistillArguments, given | {"save_steps": 0.5}).save_steps == 0.5
    with pytest.raises(ValueError, match="dataset_limit=-1 must be a whole number of at least 1"):
        make_arguments(GenerateArguments, {"output_dir": "nowhere", "dataset_limit": -1})
    with pytest.raises(ValueError, match="dataset_limit='few' must be a number"):
        make_arguments(DistillArguments, given | {"dataset_limit": "few"})


def test_what_looks_like_a_number_is_text_for_a_key_and_a_number_within_one(tmp_path):
    """Folders and revisions may have such names."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: 3e-4\nlosses: {a: 1e-5}\nb: &b {x: 1e5}\nc: {<<: *b, x: 2}\nd: {<<: *b}\n")
    read = {"output_dir": "3e-4", "losses": {"a": 1e-5}, "b": {"x": 1e5}, "c": {"x": 2}, "d": {"x": 1e5}}
    given = ["run_name=3e-4", "student=12e4567", "layers=[1e1]", "nothing="]
    assert read_values(str(recipe), given) == read | {
        "run_name": "3e-4", "student": "12e4567", "layers": [10.0], "nothing": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"losses: {a: b: c}", "recipe.yaml is not YAML: while parsing a flow mapping"),
        (b"max_steps: 1\nmax_steps: 2", "recipe.yaml is not YAML: it has 'max_steps' twice"),
        (b"- max_steps", "recipe.yaml holds other things than keys with values, such as max_steps: 100"),
        (b"5: 6", "recipe.yaml holds other things than keys"),
        (b"target: caf\xe9", "recipe.yaml' cannot be read as UTF-8 text"),
        (None, "recipe.yaml' cannot be read .* No such file"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(text, words, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_bytes(text)
    with pytest.raises(ValueError, match=words):
        read_values(str(recipe), [])
    with pytest.raises(ValueError, match=r"losses=\{a: b: c\} is not YAML"):
        read_values(None, ["losses={a: b: c}"])


def test_a_script_says_in_one_line_what_the_user_can_put_right(tmp_path, capsys):
    """Errors of its own, of a full disk and Ctrl-C; a fault in the program keeps its traceback."""

    def ended(work: Callable[[], object]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end, one_line_errors(str(tmp_path)):
            work()
        return end.value.code, capsys.readouterr().err

    def fails(error: BaseException) -> None:
        raise error

    status, said = ended(lambda: make_arguments(DistillArguments, {"losess": {}}))
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("error: unknown key 'losess' for DistillArguments; the nearest known keys are losses")
    status, said = ended(lambda: make_arguments(DistillArguments, {"init.eagle3.layers": [1]}))
    assert status == 1
    assert said == "error: key 'init.eagle3.layers' has a dot; give the whole of init, such as \"init={...}\"\n"
    status, said = ended(lambda: fails(OSError(errno.ENOSPC, "No space left on device")))
    assert (status, said[:30]) == (1, f"error: {tmp_path} cannot be written"[:30])
    assert "Make room, or raise the limit that was reached" in said
    assert ended(lambda: fails(KeyboardInterrupt())) == (
        130, "stopped at once; the same command continues from what is there\n"
    )  # fmt: skip
    with pytest.raises(ValueError, match="a fault"), one_line_errors():
        fails(ValueError("a fault"))


def test_the_docs_have_the_default_rates():
    page = (ROOT / "docs/distilling.md").read_text(encoding="utf-8")
    for name, kind in students().items():
        assert f"| `{kind.rate:.0e}` |".replace("e-0", "e-") in page, name
