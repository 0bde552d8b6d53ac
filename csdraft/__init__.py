"""Exact, batched speculative decoding with cascades of drafters, for `generate` of Hugging Face transformers.

Importing csdraft adds the keyword `assistant` to every model's `generate`: `model.generate(**inputs,
assistant=drafter)`. The fields of `csdraft.Options` are keywords, too. Calls without any of these go to transformers
unchanged. The import changes nothing else. With the environment variable CSDRAFT_NO_PATCH=1 it changes nothing at all.
Then `csdraft.enable(model)` adds the keywords to one model and `csdraft.install()` to all models;
`custom_generate=csdraft.decode` needs neither.

After a call, `drafter.report` says how drafting went. `csdraft.report(x)` does the same for the target and for
anything that was passed as `assistant`, such as a model, a path or "auto". Nothing is set on a user's model.
"""

import os

from csdraft.cascade import CascadeDrafter
from csdraft.decoding.interfaces import Drafter
from csdraft.decoding.readers import release
from csdraft.drafters.auto import Auto
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.prompt_lookup import PromptLookup
from csdraft.drafters.vertical import Vertical
from csdraft.hook import decode, enable, install, report
from csdraft.options import Options
from csdraft.prepare import prepare
from csdraft.reports.report import Report
from csdraft.version import __version__ as __version__

__all__ = [
    "Auto", "CascadeDrafter", "Drafter", "Horizontal", "MaxGram", "ModelDrafter", "Options", "PromptLookup",
    "Report", "Vertical", "decode", "enable", "install", "prepare", "release", "report",
]  # fmt: skip

if os.environ.get("CSDRAFT_NO_PATCH", "") in ("", "0"):
    install()
