"""csdraft: exact, batched speculative decoding with cascades of drafters. Importing it teaches generate `assistant=`."""

import os

from csdraft.cascade import CascadeDrafter
from csdraft.decoding.interfaces import Drafter
from csdraft.drafters.model import ModelDrafter
from csdraft.hook import decode, enable, install

__version__ = "0.1.0"
__all__ = ["CascadeDrafter", "Drafter", "ModelDrafter", "decode", "enable", "install"]

if os.environ.get("CSDRAFT_NO_PATCH", "") in ("", "0"):
    install()
