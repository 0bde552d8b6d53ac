"""What each multi-draft verifier keeps of two or three siblings, on random laws, beside the best that is possible.

python scripts/compare_verifiers.py
python scripts/compare_verifiers.py --pairs 30 --vocabularies 8 --counts 2
"""

import argparse

from csdraft.bench.verifiers import compare, markdown

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="random pairs of a target's and a drafter's law")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[3, 4, 5], help="tokens, taken in turn")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3], help="siblings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for count in options.counts:
        print(f"\n{count} siblings, {options.pairs} pairs of laws over {options.vocabularies} tokens\n")
        print(markdown(compare(options.pairs, options.vocabularies, count, options.seed)))
