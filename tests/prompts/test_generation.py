"""Generation: every kind of search, cache and padding, alone and in a mixed batch."""

from __future__ import annotations

import pytest
import torch
import veneer

from .conftest import CAUSAL, CONFIGS, SEQ2SEQ, N, batch, make, ours

SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}
TASKS = {"task_ids": torch.tensor([0, 2, 1])}


def answer(model, inputs, **options):
    torch.manual_seed(5)
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(**inputs, **options)


def by_hand(model, inputs, steps=6):
    """Greedy search without a cache, through `forward` alone."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **_tasks(model)).logits[:, -1].clone()
        logits[:, 2] = -torch.inf  # the end, which comes later
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def _tasks(model):
    return TASKS if model.peft_type == "MULTITASK_PROMPT_TUNING" else {}


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("model", CAUSAL)
def test_every_cache_gives_what_no_cache_gives(kind, model):
    tuned = ours(kind, model)
    inputs = batch(model)
    with torch.no_grad():
        expected = by_hand(tuned, inputs)
        for search in ("greedy", "static", "no-cache"):
            assert torch.equal(answer(tuned, inputs, **_tasks(tuned), **SEARCHES[search]), expected), search


@pytest.mark.parametrize("search", ["greedy", "beams", "static", "sampling"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("model", CAUSAL)
def test_a_left_padded_row_answers_as_alone(kind, model, search):
    tuned = ours(kind, model)
    inputs = batch(model)
    inputs["input_ids"][1, :3] = 0
    inputs["attention_mask"][1, :3] = 0
    whole = answer(tuned, inputs, **SEARCHES[search] | {"do_sample": False})[1, 7:]
    alone = answer(tuned, {"input_ids": inputs["input_ids"][1:2, 3:]}, **SEARCHES[search] | {"do_sample": False})
    assert torch.equal(whole, alone[0, 4:])


@pytest.mark.parametrize("search", list(SEARCHES))
@pytest.mark.parametrize("model", CAUSAL + SEQ2SEQ)
def test_prompts_change_the_answer_and_disabling_restores_it(model, search):
    base = make(model)
    inputs = batch(model)
    plain = answer(base, inputs, **SEARCHES[search])
    for kind in ("prompt", "prefix"):
        tuned = ours(kind, model, base)
        with_prompt = answer(tuned, inputs, **SEARCHES[search])
        with tuned.disable_adapter():
            without = answer(tuned, inputs, **SEARCHES[search])
        assert torch.equal(without, plain)
        if model != "bart":  # whose tiny form says one word over and over
            assert not torch.equal(with_prompt, plain)
        assert torch.equal(answer(tuned.unload(), inputs, **SEARCHES[search]), plain)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_embeddings_instead_of_ids(kind):
    tuned = ours(kind, "llama")
    inputs = batch("llama")
    embeds = tuned.get_input_embeddings()(inputs["input_ids"])
    by_embeds = answer(tuned, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(by_embeds, answer(tuned, inputs)[:, 7:])


def _many(model):
    """A model with prompts of several lengths, a prefix and a LoRA."""
    tuned = ours("prompt", model, num_virtual_tokens=5)
    task = {"task_type": tuned.peft_config["default"].task_type}
    tuned.add_adapter("short", veneer.PromptTuningConfig(num_virtual_tokens=2, **task))
    tuned.add_adapter("made", veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **task))
    tuned.add_adapter("lora", veneer.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **task))
    return tuned.eval()


NAMES = ["default", "__base__", "short", "lora", "made", "default"]


@pytest.mark.parametrize("search", ["greedy", "beams", "static"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_rows_of_a_mixed_batch_answer_as_alone(model, search):
    tuned = _many(model)
    inputs = batch(model, rows=6)
    inputs["input_ids"][2, :2] = 0
    inputs["attention_mask"][2, :2] = 0
    mixed = answer(tuned, inputs, adapter_names=NAMES, **SEARCHES[search])
    for i, name in enumerate(NAMES):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        if name == "__base__":
            with tuned.disable_adapter():
                alone = answer(tuned, row, **SEARCHES[search])
        else:
            tuned.set_adapter(name)
            alone = answer(tuned, row, **SEARCHES[search])
        assert torch.equal(mixed[i], alone[0]), name


def test_prefixes_of_several_lengths_share_a_batch():
    tuned = ours("prefix", "llama", num_virtual_tokens=5)
    tuned.add_adapter("short", veneer.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    inputs = batch("llama")
    mixed = answer(tuned, inputs, adapter_names=["short", "default", "__base__"])
    tuned.set_adapter("short")
    assert torch.equal(mixed[0], answer(tuned, {"input_ids": inputs["input_ids"][:1]})[0])
    tuned.set_adapter("default")
    assert torch.equal(mixed[1], answer(tuned, {"input_ids": inputs["input_ids"][1:2]})[0])


def _cache_of(tuned, output):
    """A call's cache as an argument of the next one, by the name that this release of transformers has for it."""
    name = tuned.prompt_encoder.site.signature.cache
    return {name: output[name]}


def test_a_cache_that_began_without_the_prompt_is_refused():
    tuned = ours("prompt", "llama")
    inputs = batch("llama")
    with tuned.disable_adapter():
        before = tuned(input_ids=inputs["input_ids"], use_cache=True)
    with pytest.raises(ValueError, match="came without the prompt"):
        tuned(input_ids=inputs["input_ids"][:, :1], **_cache_of(tuned, before))


def test_steps_by_hand_find_the_prompt_in_the_cache():
    tuned = ours("prompt", "llama")
    ids = batch("llama")["input_ids"]
    whole = tuned(input_ids=ids).logits
    first = tuned(input_ids=ids[:, :4], use_cache=True)
    second = tuned(input_ids=ids[:, 4:], attention_mask=torch.ones_like(ids), **_cache_of(tuned, first))
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole)
    assert N == 4
