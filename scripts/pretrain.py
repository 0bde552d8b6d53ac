"""Train a causal language model from scratch.

python scripts/pretrain.py --config recipes/smol/target.yaml max_steps=100

The same command goes on where an interrupted run stopped. Exit status: 0 finished, 1 error, 130 or 143 after a signal.
The launchers of accelerate and torchrun have a status of their own after a signal, mostly 1.
"""

from csdraft.trainers.command import run_script
from csdraft.trainers.pretrain import PretrainArguments, pretrain
from csdraft.trainers.run_folder import is_finished


def main(args: PretrainArguments) -> int:
    return 0 if is_finished(args) else pretrain(args).status


if __name__ == "__main__":
    run_script(__doc__, PretrainArguments, main)
