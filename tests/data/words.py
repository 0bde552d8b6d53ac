"""A tokenizer of whole words with the special tokens of the tiny models, chat templates, and texts to read with it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny import BOS, EOS, PAD, VOCAB, fresh

WORDS = ["<pad>", "</s>", "<s>", "<user>", "<assistant>", "<system>", *(f"w{i}" for i in range(VOCAB - 6))]
TURN = "<{{ message['role'] }}> {{ message['content'] }} </s> "
HEADER = "{% if add_generation_prompt %}<assistant> {% endif %}"
PLAIN = "{% for message in messages %}" + TURN + "{% endfor %}" + HEADER
MARKED = (
    "{% for message in messages %}<{{ message['role'] }}> {% if message['role'] == 'assistant' %}"
    "{% generation %}{% if message['content'] %}{{ message['content'] }} {% endif %}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }} </s>{% endif %} {% endfor %}" + HEADER
)
FORGETFUL = PLAIN.replace(
    TURN, "<{{ message['role'] }}> {% if not loop.last %}{{ message['content'].split('w9 ')[-1] }}{% else %}"
    "{{ message['content'] }}{% endif %} </s> "
)  # fmt: skip
"""Drops what an assistant thought (up to w9) in earlier turns."""

CALLING = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' if message['role'] != 'tool' else '<user>' }} "
    "{% for call in message.tool_calls or [] %}{{ call.function.name }} "
    "{% for name, value in call.function.arguments.items() %}{{ name }} {{ value }} {% endfor %}{% endfor %}"
    "{% if message.content is string %}{{ message.content + ' ' }}{% endif %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> "
    "{% if enable_thinking is defined and not enable_thinking %}w0 {% endif %}{% endif %}"
)
"""Writes tools and tool calls; without thinking, the assistant's header ends with w0."""
NEEDS_CONTENT = CALLING.replace("{% if message.content is string %}", "").replace("{% endif %}</s>", "</s>")
"""Fails on a message without content."""
PARTED = PLAIN.replace("{{ message['content'] }}", "{% for part in message['content'] %}{{ part.text }} {% endfor %}")
"""Takes content in parts alone."""
LATE = PLAIN.replace(
    TURN,
    "{% if message['role'] != 'system' %}<{{ message['role'] }}> {% if loop.last and message['role'] == 'user' and "
    "messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% endif %}"
    "{{ message['content'] }} </s> {% endif %}",
)
"""Writes the system's words into the last turn, as Mistral's: a question is written otherwise once it is answered."""
CLOSED = PLAIN.replace("{% endif %}", "{% else %}<pad> {% endif %}")
"""Ends whatever is not to be continued, as Phi-3's."""
STRICT = PLAIN.replace(
    TURN,
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}" + TURN,
)


def make_tokenizer(template: str | None = None, opens: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; `opens`: every text gets the begin-of-text token by the tokenizer itself."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if opens:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=WORDS[PAD],
        eos_token=WORDS[EOS],
        bos_token=WORDS[BOS] if opens else None,
        chat_template=template,
    )


def sentence(words: int, seed: int = 0) -> str:
    chosen = random.Random(seed)
    return " ".join(f"w{chosen.randrange(VOCAB - 6)}" for _ in range(words))


def write_lines(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_target(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A tiny random target with the tokenizer of words."""
    fresh(family, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
