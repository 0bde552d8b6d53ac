"""The command line, on tiny random models saved for it: what it prints, what it writes, and its exit status."""

import argparse
import copy
import importlib
import io
import json
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import scipy.stats
import torch

import csdraft
import csdraft_command
from csdraft import MaxGram, cli
from csdraft.bench import Method
from csdraft.cli import _models, check, main
from csdraft.cli.bench import methods
from csdraft.decoding.cache import SlotCache
from csdraft.decoding.interfaces import Verdict
from csdraft.heads.engines import ENGINES
from csdraft.reports.report import Report
from csdraft.schedules.fixed import Fixed
from csdraft.verifiers.match import Match
from csdraft_command import COMMANDS
from tests.house.source import ROOT
from tests.tiny import EOS, drafter_of, prompt, tiny, tokenizer

PROMPT = "thequickbrownfoxjumps"
SPECIAL = 2
"""Up to here tokens have no text."""
ESCAPE = re.compile(r"\x1b\[\d+m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target, a drafter and a T5 with their tokenizer."""
    path = tmp_path_factory.mktemp("models")
    for name, model in (("target", tiny("llama")), ("small", drafter_of("llama")), ("t5", tiny("t5"))):
        model.save_pretrained(path / name)
        tokenizer().save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def models(folder) -> list[str]:
    return ["--target", str(folder / "target"), "--drafter", str(folder / "small")]


def plainly_written() -> str:
    inputs = tokenizer()(PROMPT, return_tensors="pt")
    new = tiny("llama").generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    return tokenizer().decode(new, skip_special_tokens=True)


# Tuning.


def test_tune_says_what_it_expects_and_measures_and_saves_the_fastest(folder, models, tmp_path, capsys):
    """A drafter that is the target itself: whatever the clock says, drafts are always right."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, PROMPT[::-1])))
    few = ["--max-new-tokens", "16", "--finalists", "8", "--repetitions", "1", "--tree-nodes", "6"]
    models = [*models[:2], "--drafter", str(folder / "target"), "--drafter", "max_gram"]
    assert main(["tune", *models, "--prompts", str(prompts), *few, "--save", str(tmp_path / "tuned")]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert rows[0][-3:] == ["tokens a round, expected", "speed-up expected", "measured"]
    assert all(len(row) == len(rows[0]) for row in rows)
    measured = [float(row[-1].split()[0]) for row in rows[2:]]
    assert measured == sorted(measured, reverse=True)
    assert {row[3] for row in rows[2:]} == {"cost_model", "fixed"}
    cascade = csdraft.CascadeDrafter.from_pretrained(tmp_path / "tuned")
    (chosen,) = re.findall(r"^chosen: (.*), lenience ([\d.]+), (\w+)$", out, re.MULTILINE)
    (row,) = [row for row in rows[2:] if (row[1], row[2], row[3]) == chosen]
    assert float(row[-1].split()[0]) >= 0.97 * measured[0] - 0.01
    assert [list(lengths) for lengths in cascade.k_matrix] == json.loads(chosen[0])
    assert json.loads((tmp_path / "tuned" / "provenance.json").read_text())["measured"]["calls"] >= 2
    alone = [row for row in rows[2:] if row[0] == "target"]
    assert alone
    for row in alone:
        ((length,),) = json.loads(row[1])
        assert float(row[-3]) > 0.6 * (length + 1)  # the last round is cut by the end


def test_tune_without_a_drafter_says_so(models, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}))
    assert main(["tune", *models[:2], "--prompts", str(tmp_path / "prompts.jsonl")]) == 2
    assert "name drafters with --drafter" in capsys.readouterr().err


# The frame.


def test_every_command_explains_itself_and_has_a_file():
    named = {command.__name__ for command in COMMANDS}
    files = {file.name for file in pkgutil.iter_modules(cli.__path__) if not file.name.startswith("_")}
    assert named == files >= {"bench", "check", "generate", "report", "tune"}
    for command in COMMANDS:
        assert command.__doc__, command
        assert "run" in importlib.import_module(f"csdraft.cli.{command.__name__}").__all__


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name.__name__, "--help"] for name in COMMANDS)])
def test_help_waits_for_no_large_package(arguments):
    """Importing torch and transformers takes seconds."""
    code = (
        "import csdraft_command, sys\n"
        "try:\n    csdraft_command.main(sys.argv[1:])\n"
        "finally:\n    print('loaded:', *{'torch', 'transformers', 'numpy', 'csdraft'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) > 1
    assert process.stdout.endswith("loaded:\n")


def test_the_engines_of_export_are_those_that_it_writes_for():
    assert tuple(ENGINES) == csdraft_command.ENGINES


def test_a_misspelt_drafter_is_told_its_name(models, capsys):
    assert main(["generate", *models[:2], "--drafter", "maxgram", "--prompt", PROMPT]) == 2
    assert "did you mean 'max_gram'" in capsys.readouterr().err


def test_control_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("csdraft.cli.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\ncsdraft doctor: stopped\n"


def test_a_terminal_without_a_character_shows_another(monkeypatch):
    monkeypatch.setattr("csdraft.cli.doctor.run", lambda args: print("█", file=sys.stdout))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    main(["doctor"])
    assert sys.stdout.buffer.getvalue() == b"?\n"  # type: ignore[attr-defined]


def test_a_prompt_without_room_is_said():
    """A model with learned positions would fail inside its embedding."""
    opened = _models.Opened(tiny("gpt2"), tokenizer(), None, {})
    with pytest.raises(
        ValueError, match="the prompt has 200 tokens, but with 100 new ones the target has room for 156"
    ):
        _models.encode(opened, "a" * 200, 100)
    assert _models.Opened(tiny("llama"), tokenizer(), None, {}).longest(1000) is None


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"csdraft {csdraft.__version__}\n"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {command.__name__} " in shown for command in COMMANDS)


# Measuring.


@pytest.mark.parametrize("drafter", ["small", "max_gram", None])
def test_bench_times_all_methods_of_these_models(folder, tmp_path, capsys, drafter):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "abcabcabc")))
    named = [] if drafter is None else ["--drafter", str(folder / drafter) if drafter == "small" else drafter]
    few = ["--prompts", str(prompts), "--max-new-tokens", "12", "--repetitions", "1"]
    assert main(["bench", "--target", str(folder / "target"), *named, *few]) == 0
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()[2:]]
    own = ["transformers, prompt lookup", "MaxGram"]
    if drafter == "small":
        own = ["transformers, assistant_model", own[0], "small", own[1], "cascade"]
    assert [row[0] for row in rows] == ["plain", *own]
    for name, *figures in rows:
        assert figures[-1] == "2/2 equal"
        csdraft_drafts = name in ("small", "MaxGram", "cascade")
        assert len(figures) == (5 if csdraft_drafts else 4)  # transformers does not say its tokens a round
        if csdraft_drafts:
            assert 1 <= float(figures[-2]) <= 12


def test_bench_times_two_drafters_of_one_name(opened):
    """Folders of one name in different places, and one that has the name of a row."""
    drafters = [copy.deepcopy(drafter_of("llama")) for _ in range(3)]
    for drafter, path in zip(drafters, ("a/model", "b/model", "c/plain"), strict=True):
        drafter.config._name_or_path = path
    assistant = csdraft.CascadeDrafter(drafters)
    found = methods(_models.Opened(opened.target, opened.tokenizer, assistant, {}), rows=4)
    assert [method.name for method in found] == ["plain", "model", "model 2", "plain 2", "MaxGram", "cascade"]


def test_bench_says_that_a_text_differs(folder, tmp_path, capsys, monkeypatch):
    """The status is 1 where a rule keeps every draft."""
    monkeypatch.setattr("csdraft.cli.bench.methods", lambda opened, rows: [
        Method("plain", {}), Method("gullible", {"assistant": opened.assistant, "verifier": Gullible()})
    ])  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}))
    few = ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12", "--repetitions", "1"]
    assert main(["bench", "--target", str(folder / "target"), "--drafter", str(folder / "small"), *few]) == 1
    assert "0/1 equal DIFFERENT" in (out := capsys.readouterr().out)
    assert "csdraft check" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check"], "--cascade or --drafter"),
        (["generate", "--prompt", "a", "--k-matrix", "[1]"], "--k-matrix [1]: nothing drafts"),
        (["generate", "--prompt", "a", "--cascade", "x", "--k-matrix", "5"], "--k-matrix 5: a saved cascade has its"),
        (["check", "--cascade", "x", "--lenience", "1", "--k-matrix", "[1]"], "--k-matrix [1] and --lenience 1.0: a"),
        (["check", "--drafter", "max_gram", "--lenience", "0.5"], "lenience=0.5 must be 1"),
        (["generate", "--prompt", ""], "prompt is empty"),
        (["generate", "--prompt", "caf\udce9"], "the prompt is not UTF-8 text; convert it"),
        (["generate", "--prompt", "a", "--top-k", "4"], "--top-k and --top-p have no effect on greedy text"),
        (["generate", "--prompt", "a", "--top-p", "0.5"], "--top-k and --top-p have no effect on greedy text"),
        (["generate", "--prompt", "a", "--tokenizer", "/no/folder"], "there is no folder '/no/folder'"),
        (["generate", "--file", "no-such-file"], "no-such-file"),
        (["generate", "--prompt", "a", "--device", "cuba"], "--device cuba: "),
        (["generate", "--prompt", "a", "--device", "meta"], "--device meta: "),
        (["generate", "--prompt", "a", "--save-report", "/no/folder/r.json"], "'/no/folder/r.json'"),
        (
            ["tune", "--prompts", "no-such-file", "--drafter", "max_gram", "--save", __file__],
            "' is a file, which saving",
        ),
        (
            ["tune", "--prompts", "no-such-file", "--drafter", "max_gram", "--save", f"{__file__}/saved"],
            "is not a folder that can be written to",
        ),
        (["generate", "--prompt", "a", "--drafter", "/no/folder"], "'/no/folder' is not a model's folder"),
    ],
)
def test_what_makes_no_sense_is_said_without_a_traceback(folder, capsys, arguments, words):
    assert main([*arguments, "--target", str(folder / "target")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "", "--save-report"], ["tune", "--prompts", "x", "--save"]]
)
def test_a_command_that_fails_leaves_nothing_behind(folder, tmp_path, command):
    assert main([*command, str(tmp_path / "new"), "--target", str(folder / "target")]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [[], ["--chat"]])
def test_a_closed_standard_input_is_an_empty_one(folder, monkeypatch, capsys, more):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", *more, "--target", str(folder / "target")]) == 2
    assert ("no chat template" if more else "prompt is empty") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--prompts", "x", "--limit", "-1"], "--limit: '-1' is not a whole number of at least 1"),
        (["bench", "--prompts", "x", "--repetitions", "0"], "--repetitions: '0' is not a whole number of at least 1"),
        (["bench", "--prompts", "x", "--batch-size", "0"], "--batch-size: '0' is not a whole number of at least 1"),
        (["tune", "--prompts", "x", "--finalists", "0"], "--finalists: '0' is not a whole number of at least 1"),
        (["check", "--samples", "-5"], "--samples: '-5' is not a whole number of at least 0"),
        (["check", "--batch", "0"], "--batch: '0' is not a whole number of at least 1"),
        (["generate", "--threads", "-2"], "--threads: '-2' is not a whole number of at least 1"),
        (["generate", "--max-new-tokens", "few"], "--max-new-tokens: 'few' is not a whole number of at least 1"),
        (["generate", "--seed", "1" * 30], "is not a whole number from -9223372036854775808 to 18446744073709551615"),
        (["generate", "--temperature", "nan"], "--temperature: 'nan' is not a number of at least 0"),
        (["generate", "--top-p", "1.5"], "--top-p: '1.5' is not a number from 0 to 1"),
        (["check", "--samples", "abc"], "--samples: 'abc' is not a whole number of at least 0"),
        (["check", "--temperature", "0"], "--temperature: '0' is not a number above 0"),
        (["tune", "--prompts", "x", "--minutes", "nan"], "--minutes: 'nan' is not a number above 0"),
        (["tune", "--prompts", "x", "--lenience-values", "0.5"], "'0.5' is not a number of at least 1"),
    ],
)
def test_counts_are_checked_before_anything_is_loaded(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--target", "x"])
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(capsys, tmp_path):
    """A missing folder, and a saved cascade, wherever a model is expected."""
    csdraft.CascadeDrafter([MaxGram()]).save_pretrained(tmp_path / "cascade")
    saved, nowhere = str(tmp_path / "cascade"), str(tmp_path / "nowhere")
    for arguments in (["generate", "--prompt", "a", "--target"], ["inspect", "models/smol-eagle3", "--target"]):
        assert main([*arguments, nowhere]) == 2
        assert f"there is no folder {nowhere!r}" in capsys.readouterr().err
        assert main([*arguments, saved]) == 2
        assert f"{saved!r} is a saved cascade, not a model" in capsys.readouterr().err
    assert main(["generate", "--prompt", "a", "--target", "models/smol-target", "--drafter", saved]) == 2
    assert "or as --cascade" in capsys.readouterr().err
    assert main(["doctor", saved]) == 1
    assert "is a saved cascade" in capsys.readouterr().out


def test_a_file_that_is_not_utf_8_is_named(folder, capsys, tmp_path):
    (latin := tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    target = ["--target", str(folder / "target")]
    chat = ["--prompt", "a", "--chat", "--chat-template", str(latin)]
    for arguments in (["generate", "--file", str(latin)], ["generate", *chat]):
        assert main([*arguments, *target]) == 2
        assert f"the file {str(latin)!r} cannot be read as UTF-8 text: 'utf-8'" in capsys.readouterr().err


def test_a_k_matrix_may_be_auto(models, capsys):
    assert main(["generate", *models, "--prompt", PROMPT, "--max-new-tokens", "2", "--k-matrix", "auto"]) == 0
    assert 'k_matrix="auto" was planned for' in capsys.readouterr().err


def test_a_k_matrix_is_json(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--target", str(folder / "target"), "--k-matrix", "[1,"])
    assert "is not JSON" in capsys.readouterr().err


# generate and report.


@pytest.mark.parametrize("extra", [[], ["--drafter", "max_gram", "--k-matrix", "[[2, 3], [0, 2]]"]])
def test_generate_writes_what_plain_generate_writes(models, capsys, extra):
    assert main(["generate", *models, *extra, "--prompt", PROMPT, "--max-new-tokens", "30"]) == 0
    assert capsys.readouterr().out == plainly_written() + "\n"


def test_generate_with_a_saved_cascade(folder, capsys, tmp_path):
    cascade = csdraft.CascadeDrafter([drafter_of("llama")], k_matrix=4)
    cascade.save_pretrained(tmp_path / "cascade", target=tiny("llama"))
    arguments = ["--target", str(folder / "target"), "--cascade", str(tmp_path / "cascade"), "--prompt", PROMPT]
    assert main(["generate", *arguments, "--max-new-tokens", "30", "--report"]) == 0
    printed = capsys.readouterr()
    assert printed.out == plainly_written() + "\n"
    assert "block efficiency" in printed.err


def test_generate_without_a_drafter(folder, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = ["--target", str(folder / "target"), "--file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "30"]
    assert main(["generate", *arguments, "--report"]) == 0
    printed = capsys.readouterr()
    assert printed.out == plainly_written() + "\n"
    assert "target itself" in printed.err, "assistant='auto' has a report"


def test_generate_with_an_encoder_decoder(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    model = ["--target", str(folder / "t5"), "--drafter", "max_gram", "--max-new-tokens", "30"]
    assert main(["generate", *model]) == 0
    inputs = tokenizer()(PROMPT, return_tensors="pt")
    ids = tiny("t5").generate(**inputs, do_sample=False, max_new_tokens=30)[0]
    assert capsys.readouterr().out == tokenizer().decode(ids, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}"])
def test_an_empty_text_is_explained(folder, tmp_path, capsys, template):
    ends = copy.deepcopy(tiny("llama"))
    ends.generation_config.eos_token_id = list(range(ends.config.vocab_size))
    ends.generation_config.suppress_tokens = list(range(SPECIAL + 1, ends.config.vocab_size))
    ends.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    arguments = ["generate", "--target", str(tmp_path), "--prompt", PROMPT]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == "\n"
    assert "ended the text at once" in printed.err
    assert ("--chat" in printed.err) == bool(template)
    assert main([*arguments, "--chat"]) == (0 if template else 2)
    assert "which --chat applies" not in capsys.readouterr().err


def test_a_chat_template_is_applied(folder, models, capsys):
    template = (
        "{% for message in messages %}abc{{ message.content }}{% endfor %}{% if add_generation_prompt %}d{% endif %}"
    )
    arguments = ["generate", *models, "--max-new-tokens", "20", "--prompt"]
    assert main([*arguments, "abcxyd"]) == 0
    wanted = capsys.readouterr().out
    (folder / "target" / "chat_template.jinja").write_text(template)
    assert main([*arguments, "xy", "--chat"]) == 0
    assert capsys.readouterr().out == wanted


def test_sampling_repeats_with_its_seed(models, capsys):
    arguments = ["generate", *models, "--prompt", PROMPT, "--max-new-tokens", "20", "--temperature", "1.5"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_colours_are_levels(models, capsys, tmp_path):
    """Without its colours the text is the same, and as many tokens are coloured as were drafted."""
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "30", "--schedule", "fixed"]
    saved = tmp_path / "report.json"
    assert main(["generate", *models, *arguments, "--color", "--save-report", str(saved)]) == 0
    text, legend = capsys.readouterr().out.split("\n\n")
    assert ESCAPE.sub("", text) == plainly_written()
    report = Report.load(saved)
    drafted = [token for token, level in zip(report.tokens[0], report.levels[0], strict=True) if level]
    assert text.count("\x1b[36m") == sum(token > SPECIAL for token in drafted) > 0  # one character a token
    assert f"small (cyan) {len(drafted)}" in legend


def test_a_report_travels(models, capsys, tmp_path):
    """Printed at once, saved, printed again, added up, made into a page."""
    saved, page = str(tmp_path / "report.json"), tmp_path / "page.html"
    assert main(["generate", *models, "--prompt", PROMPT, "--report", "--save-report", saved]) == 0
    printed = capsys.readouterr().err.strip()
    assert main(["report", saved]) == 0
    assert capsys.readouterr().out.strip() == printed
    assert main(["report", saved, saved]) == 0
    assert "in 2 calls" in capsys.readouterr().out
    assert main(["report", saved, "--html", str(page), "--tokenizer", models[1]]) == 0
    assert "<!doctype html>" in page.read_text(encoding="utf-8")
    assert main(["report", saved, "--tokenizer", models[1]]) == 2
    assert "--tokenizer has no effect without --html" in capsys.readouterr().err


def test_what_is_no_report_is_refused(capsys, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert main(["report", str(tmp_path / "other.json")]) == 2
    assert "csdraft_report" in capsys.readouterr().err


# check.


@dataclass(frozen=True)
class Gullible(Match):
    """Takes whatever is drafted: the fault that `check` is there to find."""

    def verify(self, draft, scores, sampler, root=-1):
        del root
        accepted = list(range(len(draft)))
        return Verdict(accepted, EOS, True) if not accepted else Verdict(accepted, None, draft.tokens[-1] == EOS)


@dataclass(frozen=True)
class Hasty(Match):
    """Ends the text after its first round."""

    def verify(self, draft, scores, sampler, root=-1):
        verdict = super().verify(draft, scores, sampler, root)
        return Verdict(verdict.accepted, verdict.next_token, True)


@pytest.fixture
def opened(models) -> _models.Opened:
    parser = argparse.ArgumentParser()
    csdraft_command.add_model_arguments(parser)
    csdraft_command.add_drafting_arguments(parser)
    opened = _models.open_models(parser.parse_args([*models, "--schedule", "fixed"]))
    opened.target.generation_config = check._bare(opened.target.generation_config)
    return opened


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_check_passes(models, capsys, tmp_path, dtype):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "abc", "zyxwvu")))
    arguments = ["--prompts", str(prompts), "--max-new-tokens", "20", "--samples", "200", "--dtype", dtype]
    assert main(["check", *models, *arguments, "--schedule", "fixed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 2 * 2 + 1
    assert all(line.startswith("PASS") for line in lines[:-1])


def test_check_passes_an_encoder_decoder(folder, capsys):
    arguments = ["--target", str(folder / "t5"), "--drafter", "max_gram", "--max-new-tokens", "20", "--samples", "100"]
    assert main(["check", *arguments]) == 0
    assert "FAIL" not in capsys.readouterr().out


@pytest.mark.parametrize("verifier", [Gullible(), Hasty()])
def test_check_finds_a_changed_text(opened, verifier):
    opened.options["verifier"] = verifier
    inputs = _models.encode(opened, PROMPT, 4)
    assert not check.greedy(opened, inputs, 20, "greedy").passed


def test_check_passes_kernels_that_round_the_last_bit_otherwise():
    """In bfloat16 with eager attention both forwards that measure the rounding may give the same bits."""
    target = copy.deepcopy(tiny("llama", "eager")).to(torch.bfloat16)

    def last_bit(module, args, kwargs, output):
        if any(isinstance(value, SlotCache) for value in kwargs.values()):
            output.logits = output.logits * (
                1 + torch.finfo(torch.bfloat16).eps * torch.randn(output.logits.shape).sign()
            )
        return output

    target.register_forward_hook(last_bit, with_kwargs=True)
    opened = _models.Opened(target, tokenizer(), MaxGram(), {"schedule": Fixed()})
    outcomes = [check.greedy(opened, prompt(seed=seed), 32, "greedy") for seed in range(4)]
    assert all(outcome.passed for outcome in outcomes), outcomes
    assert any("leaves" in outcome.detail for outcome in outcomes)


def test_check_finds_a_changed_distribution(opened):
    opened.options["verifier"] = Gullible()
    args = argparse.Namespace(samples=400, batch=100, sampled_tokens=3, temperature=1.0)
    control, sampling = check.distribution(opened, _models.encode(opened, PROMPT, 4), args, "prompt")
    assert control.passed
    assert not sampling.passed


def test_check_compares_no_samples_that_are_all_different(opened):
    args = argparse.Namespace(samples=5, batch=5, sampled_tokens=30, temperature=9.0)
    with pytest.raises(ValueError, match="--samples 5: too few to compare 10 different texts of 30 tokens"):
        list(check.distribution(opened, _models.encode(opened, PROMPT, 30), args, "prompt"))


def test_a_failed_check_is_the_exit_status(models, capsys, monkeypatch):
    monkeypatch.setattr(check, "greedy", lambda *args: check.Outcome(False, "greedy", "changed"))
    assert main(["check", *models, "--samples", "0"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_single_steps_and_one_forward_are_the_same_logits(opened):
    inputs = _models.encode(opened, PROMPT, 4)
    tokens = torch.tensor([5, 9, 33, 20])
    steps, whole = (f(opened.target, inputs, tokens) for f in (check.single_steps, check.one_forward))
    assert steps.shape == whole.shape == (4, opened.target.config.vocab_size)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-4)


def test_chi_square_is_the_textbook_one():
    first, second = Counter(a=50, b=30, c=20, d=2), Counter(a=35, b=45, c=21, e=3)
    pooled = [[50, 30, 20, 2], [35, 45, 21, 3]]
    expected = scipy.stats.chi2_contingency(pooled, correction=False)
    statistic, freedom, p = check.chi_square(first, second)
    assert (statistic, freedom, p) == pytest.approx((expected.statistic, expected.dof, expected.pvalue))
    assert check.chi_square(Counter(a=5), Counter(a=7)) == (0.0, 0, 1.0)


def test_real_models(shared_data, capsys, tmp_path):
    """Trained models on code, as a user would check them."""
    paths = [shared_data / "models" / name for name in ("code-5M", "code-1M")]
    if not all(path.is_dir() for path in paths):
        pytest.skip("the optional data has no code models")
    (tmp_path / "prompts.txt").write_text("def fibonacci(n):\nclass Stack:\n")
    arguments = ["--target", str(paths[0]), "--drafter", str(paths[1]), "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["check", *arguments, "--max-new-tokens", "24", "--samples", "0", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.count("PASS") == 2
