"""Arms: what is done again and what is kept, starts of every kind, errors before the first of them is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import arms as module
from benchmarks.arms import compare_arms
from csdraft.data.text import Document, read_corpus
from csdraft.trainers.arguments import make_arguments, read_values
from csdraft.trainers.distill import DistillArguments
from tests.tiny import drafter_of, on_target, tiny, tokenizer

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel

RECIPES = sorted(
    path for path in Path(__file__).parents[2].glob("recipes/*/*.yaml") if path.name.startswith(("arms", "losses"))
)


def common(folder: Path, family: str = "llama", **changes: object) -> dict:
    """Settings of arms of two steps, with target, student and texts to train on and to be examined with."""
    for name, model in (("target", tiny(family)), ("student", drafter_of(family, scale=0.4))):
        model.save_pretrained(folder / name)  # type: ignore[operator]
        tokenizer().save_pretrained(folder / name)
    texts = ["".join(chr(ord("A") + (i * k + k) % 50) for k in range(24)) for i in range(16)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text[:8]}) + "\n" for text in texts[:4]))
    return {
        "target": str(folder / "target"),
        "student": str(folder / "student"),
        "dataset": str(folder / "texts.jsonl"),
        "max_length": 32,
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 0.05,
        "eval_prompts": str(folder / "prompts.jsonl"),
        "eval_new_tokens": 8,
        "output_dir": str(folder / "arms"),
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | changes


def figures(table: str) -> dict[str, list[str]]:
    """The cells of each arm that do not depend on the machine; the last are parameters, a price and a speed."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    for _, *cells in rows:
        assert cells[-3].endswith(" M")
        assert all(float(cell) > 0 for cell in cells[-2:])
    return {name: cells[:-3] for name, *cells in rows}


def block_efficiency(cells: list[str]) -> list[float]:
    """Greedy and sampled."""
    return [float(cell.split()[0]) for cell in cells[:2]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the arms that are trained, one after the other."""
    folders, real = [], module.distill

    def counted(args):
        folders.append(Path(args.output_dir).name)
        return real(args)

    monkeypatch.setattr(module, "distill", counted)
    return folders


def test_an_arm_is_run_again_when_its_settings_have_changed_and_only_then(tmp_path, trained):
    values = common(tmp_path)
    first = compare_arms(values, {"before": {}, "one": {"learning_rate": 1e-5}}, "before")
    assert compare_arms(values | {"logging_steps": 7}, {"before": {}, "one": {"learning_rate": 1e-5}}, "one") != first
    assert trained == ["one"], "a log and a baseline change no figure"

    changed = {"one": {"losses": {"total_variation": 1.0}}}
    second = figures(compare_arms(values, changed, "one"))
    anew = figures(compare_arms(values | {"output_dir": str(tmp_path / "anew")}, changed, "one"))
    assert trained == ["one"] * 3
    assert second == anew, "goes on from a checkpoint of the old settings"
    assert second["one"][:2] != figures(first)["one"][:2]

    shorter = figures(compare_arms(values | {"eval_new_tokens": 4}, {"before": {}}, "before"))
    assert shorter["before"] != figures(first)["before"], "common settings count too"


def test_an_arm_that_is_trained_after_all_is_not_its_start(tmp_path, trained):
    values = common(tmp_path)
    compare_arms(values, {"one": {}}, "one")
    compare_arms(values, {"one": {"max_steps": values["max_steps"]}}, "one")
    assert trained == ["one"]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_start_is_the_student_that_would_be_trained(family, tmp_path):
    values = common(tmp_path, family)
    given = figures(compare_arms(values, {"before": {}}, "before"))["before"]
    cut = values | {"student": None, "init": {"from_target": {"layers": [0]}}, "output_dir": str(tmp_path / "cut")}
    cut = figures(compare_arms(cut, {"before": {}}, "before"))["before"]
    shared = values | {"student": None, "output_dir": str(tmp_path / "shared")}
    shared |= {"init": on_target([0]), "peft": {"r": 2}}
    shared = figures(compare_arms(shared, {"before": {}}, "before"))["before"]
    assert cut == shared, "an untrained adapter changes nothing"
    assert cut != given
    for cells in (given, cut):
        assert all(1 <= value < 5.5 for value in block_efficiency(cells)), "not the target's own drafts"


def test_what_is_wrong_with_any_arm_is_found_before_the_first_is_trained(tmp_path, trained):
    values = common(tmp_path)
    fine = {"before": {}, "fine": {"learning_rate": 0.01}}
    for wrong in (
        {"losses": {"no_such_loss": 1.0}},
        {"eval_prompts": None},
        {"no_such_key": 1},
        {"init": {"config": {}}},
    ):
        with pytest.raises(ValueError, match=r"no_such|held-out|student and init given"):
            compare_arms(values, fine | {"wrong": wrong}, "before")
    with pytest.raises(ValueError, match=r"'absent'.*'before', 'fine'"):
        compare_arms(values, fine, "absent")
    assert trained == []


def test_checkpoints_of_another_run_are_neither_used_nor_removed(tmp_path, trained):
    values = common(tmp_path)
    foreign = tmp_path / "arms" / "fine" / "checkpoint-1"
    foreign.mkdir(parents=True)
    with pytest.raises(ValueError, match="another run"):
        compare_arms(values, {"before": {}, "fine": {"learning_rate": 0.01}}, "before")
    assert foreign.is_dir()
    assert trained == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_arms_can_be_read(path):
    values = read_values(str(path), [])
    arms, baseline = values.pop("arms"), values.pop("baseline")
    assert baseline in arms
    for changes in arms.values():
        assert make_arguments(DistillArguments, {**values, **changes}).objective
    assert any(not changes for changes in arms.values())


def test_the_librarys_tests_are_a_corpus_of_their_own():
    library, tests = ({document.name for document in read_corpus(name)} for name in ("stdlib", "stdlib-tests"))
    assert tests
    assert not library & tests
    assert not any("site-packages" in name for name in tests)


def test_prompts_of_the_domain_are_held_out():
    prompts = Path(__file__).parents[2] / "recipes" / "smol" / "prompts_drifted.jsonl"
    names = {json.loads(line)["id"].rpartition(":")[0] for line in prompts.read_text(encoding="utf-8").splitlines()}
    assert len(names) == 24
    assert all(Document(name, "").held_out for name in names)
