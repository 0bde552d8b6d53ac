"""The options of a distillation, and checks of their values."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from csdraft.data.target import DataArguments, check_at_least, option
from csdraft.trainers.arguments import RunArguments
from csdraft.trainers.engines import uses
from csdraft.trainers.evaluation import check_figure
from csdraft.trainers.objective import Objective
from csdraft.trainers.students import kind_asked
from csdraft.trainers.students._student import Student

__all__ = ["DistillArguments"]


@dataclass
class DistillArguments(DataArguments, RunArguments):
    """`transformers.TrainingArguments`, unchanged, and the options for distilling a drafter."""

    target_quantization: dict | None = option(
        None, "How the target is quantised, such as {quant_method: bitsandbytes, load_in_8bit: true}."
    )
    target_sharded: bool = option(
        False, "ZeRO-3 spreads the target's weights over the processes, but not the student's."
    )

    student: str | None = option(None, "Folder or Hub id of the model to start from.")
    init: dict | None = option(
        None,
        "Makes a new student instead: {from_target: {layers: [0, 15]}}, with `shared: true` for self-drafting (needs "
        "`peft`), {config: {...}}, or a head: {eagle3: {draft_vocab: 8192}}.",
    )
    peft: dict | None = option(
        None, "Options of LoRA on the student, or on the target's own layers that `init` shares."
    )

    max_length: int = option(512, "Tokens of a packed block; longer texts are cut.")
    target_cache: str | None = option(
        None,
        "Folder with what the target computes on these texts: its largest logits (scripts/cache_logits.py), or for a "
        "head its hidden states (scripts/cache_features.py).",
    )
    packing: bool = option(True, "Packs several texts into a block; they do not see each other.")

    losses: dict = option({"forward_kl": 1.0}, "Losses of csdraft/losses by name, with their weights.")
    student_temperature: float = option(1.0, "Divides the student's logits in the loss.")
    target_temperature: float = option(1.0, "Divides the target's logits in the loss.")
    chunk: int = option(256, "Positions whose logits are held in memory at once.")
    on_policy: float = option(0.0, "Share of the texts that the student writes itself, after their first tokens.")
    on_policy_prompt: int = option(64, "Tokens kept at least at the start of such a text.")

    temperature: float = option(
        1.0, "Temperature at which drafts will be used; for the student's own texts and sampled evaluation."
    )
    eval_prompts: str | None = option(None, "Held-out prompts to evaluate on, from any source; none is no evaluation.")
    eval_split: str = option("test", "Split of the held-out prompts.")
    eval_limit: int = option(24, "Most held-out prompts to use.")
    eval_depth: int = option(5, "Drafted tokens a round when evaluating.")
    eval_new_tokens: int = option(64, "Tokens of each text when evaluating.")

    learning_rate: float = option(
        None, "Peak learning rate; none is the default for the kind of student, see docs/distilling.md."
    )
    metric_for_best_model: str | None = option(
        None, "Figure that the best checkpoint is chosen by; none is block_efficiency."
    )
    license: str | None = option(None, "Licence on the drafter's card, such as 'apache-2.0'; none is the target's.")
    use_cache: bool = option(True, "`use_cache` of the student's config; it decodes while it is trained.")
    remove_unused_columns: bool = option(False, "Without effect: batches hold what the trainer needs.")

    def __post_init__(self) -> None:
        if (self.deepspeed or self.target_sharded or uses("DeepSpeed")) and importlib.util.find_spec(
            "deepspeed"
        ) is None:
            raise ValueError("deepspeed is needed and not installed: pip install csdraft[deepspeed]")
        if self.learning_rate is None:
            self.learning_rate = self.kind.rate
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError(
                "save_strategy='best' without evaluations saves nothing: give eval_strategy=steps and "
                "eval_prompts=FILE, or save_strategy=steps"
            )
        follows = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        chooses = follows or self.load_best_model_at_end or self.save_strategy == "best"
        if chooses and self.metric_for_best_model is None:
            self.metric_for_best_model = "block_efficiency"
        super().__post_init__()
        if follows:  # unlike a loss, every figure should rise
            self.lr_scheduler_kwargs = {"mode": "max"} | dict(self.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        self._check_numbers()
        _ = self.chat  # checks the chat template
        if self.target_cache and self.on_policy:
            raise ValueError(f"target_cache with on_policy={self.on_policy}: new texts are in no cache; leave one out")
        if self.target_sharded and (self.target_device_map is not None or self.target_quantization is not None):
            raise ValueError(
                "target_sharded=true spreads the target's own weights over the processes: leave out target_device_map "
                "and target_quantization, or target_sharded"
            )

    def _check_numbers(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy={self.on_policy} is a share of the texts: give a number from 0 to 1")
        check_at_least(self, 2, "max_length")  # a text of one token has nothing to learn
        check_at_least(self, 1, "eval_depth", "eval_new_tokens", "eval_limit", "dataset_limit")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: the losses compare with the target's "
                "distributions and do not read it; leave it out"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; greedy drafting is measured anyway")
        if self.metric_for_best_model is not None:
            check_figure(self.metric_for_best_model.removeprefix("eval_"), self.eval_depth, self.eval_new_tokens)

    @property
    def kind(self) -> Student:
        """The kind of student that `student`, `init` and `peft` make."""
        return kind_asked(self.student, self.init, self.peft)

    @property
    def objective(self) -> Objective:
        return Objective(self.losses, self.student_temperature, self.target_temperature, self.chunk)
