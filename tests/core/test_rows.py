"""Mixed batches: every row runs its own adapter, as it would alone."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.core import AdaptedModel, MergedError, mixed_batch

from .conftest import METHODS, build, each_case, make_config, stir

NAMES = ["b", "__base__", "a", "b", "a"]


def alone(model: AdaptedModel, x: Tensor, names: list[str] = NAMES) -> Tensor:
    """Every row in a run of its own."""
    rows = []
    for name, row in zip(names, x.split(1), strict=True):
        model.activate(*([] if name == "__base__" else [name]))
        rows.append(model(row))
    model.activate("a")
    return torch.cat(rows)


@each_case
def test_rows_equal_runs_alone(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b")
    expected = alone(model, x)
    with model.rows(NAMES):
        y = model(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    in_order = sorted(NAMES)
    expected = alone(model, x, in_order)
    with model.rows(in_order):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert model.state.rows is None
    assert model.state.running == ("a",)


@each_case
def test_gradients_equal_those_of_runs_alone(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b", "c")
    model.double()
    x = x.double() if x.is_floating_point() else x
    with model.rows(NAMES):
        y = model(x)
    y.square().sum().backward()  # after the rows are gone
    got = {name: [p.grad for p in model.parameters_of(name)] for name in "abc"}
    assert all(g is None for g in got["c"])
    for name in "ab":
        model.activate(name)
        rows = [i for i, n in enumerate(NAMES) if n == name]
        expected = torch.autograd.grad(model(x[rows]).square().sum(), model.parameters_of(name))
        for one, two in zip(got[name], expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("method", "variant"), METHODS)
def test_strengths_hold_in_mixed_batches(method, variant):
    model, x = build(method, variant, "linear", "a", "b")
    model.set_weight("a", 0.3)
    expected = alone(model, x)
    with model.rows(NAMES):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "variant"), [m for m in METHODS if m.values[1] == 0])
def test_mixed_batches_compile_as_one_graph(method, variant):
    model, x = build(method, variant, "linear", "a", "b")
    torch._dynamo.reset()
    with model.rows(NAMES):
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_frozen_adapters_stay_frozen_in_mixed_batches():
    model, x = build("LORA", 0, "linear", "a", "b")
    model.set_trainable("b", False)
    with model.rows(NAMES):
        model(x).sum().backward()
    assert all(p.grad is None for p in model.parameters_of("b"))
    assert all(p.grad is not None for p in model.parameters_of("a"))


def test_one_adapter_for_all_rows_runs_as_if_it_were_active():
    model, x = build("LORA", 0, "linear", "a", "b")
    with model.rows(["b"] * len(x)):
        assert model.state.plan == ("b",)
        y = model(x)
    with model.rows(["__base__"] * len(x)):
        assert torch.equal(model(x), model.model.layer.base_layer(x))
    model.activate("b")
    assert torch.equal(model(x), y)


def test_disabled_adapters_stay_disabled_in_all_rows():
    model, x = build("LORA", 0, "linear", "a", "b")
    with model.disabled(), model.rows(NAMES):
        assert torch.equal(model(x), model.model.layer.base_layer(x))


def test_rows_nest_and_end_with_errors():
    model, x = build("LORA", 0, "linear", "a", "b")
    expected = alone(model, x)
    with model.rows(NAMES):
        with pytest.raises(RuntimeError, match="stop"), model.rows(["a"]):
            raise RuntimeError("stop")
        torch.testing.assert_close(model(x), expected)
    assert not model._forward_pre_hooks


def test_wrong_rows_are_refused():
    model, x = build("LORA", 0, "linear", "a", "b")
    with pytest.raises(ValueError, match="Adapter c not found"), model.rows(["a", "c"]):
        pass
    with pytest.raises(TypeError, match="list with one name for each row"), model.rows("a"):
        pass
    for names in (["a", "b"], ["a"]):
        with pytest.raises(ValueError, match=r"but got \d and 5"), model.rows(names):
            model(x)
    with model.rows(NAMES), pytest.raises(ValueError, match="delete it afterwards"):
        model.delete("b")
    model.merge(["a"])
    with pytest.raises(MergedError, match="unmerge_adapter"), model.rows(NAMES):
        pass


# -------------------------------------------------------------------- what layers see


class Reshaping(nn.Module):
    """Calls one linear layer with the batch as `shape` makes it."""

    def __init__(self, before, after):
        super().__init__()
        self.layer, self.before, self.after = nn.Linear(8, 12), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)), x)


def reshaping(before, after) -> AdaptedModel:
    model = AdaptedModel(Reshaping(before, after))
    for name in "ab":
        model.add(name, make_config("LORA", 0))
    stir(model, "a", "b")
    return model


def test_flattened_tokens_are_told_by_the_shape_of_the_batch():
    model, x = reshaping(lambda x: x.flatten(0, 1), lambda y, x: y.view(*x.shape[:2], 12)), torch.randn(5, 3, 8)
    expected = alone(model, x)
    with model.rows(NAMES):
        torch.testing.assert_close(model(x), expected)


def test_a_single_row_for_all_becomes_one_for_each():
    model = reshaping(lambda x: torch.ones(1, 3, 8), lambda y, x: y + x.sum(-1, keepdim=True))
    x = torch.randn(5, 3, 8)
    expected = alone(model, x)
    with model.rows(NAMES):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("order", ["each", "tiled"])
def test_repeated_rows_are_told_apart_when_announced(order):
    def repeat(x):
        return x.repeat_interleave(2, 0) if order == "each" else x.repeat(2, 1, 1)

    model, x = reshaping(repeat, lambda y, x: y), torch.randn(5, 3, 8)
    model.activate("a")
    a = model(x)
    model.activate("b")
    b = model(x)
    with model.rows(["a", "a", "b", "b", "a"], **{order: 2}):
        y = model(x)
    repeated = repeat(torch.tensor([0, 0, 1, 1, 0])[:, None, None])
    torch.testing.assert_close(y, torch.where(repeated == 0, a, b))


def test_rows_that_cannot_be_told_are_refused():
    for before in (lambda x: x.transpose(0, 1), lambda x: x[:4], lambda x: x.repeat(2, 1, 1)):
        model = reshaping(before, lambda y, x: y)
        refused = pytest.raises(ValueError, match=r"layer was called with an input of shape .* cannot be told")
        with refused, model.rows(NAMES):
            model(torch.randn(5, 3, 8))


def test_experts_are_refused_even_where_the_count_of_tokens_fits():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            return self.experts[0](x.flatten(0, 1)[:5])

    model = AdaptedModel(Experts())
    for name in "ab":
        model.add(name, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match=r"experts\.0 is one of a layer of experts"), model.rows(NAMES):
        model(torch.randn(5, 3, 8))


class Block(nn.Module):
    """Inputs by keyword, nested outputs, a tensor that is one for all rows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, mask=None, scale=1.0):
        y = self.inner(x) * scale
        return {"y": y if mask is None else y * mask, "more": (x, None, [y.sum(-1)]), "one": torch.ones(2)}


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.other = Block(), nn.Linear(8, 8)

    def forward(self, x, mask):
        out = self.block(x=self.other(x), mask=mask, scale=2.0)
        return torch.cat([out["y"], out["more"][0], out["more"][2][0][..., None]], -1)


