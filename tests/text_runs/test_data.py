"""Examples, tokens and rows: what is learnt, what is cut, what is refused and where."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from veneer.core.errors import DataError
from veneer.core.runs.place import Place
from veneer.text.batches import collate, pack, single
from veneer.text.data import read_examples
from veneer.text.task import NextToken
from veneer.text.tokens import tokenise

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "aye"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r":2 is not JSON: .* at column 13"),
        ("[1]", r":2 is no JSON object"),
        ({"txet": "a"}, r":2 has txet; expected text, or prompt and completion, or messages"),
        ({"prompt": "a"}, r":2 has a prompt but no completion"),
        ({"text": ""}, r":2: text must be a text that is not empty, not ''"),
        ({"text": 3}, r":2: text must be a text that is not empty, not 3"),
        (
            {"prompt": "a", "completion": "b"},
            r":2 has prompt and completion, but .*:1 has text: .* one kind",
        ),
        ({"messages": []}, r":2: messages must be a list of turns"),
        ({"messages": [{"role": "user"}]}, r":2: message 1 must have a role and a content"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r":2: message 1 has the role 'bot'; expected one of system"),
        ({"messages": CHAT[:1]}, r":2: no message is the assistant's"),
    ],
)
def test_bad_lines_are_named(write, line, message):
    path = write({"text": "good"}, line)
    with pytest.raises(DataError, match=path.name + message):
        read_examples(path)


def test_empty_files_and_other_encodings_are_refused(write, tmp_path):
    with pytest.raises(DataError, match="holds no examples"):
        read_examples(write("", ""))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_examples(tmp_path / "latin.jsonl")


def learnt(tokens, tokenizer) -> str:
    return tokenizer.decode([i for i, flag in zip(tokens.ids, tokens.learnt, strict=True) if flag])


def tokens_of(write, tokenizer, *lines, length=99, only=True):
    return tokenise(read_examples(write(*lines)), tokenizer, length, only)


def test_only_the_assistants_turns_are_learnt(write, tokenizer):
    turns = [{"role": "system", "content": "be kind"}, *CHAT, {"role": "user", "content": "bye"}, CHAT[1]]
    ((one,), _) = tokens_of(write, tokenizer, {"messages": turns})
    assert tokenizer.decode(one.ids) == (
        "<system>be kind<end><user>hi<end><assistant>aye<end><user>bye<end><assistant>aye<end>"
    )
    assert learnt(one, tokenizer) == "aye<end>aye<end>"
    ((whole,), _) = tokens_of(write, tokenizer, {"messages": turns}, only=False)
    assert whole.ids == one.ids
    assert whole.learnt == [False] + [True] * (len(one.ids) - 1)


def test_prompts_are_read_and_completions_learnt(write, tokenizer):
    line = {"prompt": "2+2=", "completion": "4"}
    ((one,), _) = tokens_of(write, tokenizer, line)
    assert (tokenizer.decode(one.ids), learnt(one, tokenizer)) == ("2+2=4<end>", "4<end>")
    ((whole,), _) = tokens_of(write, tokenizer, line, only=False)
    assert learnt(whole, tokenizer) == "+2=4<end>"
    ((text,), _) = tokens_of(write, tokenizer, {"text": "abc"})
    assert learnt(text, tokenizer) == "bc<end>"  # nothing comes before the first


def test_what_is_cut_is_told(write, tokenizer):
    lines = {"prompt": "ab", "completion": "cdef"}, {"prompt": "abcdefgh", "completion": "i"}
    (one,), notes = tokens_of(write, tokenizer, *lines, length=5)
    assert tokenizer.decode(one.ids) == "abcde"
    assert notes[0].endswith("data.jsonl:1 is longer than 5 tokens: its last 2 are not seen")
    assert notes[1].endswith("data.jsonl:2 is left out: nothing to learn is within its first 5 tokens")


def test_templates_that_cannot_be_honoured_are_refused(write, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}" + tokenizer.chat_template)
    with pytest.raises(DataError, match=r"data.jsonl:1: this model's chat template changes earlier turns"):
        tokens_of(write, tokenizer, {"messages": [*CHAT, *CHAT]})
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no systems') }}")
    with pytest.raises(DataError, match="refuses the chat: no systems"):
        tokens_of(write, tokenizer, {"messages": CHAT})
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="has no chat template; give prompt and completion"):
        tokens_of(write, tokenizer, {"messages": CHAT})


def test_packed_examples_do_not_see_each_other(make_config, write, tokenizer, model_dir):
    """The summed loss of packed rows is that of the examples alone."""
    lines = [{"prompt": "p" * (1 + i % 4), "completion": "c" * (3 + i)} for i in range(7)]
    examples, _ = tokens_of(write, tokenizer, *lines)
    rows = pack(examples, 24)
    assert sorted(example.place for row in rows for example in row) == sorted(example.place for example in examples)
    assert all(sum(len(example.ids) for example in row) <= 24 for row in rows)
    assert len(rows) < len(examples)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    packed, padded = (
        NextToken(make_config(packing=packing), model, made, [], Place(cpu=True))
        for packing, made in ((True, rows), (False, single(examples)))
    )
    with torch.no_grad():
        together = packed.total(rows)
        assert together == pytest.approx(sum(padded.total([row]).item() for row in single(examples)), rel=1e-5)
        assert padded.total(single(examples)) == pytest.approx(together.item(), rel=1e-5)
    batch = collate(rows, True, torch.float32)
    assert batch.positions is not None
    assert [int((row == 0).sum()) >= len(examples) for row, examples in zip(batch.positions, rows, strict=True)]
