"""The options of a distillation, and checks of their values."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from csdraft.data.chat import chat_of
from csdraft.trainers.engines import uses
from csdraft.trainers.evaluation import check_figure
from csdraft.trainers.objective import Objective
from csdraft.trainers.run_arguments import RunArguments
from csdraft.trainers.students import kind_asked
from csdraft.trainers.students._student import Student

__all__ = ["DistillArguments"]


@dataclass
class DistillArguments(RunArguments):
    """`transformers.TrainingArguments`, unchanged, and the options for distilling a drafter."""

    target: str = field(default="models/smol-target", metadata={"help": "Folder or Hub id of the model to draft for."})
    target_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the target."})
    target_dtype: str = field(default="auto", metadata={"help": "dtype of the frozen target's weights."})
    target_device_map: str | None = field(
        default=None, metadata={"help": "Where the target's layers go, such as 'auto'; none is the student's device."}
    )
    target_quantization: dict | None = field(
        default=None,
        metadata={"help": "How the target is quantised, such as {quant_method: bitsandbytes, load_in_8bit: true}."},
    )
    target_sharded: bool = field(
        default=False,
        metadata={"help": "ZeRO-3 spreads the target's weights over the processes; the student's stay as they are."},
    )

    student: str | None = field(default=None, metadata={"help": "Folder or Hub id of the model to start from."})
    init: dict | None = field(
        default=None,
        metadata={
            "help": "Makes a new student instead: {from_target: {layers: [0, 15]}}, with `shared: true` for "
            "self-drafting (needs `peft`), {config: {...}}, or a head: {eagle3: {draft_vocab: 8192}}."
        },
    )
    peft: dict | None = field(
        default=None,
        metadata={"help": "Options of LoRA on the student, or on the target's own layers that `init` shares."},
    )

    dataset: str = field(
        default="stdlib", metadata={"help": "Texts to train on: a Hub id, a file, a folder, or 'stdlib'."}
    )
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    dataset_limit: int | None = field(
        default=None, metadata={"help": "Texts of the data set that are used at most; none is all."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Chat template: a file, its text or its name; none is the tokenizer's."}
    )
    chat_template_options: dict | None = field(
        default=None,
        metadata={"help": "What the template reads besides messages, such as {enable_thinking: false}, or tools."},
    )
    max_length: int = field(default=512, metadata={"help": "Tokens of a packed block; longer texts are cut."})
    target_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of what the target computes along these texts: its largest logits "
            "(scripts/cache_logits.py), or for a head its hidden states (scripts/cache_features.py)."
        },
    )
    packing: bool = field(
        default=True, metadata={"help": "Puts several texts into a block, where they do not see each other."}
    )

    losses: dict = field(
        default_factory=lambda: {"forward_kl": 1.0},
        metadata={"help": "Losses of csdraft/losses by name, with their weights."},
    )
    student_temperature: float = field(default=1.0, metadata={"help": "Divides the student's logits in the loss."})
    target_temperature: float = field(default=1.0, metadata={"help": "Divides the target's logits in the loss."})
    chunk: int = field(default=256, metadata={"help": "Positions whose logits are held in memory at once."})
    on_policy: float = field(
        default=0.0, metadata={"help": "Share of the texts that the student writes itself, after their first tokens."}
    )
    on_policy_prompt: int = field(
        default=64, metadata={"help": "Tokens at the start of such a text that are kept at least."}
    )

    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature at which drafts will be used: of the student's own texts and of sampled evaluation."
        },
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts to evaluate on, from any source; none is no evaluation."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split of the held-out prompts."})
    eval_limit: int = field(default=24, metadata={"help": "Held-out prompts used at most."})
    eval_depth: int = field(default=5, metadata={"help": "Drafted tokens a round when evaluating."})
    eval_new_tokens: int = field(default=64, metadata={"help": "Tokens of each text when evaluating."})

    learning_rate: float = field(
        default=None,  # type: ignore[arg-type]
        metadata={"help": "Rate at its highest; none takes one for the kind of student, see docs/distilling.md."},
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Figure by which load_best_model_at_end chooses; none is block_efficiency."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the drafter, for its card, such as 'apache-2.0'; none is the target's."},
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Whether the student's config says so; it decodes while it is trained."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Without effect: batches hold what the trainer needs."}
    )

    def __post_init__(self) -> None:
        if (self.deepspeed or uses("DeepSpeed")) and importlib.util.find_spec("deepspeed") is None:
            raise ValueError("deepspeed is needed and not installed: pip install csdraft[deepspeed]")
        if self.student is not None and self.init is not None:
            raise ValueError(
                "student and init are both given; start from the one (init=null) or make the other (student=null)"
            )
        if self.learning_rate is None:
            self.learning_rate = self.kind.rate
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "block_efficiency"
        super().__post_init__()
        self._check_numbers()
        _ = chat_of(self)  # checks the chat template
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
        if self.on_policy and self.on_policy_prompt >= self.max_length:
            raise ValueError(
                f"on_policy_prompt={self.on_policy_prompt} leaves nothing to write in texts of max_length="
                f"{self.max_length} tokens; keep fewer"
            )
        for name in ("max_length", "eval_depth", "eval_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dataset_limit is not None and self.dataset_limit < 1:
            raise ValueError(f"dataset_limit={self.dataset_limit} leaves no text; give at least 1, or leave it out")
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