def test_modules_saved_whole_run_and_train_on_their_rows():
    model = AdaptedModel(Whole())
    for name in "ab":
        model.add(name, LoraConfig(r=2, target_modules=["other"], modules_to_save=["block"], init_lora_weights=False))
    stir(model, "a", "b")
    x, mask = torch.randn(5, 3, 8), torch.rand(5, 3, 1)
    expected = {}
    for name in "ab":
        model.activate(name)
        expected[name] = model(x, mask)
    rows = [i for i, n in enumerate(NAMES) if n == "b"]
    gradients = torch.autograd.grad(model(x[rows], mask[rows]).square().sum(), model.parameters_of("b"))
    model.activate()
    expected["__base__"] = model(x, mask)
    with model.rows(NAMES):
        y = model(x, mask)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i], expected[name][i])
    y.square().sum().backward()
    for parameter, gradient in zip(model.parameters_of("b"), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------- language models


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=2, **changes))


def several(base):
    """A LoRA, an IA3 and a DoRA with a head of its own, all away from the identity."""
    targets = ["q_proj", "v_proj"] if isinstance(base, LlamaForCausalLM) else ["q", "v"]
    lora = {"target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=3, **lora | {"target_modules": [*targets, "lm_head"]}), "lora")
    model.add_adapter("ia3", IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False))
    model.add_adapter("dora", LoraConfig(r=2, use_dora=True, **lora))
    model.add_adapter("head", LoraConfig(r=2, modules_to_save=["lm_head"], **lora))
    stir(model.base_model, "lora", "ia3", "dora", "head")
    return model.eval()


