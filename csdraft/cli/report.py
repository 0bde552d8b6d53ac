"""`csdraft report`: shows a saved report, or writes it as a web page."""

from __future__ import annotations

import argparse
from functools import reduce

from transformers import AutoTokenizer

from csdraft.reports.report import Report

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    report = reduce(Report.merged, map(Report.load, args.files))
    if args.html is None:
        print(report)
        return 0
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False) if args.tokenizer else None
    report.to_html(args.html, tokenizer)
    print(f"wrote {args.html}")
    return 0
