"""EVA against `peft`: components, ranks, patterns and what is saved."""

from copy import deepcopy

import peft
import pytest
import torch
import transformers
import veneer
from veneer import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights

from .test_reference import assert_same_outputs, quiet

OPTIONS = {
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "init_lora_weights": "eva",
}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def batches(n: int = 3) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    found = []
    for _ in range(n):
        tokens = torch.randint(0, 50, (8, 12))
        mask = torch.ones_like(tokens)
        mask[0, :4] = 0
        labels = tokens.masked_fill(torch.arange(12) < 3, -100)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


CASES = {
    "plain": {},
    "rho 1": {"rho": 1.0},
    "alphas stay": {"adjust_scaling_factors": False},
    "no label mask": {"use_label_mask": False, "tau": 0.9},
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_peft(name, tmp_path):
    options = OPTIONS | {"rank_pattern": {"down_proj": 4}}
    with quiet():
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options, eva_config=peft.EvaConfig(**CASES[name])))
        peft.initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    ours = get_peft_model(llama(), LoraConfig(**options, eva_config=EvaConfig(**CASES[name])))
    initialize_lora_eva_weights(ours, batches(), show_progress_bar=False)
    expected = peft.get_peft_model_state_dict(theirs)
    found = veneer.get_peft_model_state_dict(ours)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=3e-3, rtol=1e-3)  # both draw random projections
    scales = {n: m.scaling["default"] for n, m in theirs.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    for path, layer in ours.base_model.layers.items():
        assert layer.scaling["default"] == pytest.approx(scales[f"base_model.model.{path}"])

    ours.base_model.model.model.embed_tokens.weight.requires_grad_(False)
    with torch.no_grad():
        for parameter in ours.base_model.parameters_of("default"):
            parameter.add_(0.1 * torch.rand_like(parameter))
    ours.save_pretrained(tmp_path)
    with quiet():
        again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    inputs = {"input_ids": batches()[0]["input_ids"]}
    assert_same_outputs(ours, again, inputs)
    assert_same_outputs(ours, veneer.PeftModel.from_pretrained(llama(), tmp_path), inputs)


def test_whitened():
    """PEFT divides again for each further layer of the same input (q, k and v), so these are no test of it."""
    plain, whitened = (
        get_eva_state_dict(
            llama(), batches(), LoraConfig(**OPTIONS, eva_config=EvaConfig(whiten=whiten)), show_progress_bar=False
        )
        for whiten in (False, True)
    )
    assert plain.keys() == whitened.keys()
    for path, vectors in plain.items():
        ratio = whitened[path] / vectors
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4, rtol=1e-4)
    assert torch.equal(*(whitened[f"model.layers.0.self_attn.{p}_proj"][:1] for p in "qk"))


def test_starts_from_the_base_model_and_trains():
    base = llama()
    inputs = batches()[0]
    expected = base(**inputs).logits
    model = get_peft_model(base, LoraConfig(**OPTIONS))
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    found = model(**inputs)
    torch.testing.assert_close(found.logits, expected)
    found.loss.backward()
    assert model.active_adapters == ["default"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    assert sum(p.numel() for p in trained) == model.get_nb_trainable_parameters()[0]


def test_what_was_found_can_be_given_again():
    found = get_eva_state_dict(llama(), batches(), LoraConfig(**OPTIONS), show_progress_bar=False)
    one, two = (get_peft_model(llama(), LoraConfig(**OPTIONS)) for _ in range(2))
    initialize_lora_eva_weights(one, eva_state_dict=found)
    initialize_lora_eva_weights(two, batches(), show_progress_bar=False)
    assert one.peft_config["default"].rank_pattern == two.peft_config["default"].rank_pattern
    for key, tensor in veneer.get_peft_model_state_dict(one).items():
        torch.testing.assert_close(veneer.get_peft_model_state_dict(two)[key], tensor)


def test_components_are_those_of_all_rows_at_once():
    from veneer.core.init.eva import Components

    rows = torch.randn(200, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + 3
    components = Components(8)
    for part in rows.split(40):
        components.add(part)
    centred = rows - rows.mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(components.values, s)
    torch.testing.assert_close((components.vectors @ vh.T).abs(), torch.eye(8, dtype=rows.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(components.shares, s.square() / centred.square().sum())


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ([], {}, "the dataloader is empty"),
        (None, {}, "give a dataloader, or an eva_state_dict"),
        ([{"input_ids": torch.tensor([[1, 2]])}], {}, "no batch has the 6 rows that .*q_proj needs"),
        (batches(1), {"init_lora_weights": True}, "EVA needs 'eva'"),
    ],
)
def test_errors_leave_the_model_as_it_is(data, changes, message):
    model = get_peft_model(llama(), LoraConfig(**OPTIONS | changes))
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        initialize_lora_eva_weights(model, data, show_progress_bar=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.base_model.state.enabled
