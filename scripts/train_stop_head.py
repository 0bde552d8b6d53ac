"""Train the head of the schedule `stop_head` (SpecDec++, arXiv 2405.19715) on drafts that the target has judged.

    python scripts/train_stop_head.py --target models/smol-target --drafter models/smol-drafter \
        --prompts recipes/smol/prompts_tune.jsonl --out out/stop_head.safetensors

Then: `generate(..., assistant=..., schedule=StopHead("out/stop_head.safetensors"))`. Take the drafter, or the cascade,
the temperature and the kind of prompts that the head will be used with. What it learned is held against the drafter's
own confidence on texts that it has not seen.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from csdraft.cli._models import Opened, as_inputs, open_models, prompts_of_file, sampling
from csdraft.progress import Progress
from csdraft.trainers.stop_head import fit, harvest, judge
from csdraft_command import add_model_arguments, add_prompts_arguments

SEEN = 0.75
"""Share of the verified tokens that the head learns from; the rest measure it."""


def batches(opened: Opened, prompts: Sequence[Sequence[int]], progress: Progress) -> Iterator[dict[str, Any]]:
    """Each prompt as `generate` takes it."""
    for number, prompt in enumerate(prompts):
        progress("judging drafts", number / len(prompts))
        yield as_inputs(opened, prompt)
    progress("judging drafts", 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_prompts_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--verifier", metavar="TYPE", help="acceptance rule that the head will be used with")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument(
        "--depth", type=int, default=8, metavar="N", help="draft tokens a round (default: %(default)s)"
    )
    parser.add_argument(
        "--rejected-weight", type=float, default=1.0, metavar="X", help="of a rejected token; above 1 stops sooner"
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="the safetensors file to write")
    args = parser.parse_args()
    opened = open_models(args)
    if opened.assistant is None:
        parser.error("name the drafter with --drafter, or a cascade with --cascade")
    options = sampling(args.temperature, top_k=0, top_p=1.0) | {"max_new_tokens": args.max_new_tokens}
    if args.verifier:
        options["verifier"] = args.verifier
    prompts = prompts_of_file(opened, args.prompts, args, args.limit)
    progress = Progress()
    examples = harvest(opened.target, opened.assistant, batches(opened, prompts, progress), args.depth, **options)
    seen, unseen = examples.split(SEEN)
    head = fit(seen, rejected_weight=args.rejected_weight)
    head.save(args.out)
    print(f"{args.out}: from {len(seen)} verified tokens, {seen.kept.mean():.0%} of them kept")
    print(f"on {len(unseen)} tokens of later texts, cross-entropy in nats and calibration error:")
    for name, judged in (("this head", judge(head, unseen)), ("confidence", judge(None, unseen))):
        print(f"  {name:12}{judged['cross_entropy']:.3f}  {judged['calibration_error']:.3f}")


if __name__ == "__main__":
    main()
