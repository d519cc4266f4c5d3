"""aLoRA: on from the invocation on, as in `peft`, with caches, beams, chunks and mixed batches."""

import copy
import inspect

import pytest
import torch
import transformers
from veneer import LoraConfig, NotMergeableError, PeftModel, get_peft_model, save_as_lora

from .conftest import stir
from .test_reference import adapt_theirs, assert_same_files, changed, read_theirs, save_theirs

CALL = [7, 8]
ROWS = torch.tensor(
    [
        [3, 7, 8, 4, 5, 6, 1, 2],
        [1, 2, 3, 4, 5, 6, 1, 2],  # never called
        [7, 8, 1, 1, 1, 7, 8, 2],  # the last counts
        [0, 0, 1, 2, 3, 4, 7, 8],  # padded on the left
    ]
)
BEGINS = [1, None, 5, 6]
MASK = torch.ones_like(ROWS)
MASK[3, :2] = 0
OPTIONS = {
    "r": 3,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_lora_weights": False,
    "task_type": "CAUSAL_LM",
}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def model(name: str = "default", **options) -> PeftModel:
    found = get_peft_model(llama(), LoraConfig(**OPTIONS, alora_invocation_tokens=CALL, **options), name)
    stir(found.base_model, name)
    with torch.no_grad():
        for parameter in found.base_model.parameters_of(name):
            parameter.mul_(2)
    return found


def test_files_go_both_ways(tmp_path):
    options = OPTIONS | {"alora_invocation_tokens": CALL}
    theirs = changed(adapt_theirs(llama(), "LoraConfig", options))
    save_theirs(theirs, tmp_path / "theirs")
    read = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    inputs = {"input_ids": ROWS, "attention_mask": MASK}
    torch.testing.assert_close(read(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
    ours = model()
    ours.save_pretrained(tmp_path / "ours")
    theirs = read_theirs(llama(), tmp_path / "ours")
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    for row, mask in zip(ROWS[:3], MASK, strict=False):
        one = {"input_ids": row[None], "attention_mask": mask[None], "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(**one), theirs.generate(**one))


def test_each_row_is_the_base_model_until_it_is_called():
    ours = model()
    found = ours(input_ids=ROWS).logits
    with ours.disable_adapter():
        base = ours(input_ids=ROWS).logits
    for row, begin in enumerate(BEGINS):
        end = ROWS.shape[1] if begin is None else begin
        torch.testing.assert_close(found[row, :end], base[row, :end])
        assert begin is None or not torch.isclose(found[row, begin:], base[row, begin:]).all(-1).any()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generation_with_a_cache_is_generation_without(options):
    ours = model()
    inputs = {"input_ids": ROWS, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False} | options
    assert torch.equal(ours.generate(**inputs), ours.generate(**inputs, use_cache=False))


def test_a_loop_of_ones_own_and_chunks():
    ours = model()
    expected = ours(input_ids=ROWS).logits
    signature = inspect.signature(transformers.LlamaForCausalLM.forward)
    cache = {"cache" if "cache" in signature.parameters else "past_key_values": transformers.DynamicCache()}
    first = ours(input_ids=ROWS[:, :7], use_cache=True, **cache)
    last = ours(input_ids=ROWS[:, 7:], use_cache=True, **cache)
    torch.testing.assert_close(torch.cat([first.logits, last.logits], 1)[:3], expected[:3], atol=1e-5, rtol=1e-4)


def test_gradients_come_from_the_tokens_after_it():
    ours = model().train()
    ours(input_ids=ROWS).logits[1].sum().backward()
    assert not any(p.grad.any() for p in ours.base_model.parameters_of("default"))
    gradients = []
    for checkpointed in (False, True):
        ours.zero_grad()
        if checkpointed:
            base = ours.get_base_model()
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        ours(input_ids=ROWS).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in ours.base_model.parameters_of("default")])
        assert all(grad.any() for grad in gradients[-1])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_in_a_mixed_batch():
    ours = model()
    ours.add_adapter("plain", LoraConfig(**OPTIONS))
    stir(ours.base_model, "plain")
    names = ["default", "plain", "default", "__base__"]
    found = ours(input_ids=ROWS, adapter_names=names).logits
    for row, name in enumerate(names):
        ours.base_model.activate(*([] if name == "__base__" else [name]))
        torch.testing.assert_close(found[row], ours(input_ids=ROWS[row : row + 1]).logits[0], atol=1e-5, rtol=1e-4)


def test_copies_and_switches():
    ours = model()
    expected = ours(input_ids=ROWS).logits
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(input_ids=ROWS).logits, expected)
    plain = ours.unload()
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    assert torch.equal(twin(input_ids=ROWS[:2]).logits, expected[:2])


def test_errors(tmp_path):
    ours = model()
    embeds = ours.get_base_model().model.embed_tokens(ROWS)
    with pytest.raises(ValueError, match="was called without input_ids"):
        ours(inputs_embeds=embeds)
    with ours.disable_adapter():
        ours(inputs_embeds=embeds)
    with pytest.raises(NotMergeableError, match="on for some tokens only"):
        ours.merge_adapter()
    with pytest.raises(NotMergeableError, match="on for some tokens only"):
        save_as_lora(tmp_path, ours)
    with pytest.raises(ValueError, match="embed_tokens: an aLoRA is for linear layers"):
        get_peft_model(llama(), LoraConfig(alora_invocation_tokens=CALL, target_modules=["embed_tokens"]))
    for options in ({"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match=f"alora_invocation_tokens does not go with {next(iter(options))}"):
            LoraConfig(alora_invocation_tokens=CALL, **options)
    with pytest.raises(ValueError, match="alora_invocation_tokens is empty"):
        LoraConfig(alora_invocation_tokens=[])
