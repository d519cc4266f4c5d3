"""What prompts promise: original lengths, gradients to the right tensors, and company of other adapters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import veneer
from veneer.core import AdaptedModel

from .conftest import CONFIGS, MODELS, N, align, batch, make, ours, theirs

TASKS = {"task_ids": torch.tensor([0, 2, 1])}


def _inputs(kind, model):
    return batch(model) | (TASKS if kind == "multitask" else {})


@pytest.mark.parametrize("model", [m for m, (_, task, _) in MODELS.items() if task != "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_only_the_prompt_and_the_head_train(kind, model):
    tuned = ours(kind, model).train()
    tuned(**_inputs(kind, model)).loss.backward()
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert all(".adapters.default." in name for name in trained)
    prompt = tuned.prompt_encoder["default"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt.parameters())


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_heads_see_original_lengths(kind, model):
    tuned, inputs = ours(kind, model), batch(model)
    plain, output = make(model)(**inputs), tuned(**inputs, output_hidden_states=True)
    for name, value in plain.items():
        if isinstance(value, torch.Tensor) and name != "encoder_last_hidden_state":
            assert output[name].shape == value.shape, name
    for states in output.get("hidden_states") or output.get("decoder_hidden_states"):
        assert states.shape[1] == (output.logits.shape[1] if "seq2seq" in model else states.shape[1])


def test_gradients_are_pefts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = theirs("p-mlp", "llama")
    mine, inputs = ours("p-mlp", "llama"), batch("llama")
    align(mine, reference)
    inputs["labels"][:, 0] = -100  # PEFT also has the prompt predict the first token, which stripping leaves out
    loss = mine(**inputs).loss
    expected = reference(**inputs).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    own = dict(mine.prompt_encoder["default"].named_parameters())
    for name, parameter in reference.prompt_encoder["default"].named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_padded_text_is_classified_as_alone(kind, side):
    """PEFT pools the padding here, since its head does not see the ids."""
    tuned, inputs = ours(kind, "llama-sequence"), batch("llama-sequence")
    pad = slice(0, 3) if side == "left" else slice(4, 7)
    text = inputs["input_ids"][:1, 3:] if side == "left" else inputs["input_ids"][:1, :4]
    inputs["input_ids"][0, pad] = 0
    inputs["attention_mask"][0, pad] = 0
    torch.testing.assert_close(tuned(**inputs).logits[:1], tuned(input_ids=text).logits)


def test_prompts_of_one_model_switch_combine_and_go():
    base = make("llama")
    tuned, inputs = ours("prompt", "llama", base), batch("llama")
    plain = make("llama")(**inputs).logits
    first = tuned(**inputs).logits
    tuned.add_adapter("other", veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    tuned.set_adapter("other")
    second = tuned(**inputs).logits
    tuned.set_adapter(["default", "other"])
    both = tuned(**inputs).logits
    assert not any(torch.allclose(a, b) for a, b in ((first, second), (first, both), (second, both)))
    tokens = [tuned.prompt_encoder[n].embedding.weight for n in ("default", "other")]
    joined = ours("prompt", "llama", num_virtual_tokens=N + 2)
    with torch.no_grad():
        joined.prompt_encoder["default"].embedding.weight.copy_(torch.cat(tokens))
    torch.testing.assert_close(both, joined(**inputs).logits)
    tuned.delete_adapter("default")
    torch.testing.assert_close(tuned(**inputs).logits, second)
    tuned.delete_adapter("other")
    torch.testing.assert_close(tuned(**inputs).logits, plain)
    assert not any("virtual" in name for name, _ in tuned.unload().named_modules())
    assert not base.model._forward_hooks
    assert not base.model._forward_pre_hooks


def test_a_prompt_and_a_lora_run_together():
    tuned, inputs = ours("prompt", "llama"), batch("llama")
    tuned.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    alone = tuned(**inputs).logits
    tuned.set_adapter(["default", "lora"])
    together = tuned.eval()(**inputs).logits
    assert not torch.allclose(alone, together)
    with pytest.raises(veneer.NotMergeableError, match="virtual tokens"):
        tuned.merge_adapter()
    tuned.base_model.set_weight("lora", 0.0)
    torch.testing.assert_close(tuned(**inputs).logits, alone)
    with pytest.raises(ValueError, match="no strength"):
        tuned.base_model.set_weight("default", 0.5)
    with pytest.raises(ValueError, match="virtual tokens"):
        tuned.add_weighted_adapter(["default", "lora"], [1.0, 1.0], "sum", "linear")


def test_rows_train_only_their_own_prompt():
    tuned, inputs = ours("prompt", "llama"), batch("llama")
    tuned.add_adapter("other", veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    tuned.set_requires_grad("other")
    tuned(**inputs, adapter_names=["other", "__base__", "other"]).loss.backward()
    assert tuned.prompt_encoder["default"].embedding.weight.grad is None
    mixed = tuned.prompt_encoder["other"].embedding.weight.grad.clone()
    tuned.set_adapter("other")
    tuned.zero_grad()
    (tuned(**{k: v[[0, 2]] for k, v in inputs.items()}).loss * 2 / 3).backward()
    torch.testing.assert_close(mixed, tuned.prompt_encoder["other"].embedding.weight.grad)


old_name = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


@old_name
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["prompt", "p-mlp"])
def test_gradient_checkpointing(kind, reentrant):
    tuned, inputs = ours(kind, "llama").train(), batch("llama")
    tuned(**inputs).loss.backward()
    parameters = list(tuned.prompt_encoder["default"].parameters())
    expected = [p.grad.clone() for p in parameters]
    tuned.zero_grad()
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tuned(**inputs).loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@old_name
def test_prefixes_refuse_gradient_checkpointing():
    tuned = ours("prefix", "llama").train()
    tuned.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        tuned(**batch("llama"))


def test_compiles_without_graph_breaks():
    tuned, inputs = ours("prompt", "llama"), batch("llama")
    expected = tuned(**inputs, use_cache=False).logits
    compiled = torch.compile(tuned.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)


def test_a_copy_has_prompts_of_its_own():
    tuned, inputs = ours("prompt", "llama"), batch("llama")
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.zero_()
    assert not torch.allclose(other(**inputs).logits, tuned(**inputs).logits)
    assert AdaptedModel(other.get_base_model()).layers["virtual_tokens"] is other.prompt_encoder


class _Words:
    name_or_path = "words"

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def test_starts():
    base = make("llama")
    words = base.get_input_embeddings().weight
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say it in", "tokenizer_name_or_path": _Words()}
    tuned = ours("prompt", "llama", **text)
    torch.testing.assert_close(tuned.prompt_encoder["default"].embedding.weight, words[[3, 2, 2, 3]])
    assert tuned.peft_config["default"].to_dict()["tokenizer_name_or_path"] == "words"
    sampled = ours("prompt", "llama", prompt_tuning_init="SAMPLE_VOCAB").prompt_encoder["default"].embedding.weight
    assert all((words == row).all(1).any() for row in sampled)
    assert not ours("prefix", "llama", init_weights="zero").prompt_encoder["default"].embedding.weight.any()
    with pytest.raises(ValueError, match="tokenizer_name_or_path"):
        veneer.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a")
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        ours("prompt", "llama", num_virtual_tokens=None)
    with pytest.raises(ValueError, match="no config"):
        veneer.get_peft_model(torch.nn.Linear(2, 2), veneer.PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_starts_from_a_trained_prompt(start, tmp_path):
    source = ours("multitask", "llama")
    source.save_pretrained(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    options = {"prompt_tuning_init": start, "prompt_tuning_init_state_dict_path": path, "prompt_tuning_init_task": 2}
    target = ours("multitask", "llama", num_tasks=1, **options).prompt_encoder["default"]
    given = source.prompt_encoder["default"]
    torch.testing.assert_close(target.embedding.weight, given.embedding.weight)
    expected = {
        "AVERAGE_SOURCE_TASKS": given.prefix_task_rows.mean(0, True),
        "EXACT_SOURCE_TASK": given.prefix_task_rows[2:],
    }
    if start in expected:
        torch.testing.assert_close(target.prefix_task_rows, expected[start])
    else:
        assert target.prefix_task_rows.shape == (1, 2, 16)
    with pytest.raises(ValueError, match="task_ids"):
        source(**batch("llama"))
