"""Texts that are saved with a cascade: its model card, and the shim for `custom_generate` of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["SHIM", "SIGNATURE", "filled", "model_card"]

CARD = Path(__file__).with_name("cascade_card.md")
"""Template of the model card."""
SIGNATURE = "<!-- Written by csdraft. Delete this line to keep your own text when the cascade is saved again. -->"

SHIM = '''"""Runs this cascade: generate(..., custom_generate="here", assistant="here", trust_remote_code=True)."""

try:
    from csdraft.hook import generate as drafted
except ImportError as error:
    raise ImportError("this cascade of drafters runs with csdraft: pip install -U csdraft") from error


def generate(inputs=None, *args, model, assistant=None, **kwargs):
    if assistant is None:
        raise ValueError("assistant=None; pass this repository, as in custom_generate=, or leave both out")
    return drafted(model, inputs, *args, assistant=assistant, **kwargs)
'''


def filled(template: Path, **values: Any) -> str:
    """A Jinja template with these values; one that is missing is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def model_card(document: dict[str, Any], provenance: dict[str, Any], name: str, lossless: bool) -> str:
    """The README.md of a saved cascade.

    Args:
        document: the content of cascade.json.
        provenance: the content of provenance.json.
        name: the folder's name or Hub id.
        lossless: whether its verifier is lossless.
    """
    matrix = {key: json.dumps(document[key]) for key in ("k_matrix", "lenience")}
    given = {**document, **provenance, **matrix, "target": document["target"]["name"]}
    return filled(CARD, **given, name=name, lossless=lossless, signature=SIGNATURE)