MIX = ["ia3", "lora", "__base__", "head", "dora", "lora"]


def each_alone(model, run):
    """`run(row)` for every row of `MIX` with its adapter active."""
    results = []
    for i, name in enumerate(MIX):
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(i))
        else:
            model.set_adapter(name)
            results.append(run(i))
    return results


def test_methods_share_a_batch_of_a_language_model():
    model, ids = several(llama()), torch.randint(3, 64, (6, 7))
    expected = torch.cat(each_alone(model, lambda i: model(input_ids=ids[i : i + 1]).logits))
    torch.testing.assert_close(model(input_ids=ids, adapter_names=MIX).logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=ids, adapter_names=MIX[:4])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_rows_equal_those_of_peft(tmp_path):
    names = ["b", "__base__", "default", "b"]
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    theirs.eval().save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path)
    ours.load_adapter(tmp_path / "b", "b")
    ids = torch.randint(3, 64, (4, 7))
    expected = theirs(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(ours(input_ids=ids, adapter_names=names).logits, expected, atol=1e-5, rtol=1e-4)
    with mixed_batch(ours.get_base_model(), names):
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_in_one_batch_equals_generation_alone(family, options):
    if family == "llama":
        base = llama()
    else:
        torch.manual_seed(0)
        size = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        base = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0, tie_word_embeddings=False))
    model, ids = several(base), torch.randint(3, 64, (6, 5))
    options = options | {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = torch.cat(each_alone(model, lambda i: model.generate(input_ids=ids[i : i + 1], **options)))
    assert torch.equal(model.generate(input_ids=ids, adapter_names=MIX, **options), expected)
    assert len({tuple(row.tolist()) for row in expected}) > 2
    with pytest.raises(ValueError, match=r"adapter_names|cannot be told"):
        model.generate(input_ids=ids, adapter_names=MIX[:4], **options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recomputed_with_their_rows(reentrant):
    model, ids = several(llama()), torch.randint(3, 64, (6, 7))
    names = ["lora", "ia3", "dora", "lora"]

    def gradients():
        model.zero_grad()
        model(input_ids=ids[:4], labels=ids[:4], adapter_names=names).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    assert {name for name in names if any(f".{name}." in key for key in plain)} == set(names)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6, rtol=1e-4)


def test_other_checkpoints_recompute_inside_the_rows():
    model, x = build("LORA", 0, "linear", "a", "b")
    with model.rows(NAMES):
        plain = torch.autograd.grad(model(x).square().sum(), model.parameters_of("b"))
        y = checkpoint(model, x, use_reentrant=False)
        again = torch.autograd.grad(y.square().sum(), model.parameters_of("b"))
    torch.testing.assert_close(again, plain)
