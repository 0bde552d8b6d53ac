"""`csdraft inspect`: describes a stored head, and says which serving engines would load it."""

from __future__ import annotations

import argparse

from csdraft.export import served_target
from csdraft.heads.engines import ENGINES
from csdraft.heads.folder import config_at
from csdraft.heads.stored_head import head_at

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    head = head_at(args.folder)
    if head is None:
        raise ValueError(
            f"{args.folder!r} does not exist or holds no head that csdraft knows; for a model, try `csdraft doctor`"
        )
    lines, target = head.described(), None if args.target is None else served_target(args.target)
    config, tensors = config_at(args.folder) or {}, head.weights(args.folder)
    for engine, name in ENGINES.items():
        faults = head.faults(engine, config, tensors, target)
        lines[name] = f"would not: {'; '.join(faults)}" if faults else "loads it"
    width = max(map(len, lines))
    for topic, words in lines.items():
        print(f"{topic:{width}}  {words}")
    return 0
