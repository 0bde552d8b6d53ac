"""`csdraft doctor`: what it says of machine, versions and models, as a page and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from csdraft import doctor
from csdraft.cli import main
from csdraft.doctor import ModelState, Package, fast_dtype
from tests.tiny import fresh, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    short = fresh("gpt2", max_position_embeddings=12)
    made = {"good": tiny("llama"), "t5": tiny("t5"), "short": short, "state": tiny("lfm2")}
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


def test_the_page_says_what_each_model_can_do(folders, capsys):
    assert main(["doctor", folders["good"], folders["short"], folders["t5"]]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 50
    assert "transformers" in out.split("Versions")[1]
    for name in ("good", "short"):
        (part,) = [part for part in out.split("\n\n") if part.startswith(folders[name])]
        assert "exact with drafts   yes" in part
        assert "forwards captured   no: no graphs on cpu" in part
        assert ("16:" in part) == (name == "good")
        assert ("8 tokens costs" in part) or ("kept the machine busy" in part)
    (part,) = [part for part in out.split("\n\n") if part.startswith(folders["t5"])]
    assert "exact with drafts   yes" in part
    assert "not timed" in part


def test_what_cannot_be_decoded_or_loaded_is_the_exit_status(folders, capsys):
    assert main(["doctor", "--json", folders["state"], "no/such-model-here"]) == 1
    document = json.loads(capsys.readouterr().out)
    state, missing = document["models"]
    assert "whose state cannot be rolled back" in state["refused"]
    assert (missing["described"], state["milliseconds"]) == ("cannot be loaded", {})
    assert document["machine"]["threads"] >= 1


def test_json_has_seconds_by_width(folders, capsys):
    assert main(["doctor", "--json", folders["good"]]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert list(model["milliseconds"]) == ["1", "4", "8", "16"]
    assert model["why_not_captured"] == "no graphs on cpu"


def test_versions_out_of_bounds_are_found(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=1", "numpy>=99", "nowhere>=1", "x; extra == 'dev'"])
    fits = {one.name: one.fits for one in doctor.packages()}
    assert fits == {"csdraft": True, "python": True, "torch": True, "numpy": False, "nowhere": False}
    assert main(["doctor"]) == 1
    assert "NOT WITHIN >=99" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("eight", "advice"), [(1.1, "wide drafts pay"), (2.0, "if about half"), (5.0, "wide drafts do not pay")]
)
def test_what_to_expect_goes_by_the_price_of_eight_tokens(eight, advice):
    state = ModelState("m", "a model", milliseconds={1: 2.0, 4: 2.0, 8: 2.0 * eight, 16: 20.0})
    assert advice in state.expected
    assert f"8 tokens costs {eight:.1f} times" in state.expected
    assert "run it again" in replace(state, busy=True).expected
    assert "fewer than 8 positions" in replace(state, milliseconds={1: 2.0, 4: 2.0}).expected


def test_which_dtype_a_cpu_is_fast_in():
    def said(*units: str) -> str:
        return fast_dtype(units)

    assert "--dtype bfloat16 is usually" in said("avx2", "amx_bf16")
    assert "--dtype float32 is usually" in said("avx2")
    assert "unknown" in said()
    assert "not installed" in str(Package("torch", None, ">=2", False))
