"""Show a saved report in the terminal or turn it into a page; several are added up."""

from __future__ import annotations

import argparse
from functools import reduce

from csdraft.reports.report import Report

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `csdraft generate --save-report` wrote")
    parser.add_argument("--html", metavar="PATH", help="write a page: the tables, and the text coloured by level")
    parser.add_argument("--tokenizer", metavar="PATH", help="path or Hub id; without it the page shows token ids")


def run(args: argparse.Namespace) -> int:
    report = reduce(Report.merged, map(Report.load, args.files))
    if args.html is None:
        print(report)
        return 0
    tokenizer = None
    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    report.to_html(args.html, tokenizer)
    print(f"wrote {args.html}")
    return 0
