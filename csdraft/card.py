"""Texts that are saved with a cascade: its model card, and the shim for `custom_generate` of transformers."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["SHIM", "SIGNATURE", "model_card"]

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


def model_card(document: dict[str, Any], provenance: dict[str, Any], name: str, lossless: bool) -> str:
    """The README.md of a saved cascade.

    Args:
        document: the content of cascade.json.
        provenance: the content of provenance.json.
        name: the folder's name or Hub id.
        lossless: whether its verifier is lossless.
    """
    target, versions, figures = document["target"]["name"], provenance["versions"], provenance["measured"]
    base = f"base_model: {target}\n" if target and "/" in target else ""
    promise = (
        "It drafts tokens, the target checks them: what `generate` writes stays the target's own."
        if lossless
        else "It changes what `generate` writes: its verifier is not lossless."
    )
    drafters = "\n".join(
        f"| {i} | {drafter['type']} | {', '.join(f'{k}={v}' for k, v in drafter.items() if k != 'type' and v)} |"
        for i, drafter in enumerate(document["drafters"])
    )
    return f"""---
library_name: csdraft
{base}tags:
- csdraft
- speculative-decoding
- custom_generate
---

{SIGNATURE}

# {name}

A cascade of drafters for speculative decoding{f" of {target}" if target else ""}, made with csdraft. {promise}

```python
import csdraft  # pip install csdraft

output = model.generate(**inputs, assistant="{name}")  # this folder's path or Hub id
```

or, through transformers alone (csdraft must be installed):

```python
output = model.generate(**inputs, custom_generate="{name}", assistant="{name}", trust_remote_code=True)
```

| | drafter | options |
|---|---|---|
{drafters}

k_matrix `{json.dumps(document["k_matrix"])}`, lenience `{json.dumps(document["lenience"])}`, \
verifier `{document["verifier"]["type"]}`, schedule `{document["schedule"]["type"]}`. \
Made with {", ".join(f"{k} {v}" for k, v in versions.items())}.
{_measured(figures) if figures else ""}"""


def _measured(figures: dict[str, Any]) -> str:
    """The figures of the cascade's calls before it was saved."""
    return f"""
Measured in use, before saving:

| calls | tokens | block efficiency | acceptance rate |
|---|---|---|---|
| {figures["calls"]} | {figures["emitted"]} | {figures["block_efficiency"]:.2f} | {figures["acceptance_rate"]:.2f} |

Block efficiency is tokens a target call (1 without drafts).
"""
