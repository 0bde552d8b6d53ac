"""A drafter of another tokenizer reads the text in its own tokens, and what it writes comes back in the target's."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import csdraft
from csdraft.decoding.interfaces import Drafter
from csdraft.drafters.translated import TokenizerView, Translated
from tests import tiny

CORPUS = ["the cat sat on the mat and the dog sat on the log", "there are cats, dogs & ünïcödé ☃ in that house"]
GREEDY = {"max_new_tokens": 24, "do_sample": False, "schedule": "fixed", "strict": True}


def bpe(merges: int, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose words depend on how much it has merged."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=258 + merges, initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@dataclass(frozen=True, eq=False)
class Dictated(Drafter):
    """Goes on with what follows in a text, in its own tokens; writes down what it was shown."""

    view: TokenizerView
    whole: str
    depth: int = 6  # type: ignore[assignment]
    shown: list[str] = field(default_factory=list)
    open: list[int] = field(default_factory=list)

    def propose(self, contexts, budgets):
        (context,), (budget,) = contexts, budgets
        self.open.append(len(context.draft))
        self.shown.append(self.view.backend.decode([*context.text.tokens, *context.path]).removeprefix(" "))
        rest = self.whole[len(self.shown[-1]) :]
        assert self.whole.startswith(self.shown[-1])
        return [context.draft.extend(self.view.encode(rest, False)[: budget.depth], 0)]


def dictation(text: str, own: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> tuple[Dictated, list]:
    """The rounds of a target that writes `text`: how many tokens each accepted."""
    from csdraft.decoding.interfaces import Budget
    from tests.drafters.standin import StandInCall

    ids = target(text, add_special_tokens=False).input_ids
    inner = Dictated(TokenizerView(own), text)
    drafter, call = Translated(inner, own, target), StandInCall([ids[:4]], vocab=len(target))
    call.target, call.capacity, accepted = None, 64, []  # type: ignore[attr-defined]
    while len(call.texts[0]) < len(ids):
        (draft,) = drafter.propose([call.context()], [Budget(20, 20)])
        done, kept = len(call.texts[0]), 0
        while kept < len(draft) and done + kept < len(ids) and draft.tokens[kept] == ids[done + kept]:
            kept += 1
        accepted.append(kept)
        call.texts[0].append(ids[done + kept : done + kept + 1] if not kept else ids[done : done + kept + 1])
    return inner, accepted


@pytest.mark.parametrize("prefix_space", [False, True])
@pytest.mark.parametrize(("own", "target"), [(0, 80), (80, 0), (30, 80), (80, 30)])
def test_what_is_dictated_arrives(own: int, target: int, prefix_space: bool) -> None:
    text = " ".join([*CORPUS, "that cat ☃☃ is there"] * 8)
    inner, accepted = dictation(text, bpe(own, prefix_space), bpe(target))
    tokens, words = len(bpe(target)(text).input_ids), len(bpe(own, prefix_space)(text).input_ids)
    assert sum(accepted) + len(accepted) >= tokens - 4
    assert len(accepted) < 0.6 * tokens, "more than one token in two is drafted right"
    assert max(inner.open) < 50 * max(words / tokens, 1), "only the end of the text is translated anew"


def test_a_drafter_of_other_tokens_is_accepted() -> None:
    """A model that calls each token by another number, and a tokenizer that says so: as good as with the same one."""
    drafter, target = tiny.drafter_of("llama"), tiny.tiny("llama")
    order = torch.cat(
        [torch.arange(3), 3 + torch.randperm(tiny.VOCAB - 3, generator=torch.Generator().manual_seed(0))]
    )
    renamed = tiny.noisy(drafter, 0.0)
    with torch.no_grad():
        for layer in (renamed.get_input_embeddings(), renamed.get_output_embeddings()):
            layer.weight[order] = layer.weight.clone()
    vocab = tiny.tokenizer().get_vocab()
    made = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    numbers = {name: int(order[i]) for name, i in vocab.items()}
    made.model = models.WordLevel(numbers, unk_token="<pad>")
    other = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    reports = []
    for assistant in (
        csdraft.ModelDrafter(drafter),
        Translated(csdraft.ModelDrafter(renamed), other, tiny.tokenizer()),
        Translated(csdraft.ModelDrafter(renamed), tiny.tokenizer(), tiny.tokenizer()),
    ):
        output = target.generate(**tiny.prompt(), **GREEDY, assistant=assistant, return_dict_in_generate=True)
        assert (
            output.sequences.tolist() == target.generate(**tiny.prompt(), do_sample=False, max_new_tokens=24).tolist()
        )
        reports.append(output.report.block_efficiency)
    assert reports[0] == reports[1] > 1.3
    assert reports[2] < reports[1], "the wrong tokenizer"


def test_tokens_that_the_drafter_lacks_are_clamped_if_few_and_refused_if_many() -> None:
    """A model's tokenizer may have been given tokens for which the model has no embedding."""
    target, small = tiny.tiny("llama"), csdraft.ModelDrafter(tiny.fresh("llama", vocab_size=60))
    drafter = Translated(small, tiny.tokenizer(), tiny.tokenizer())
    plain = target.generate(**tiny.prompt(), do_sample=False, max_new_tokens=24)
    assert int(plain.max()) >= 60
    assert torch.equal(target.generate(**tiny.prompt(), **GREEDY, assistant=drafter), plain)
    many = tiny.tokenizer()
    many.add_tokens([f"<{i}>" for i in range(1024)])
    with pytest.raises(ValueError, match="tokenizer has 1121 tokens, the drafter 60"):
        target.generate(**tiny.prompt(), **GREEDY, assistant=Translated(small, many, tiny.tokenizer()))


def test_tokens_that_the_target_lacks_are_never_drafted() -> None:
    target, ids = tiny.fresh("llama", vocab_size=60), tiny.prompt()["input_ids"] % 60
    drafter = Translated(csdraft.ModelDrafter(tiny.tiny("llama")), tiny.tokenizer(), tiny.tokenizer())
    drafted = drafter.drafter.models()[0].generate(ids, do_sample=False, max_new_tokens=24)
    assert (drafted[:, ids.shape[1] :] >= 60).any(), "it would draft such tokens"
    plain = target.generate(ids, do_sample=False, max_new_tokens=24)
    assert torch.equal(target.generate(ids, **GREEDY, assistant=drafter), plain)


def test_wrong_targets_are_refused() -> None:
    many = tiny.tokenizer()
    many.add_tokens([f"<{i}>" for i in range(1025)])
    wide = Translated(csdraft.MaxGram(), tiny.tokenizer(), many)
    with pytest.raises(ValueError, match="target_tokenizer has 1122 tokens, the target 97"):
        tiny.tiny("llama").generate(**tiny.prompt(), **GREEDY, assistant=wide)
    fitting = Translated(csdraft.MaxGram(), tiny.tokenizer(), tiny.tokenizer())
    with pytest.raises(ValueError, match="decoder-only"):
        tiny.tiny("t5").generate(**tiny.inputs_of("t5"), **GREEDY, assistant=fitting)


def test_a_piece_of_text_is_read_as_in_its_place() -> None:
    """A tokenizer that puts a space before every text must not put one into the middle of it."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90))
    view = TokenizerView(PreTrainedTokenizerFast(tokenizer_object=made))
    head, tail = "the cat sat", " on the mat"
    whole = view.encode(head + tail, True)
    assert whole == view.encode(head, True) + view.encode(tail, False)
    assert view.decode(view.encode(tail, False), False) == tail
    assert view.decode(whole, True) == head + tail
