"""Weighted combinations of prompts, which are prompts: against tokens added by hand, and prompts active together."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import veneer

from .conftest import CONFIGS, N, config_of, make, ours
from .test_files import scores

CLASSES = {"prefix": veneer.PrefixTuningConfig, "projected": veneer.PrefixTuningConfig} | {
    "multitask": veneer.MultitaskPromptTuningConfig
}
FAMILIES = [(k, k) for k in CONFIGS] + [("prompt", "p-lstm"), ("prefix", "projected"), ("multitask", "prompt")]


def pair(first, second, model="llama", **changes):
    """A model with two prompts, "a" and "b"; `changes` are the second's."""
    tuned = veneer.get_peft_model(make(model), config_of(veneer, first, model), "a")
    tuned.add_adapter("b", config_of(veneer, second, model, **changes))
    return tuned.eval()


def logits(tuned, kinds, *names):
    tuned.set_adapter(list(names))
    return scores(tuned, "multitask" if "multitask" in kinds else kinds[0])


def made(tuned, name):
    """The tokens of every task, (tasks, n, width), or of one for plain prompts."""
    prompt = tuned.prompt_encoder[name]
    tasks = torch.arange(3) if hasattr(prompt, "prefix_task_cols") else None
    tokens = prompt.tokens(tasks).detach()
    return tokens if tokens.ndim == 3 else tokens[None]


@pytest.mark.parametrize("kinds", FAMILIES, ids="+".join)
def test_linear_is_the_sum_of_the_tokens(kinds):
    tuned = pair(*kinds)
    tuned.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    assert type(tuned.peft_config["sum"]) is CLASSES.get(kinds[0], veneer.PromptTuningConfig)
    assert not any(p.requires_grad for p in tuned.base_model.parameters_of("sum"))
    total = 0.7 * made(tuned, "a") - 0.4 * made(tuned, "b")
    y = logits(tuned, kinds, "sum")
    for row, task in enumerate([0, 2, 1] if len(total) > 1 else [0, 0, 0]):  # a plain prompt of the sum, by hand
        plain = ours("prefix" if tuned.peft_config["sum"].of_cache else "prompt", "llama")
        with torch.no_grad():
            plain.prompt_encoder["default"].embedding.weight.copy_(total[task])
        torch.testing.assert_close(y[row], scores(plain, "prompt")[row])


@pytest.mark.parametrize("kinds", FAMILIES, ids="+".join)
def test_cat_is_the_prompts_active_together(kinds):
    tuned = pair(*kinds, num_virtual_tokens=2)
    tuned.add_weighted_adapter(["b", "a"], [1.0, 1.0], "both", "cat")
    assert tuned.peft_config["both"].num_virtual_tokens == N + 2
    torch.testing.assert_close(logits(tuned, kinds, "both"), logits(tuned, kinds, "b", "a"))
    tuned.add_weighted_adapter(["b", "a"], [1.0, 0.5], "weighted", "cat")
    expected = torch.cat(
        [t.expand(len(made(tuned, "weighted")), -1, -1) for t in (made(tuned, "b"), made(tuned, "a") / 2)], 1
    )
    torch.testing.assert_close(made(tuned, "weighted"), expected)


@pytest.mark.parametrize("kinds", FAMILIES, ids="+".join)
@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_files_of_blends_are_read_here_and_by_peft(kinds, kind, tmp_path):
    tuned = pair(*kinds)
    tuned.add_weighted_adapter(["a", "b"], [0.7, 0.3], "new", kind)
    expected = logits(tuned, kinds, "new")
    tuned.save_pretrained(tmp_path, selected_adapters=["new"])
    name = "multitask" if "multitask" in kinds else kinds[0]
    again = veneer.PeftModel.from_pretrained(make("llama"), tmp_path / "new").eval()
    torch.testing.assert_close(scores(again, name), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "new").eval()
    torch.testing.assert_close(scores(theirs, name)[:, -7:], expected, atol=2e-5, rtol=1e-4)


def test_both_halves_of_an_encoder_decoder_prompt_are_joined():
    tuned = pair("multitask", "multitask", "t5", num_virtual_tokens=2)
    tuned.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", "cat")
    assert tuned.peft_config["both"].num_transformer_submodules == 2
    torch.testing.assert_close(logits(tuned, ["multitask"], "both"), logits(tuned, ["multitask"], "a", "b"))


def test_heads_are_averaged_along():
    tuned = pair("prompt", "prompt", "llama-sequence")
    heads = [tuned.base_model.adapters(name)["score"].whole.weight for name in ("a", "b")]
    with torch.no_grad():
        for head in heads:
            head.normal_()
    tuned.add_weighted_adapter(["a", "b"], [0.25, 0.75], "mean")
    found = tuned.base_model.adapters("mean")["score"].whole.weight
    torch.testing.assert_close(found, 0.25 * heads[0] + 0.75 * heads[1])


def test_dropout_of_a_network_in_training_is_left_out():
    tuned = pair("p-lstm", "p-lstm", encoder_dropout=0.5)
    expected = made(tuned, "b")
    tuned.train()
    tuned.add_weighted_adapter(["b"], [1.0], "copy")
    torch.testing.assert_close(made(tuned, "copy"), expected)
    assert tuned.prompt_encoder["b"].training


def test_weights_may_be_by_pattern():
    tuned = pair("prompt", "prompt")
    tuned.add_weighted_adapter(["a", "b"], [{".*": 0.5}, 1.0], "sum")
    torch.testing.assert_close(made(tuned, "sum"), 0.5 * made(tuned, "a") + made(tuned, "b"))


REFUSED = {
    "lengths": (("prompt", "prompt"), {"num_virtual_tokens": 2}, {}, r"\[4, 2\] virtual tokens.*use .*'cat'"),
    "sorts": (("prompt", "prefix"), {}, {}, r"'a' is tokens .*'b' is keys and values.*set_adapter"),
    "kind": (("prompt", "prompt"), {}, {"combination_type": "svd"}, r"'svd' works on changes of weights.*set_adapter"),
    "option": (("prompt", "prompt"), {}, {"density": 0.5}, r"'linear' of prompts has no option density"),
    "tasks": (("multitask", "multitask"), {"num_tasks": 2}, {}, r"for \[2, 3\] tasks"),
    "sizes": (
        ("prompt", "prompt"),
        {"num_transformer_submodules": 2},
        {},
        r"num_transformer_submodules.*'a': 1, 'b': 2",
    ),
    "weights": (("prompt", "prompt"), {}, {"weights": [1.0]}, "2 adapters and 1 weights"),
    "unknown": (("prompt", "prompt"), {}, {"adapters": ["a", "c"]}, "Adapter c not found"),
    "number": (("prompt", "prompt"), {}, {"weights": [1.0, float("nan")]}, "finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused(case):
    kinds, changes, options, message = REFUSED[case]
    tuned = pair(*kinds, **changes)
    arguments = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new"} | options
    with pytest.raises(ValueError, match=message):
        tuned.add_weighted_adapter(**arguments)
    assert list(tuned.peft_config) == ["a", "b"]


def test_a_lora_is_kept_active_beside_a_prompt():
    tuned = pair("prompt", "prompt")
    tuned.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=["q_proj"]))
    for kind in (None, "cat", "linear"):
        with pytest.raises(ValueError, match=r"'lora' is LORA, a change of layers: .*set_adapter\(\['a', 'lora'\]\)"):
            tuned.add_weighted_adapter(["a", "lora"], [1.0, 1.0], "new", kind)
