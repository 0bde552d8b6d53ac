"""What is read before training: which split of the data, and which of the prompts."""

from __future__ import annotations

import datasets

from csdraft.trainers.run import make_evaluation, prepare
from tests.trainers.pair import arguments, make_pair


def test_data_and_prompts_come_from_the_splits_that_are_named(tmp_path):
    folder = make_pair(tmp_path)
    texts = {name: [f"{name} = y + {i}\n" * 3 for i in range(count)] for name, count in (("one", 5), ("two", 3))}
    data = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in texts.items()})
    data.save_to_disk(tmp_path / "texts")
    source = {"dataset": str(tmp_path / "texts"), "eval_prompts": str(tmp_path / "texts")}
    for split, prompts in (("one", "two"), ("two", "one")):
        args = arguments(folder, "out", **source, split=split, eval_split=prompts, max_length=200, eval_new_tokens=8)
        config, tokenizer, batches = prepare(args)
        read = [tokenizer.decode(row["input_ids"]) for row in batches["train_dataset"]]
        assert len(read) == len(texts[split])
        assert all(texts[split][i] in read[i] for i in range(len(read)))
        evaluation = make_evaluation(args, config, tokenizer)
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in evaluation.prompts] == texts[prompts]
