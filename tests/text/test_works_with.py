"""What models with adapters are put through: accelerate, several processes, compiling, tied and resized embeddings."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import veneer
from accelerate import Accelerator
from torch import nn

from .tiny import llama

TOKENS = torch.arange(3, 19).view(2, 8)
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
CONFIGS = {
    "lora": lambda: veneer.LoraConfig(**LORA),
    "dora": lambda: veneer.LoraConfig(**LORA, use_dora=True),
    "oft": lambda: veneer.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"], init_weights=False),
}


def adapted(name: str = "lora", bits: int = 0, **options) -> veneer.PeftModel:
    base = llama(**options)
    base = veneer.quantize_model(base, bits) if bits else base
    torch.manual_seed(1)
    return veneer.get_peft_model(base, CONFIGS[name]())


def test_accelerate_prepares_and_unwraps():
    model = adapted()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        loss = prepared(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert accelerator.unwrap_model(prepared) is model


WORKER = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.text.test_works_with import TOKENS, adapted
meet, rank, out, how = sys.argv[1:]
rank = int(rank)
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
model = wrapped = adapted("dora")
if how == "DDP":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
else:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
wrapped(input_ids=TOKENS[rank][None], labels=TOKENS[rank][None]).loss.backward()
grads = [p.grad for p in model.parameters() if p.requires_grad]
grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
if rank == 0:
    torch.save(grads, out)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_two_processes_share_their_gradients(how, tmp_path):
    root = Path(__file__).parents[2]
    start = [sys.executable, "-c", WORKER, str(tmp_path / "meet")]
    others = [subprocess.Popen([*start, str(rank), str(tmp_path / "grads"), how], cwd=root) for rank in (0, 1)]
    assert [other.wait(timeout=180) for other in others] == [0, 0]
    model = adapted("dora")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    for got, want in zip(torch.load(tmp_path / "grads"), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "bits"), [("lora", 0), ("lora", 4), ("dora", 4)])
def test_compiling_the_whole_graph(name, bits):
    model = adapted(name, bits).train()
    expected = model(input_ids=TOKENS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_copies_and_pickles(bits):
    model = adapted("dora", bits).train()
    expected = model(input_ids=TOKENS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=TOKENS).logits, expected)


def test_embeddings_resized_before_attaching(tmp_path):
    base = llama()
    base.resize_token_embeddings(40)
    config = veneer.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = veneer.get_peft_model(base, config)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    expected = model(input_ids=TOKENS + 20).logits
    model.save_pretrained(tmp_path)
    again = llama()
    again.resize_token_embeddings(40)
    loaded = veneer.PeftModel.from_pretrained(again, tmp_path)
    torch.testing.assert_close(loaded(input_ids=TOKENS + 20).logits, expected)


def test_embeddings_resized_after_attaching():
    model = adapted()
    before = model(input_ids=TOKENS).logits
    model.resize_token_embeddings(40)
    logits = model(input_ids=TOKENS).logits
    assert logits.shape[-1] == 40
    torch.testing.assert_close(logits[..., :32], before)
    assert sum(p.requires_grad for p in model.parameters()) == sum("lora_" in n for n, _ in model.named_parameters())


def test_merging_into_a_tied_embedding_parts_it_and_says_so(tmp_path):
    base = llama(tie_word_embeddings=True)
    config = veneer.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = veneer.get_peft_model(base, config)
    expected = model(input_ids=TOKENS).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-4)


def test_tied_weights_stay_tied_where_nothing_is_merged_into_them():
    model = veneer.get_peft_model(llama(tie_word_embeddings=True), CONFIGS["lora"]())
    plain = model.merge_and_unload()
    assert plain.get_input_embeddings().weight is plain.lm_head.weight
    assert plain.config.tie_word_embeddings


@pytest.mark.parametrize("merged", [False, True])
def test_exporting(merged):
    class Logits(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids=tokens, use_cache=False).logits

    model = adapted().eval()
    if merged:
        model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Logits(model), (TOKENS,))
    torch.testing.assert_close(program.module()(TOKENS), model(input_ids=TOKENS).logits)
