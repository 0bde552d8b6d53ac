"""`csdraft report`: shows a saved report, or writes it as a web page."""

from __future__ import annotations

import argparse
from functools import reduce

from csdraft.cli._models import open_tokenizer
from csdraft.reports.report import Report

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    if args.tokenizer and args.html is None:
        raise ValueError("--tokenizer has no effect without --html: leave it out, or give a page's path")
    report = reduce(Report.merged, map(Report.load, args.files))
    if args.html is None:
        print(report)
        return 0
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else None
    report.to_html(args.html, tokenizer)
    print(f"wrote {args.html}")
    return 0
