"""Distil a drafter to a target.

accelerate launch scripts/distill_drafter.py --config recipes/smol/distill.yaml learning_rate=1e-3

The same command continues an interrupted run. Exit status: 0 finished, 1 error, 130 or 143 after a signal.
The launchers of accelerate and torchrun have a status of their own after a signal, mostly 1.
"""

from csdraft.trainers.command import run_script
from csdraft.trainers.distill_arguments import DistillArguments
from csdraft.trainers.run import distill, is_finished


def main(args: DistillArguments) -> int:
    return 0 if is_finished(args) else distill(args).status


if __name__ == "__main__":
    run_script(__doc__, DistillArguments, main)
