"""What a proposal of each drafter without a model costs after a long text, and what its index does.

python scripts/benchmark_lookup.py --source stdlib --history 32768
"""

import argparse
import os
import sys

from transformers import AutoTokenizer

from csdraft.bench.lookup import HISTORY, PROPOSALS, lookup_claims, lookup_table, measure_lookups
from csdraft.data.sources import read_rows

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="models/smol-target", help="default: %(default)s")
    parser.add_argument("--source", default="stdlib", help="texts, as training reads them (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=150, help="examples read (default: %(default)s)")
    parser.add_argument("--history", type=int, default=HISTORY, help="tokens of the text (default: %(default)s)")
    parser.add_argument("--proposals", type=int, default=PROPOSALS, help="timed (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    rows = read_rows(options.source, tokenizer, 1 << 20, limit=options.limit)
    tokens = [token for row in rows for token in row["input_ids"]]
    found = measure_lookups(tokens, len(tokenizer), options.history, options.proposals)
    claims = lookup_claims(found)
    print(f"{options.history:,} tokens of text, {os.cpu_count()} CPU cores\n\n{lookup_table(found)}\n")
    print("\n".join(map(str, claims)))
    sys.exit(not all(claim.passed for claim in claims))
