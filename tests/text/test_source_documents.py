"""The code of the documents that Veneer was made from runs, with `veneer` in place of `peft` and a local model.

The documents are not part of the repository: where their folder is missing, the tests say so and are skipped.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import veneer
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, TrainingArguments
from veneer import LoraConfig, get_peft_model, text

from .conftest import byte_tokenizer

FOLDER = Path(veneer.__file__).resolve().parent.parent / "shared" / "reference"
pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the source documents are not here: {FOLDER}"),
    # transformers' and torch's own, on the documents' ways to call them
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*", "ignore:.*pin_memory.*", "ignore::FutureWarning"),
]

BASES = (
    *("google/gemma-2-2b", "google/gemma-7b", "facebook/opt-125m", "Qwen/Qwen2.5-3B-Instruct"),
    *("mistralai/Mistral-7B-v0.1",),
)
"""Ids of causal language models, each of which is the tiny Llama here."""
FIRST = ("klcsp/gemma7b-lora-alpaca-11-v1", "alignment-handbook/zephyr-7b-sft-lora")
SECOND = "alignment-handbook/zephyr-7b-dpo-lora"


@dataclass(frozen=True)
class Block:
    """Lines of a document, counted from 1, and what stands in for what they leave out."""

    document: str
    first: int
    last: int
    fill: dict[str, str] = field(default_factory=dict)
    """Replacements for placeholders, `...` among them."""
    before: str = ""
    """What the document's prose or an earlier block provides."""
    after: str = ""
    """What must hold afterwards."""

    @property
    def lines(self) -> list[str]:
        (path,) = FOLDER.glob(f"{self.document}_*.txt")
        return path.read_text(encoding="utf-8").splitlines()[self.first - 1 : self.last]

    def code(self) -> str:
        code = "\n".join(self.lines).replace("from peft", "from veneer")
        for name, value in self.fill.items():
            assert name in code, f"{name!r} is not in lines {self.first} to {self.last} of document {self.document}"
            code = code.replace(name, value)
        for model_id in (*BASES, "bigscience/mt0-large"):
            code = code.replace(f'"{model_id}"', "seq2seq" if model_id.startswith("bigscience") else "base")
        for adapter_id in FIRST:
            code = code.replace(f'"{adapter_id}"', "first")
        return code.replace(f'"{SECOND}"', "second")


MODEL = "model = AutoModelForCausalLM.from_pretrained(base)\n"
ONE = MODEL + "model.add_adapter(LoraConfig(r=2), adapter_name='lora_1')\nlora_config = LoraConfig(r=2)\n"
FITS = "get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)(tokens)"
TRAINER = {"Trainer(model=model, ...)": "Trainer(model=model, args=arguments, train_dataset=data)"}
ON_CPU = {'hasattr(torch, "accelerator") else "cuda"': 'torch.accelerator.is_available() else "cpu"'}
REST = {", ...)": ")"}
LOADED = MODEL + "model = PeftModel.from_pretrained(model, first, adapter_name='sft')\n"
ADAPTERS_OF_TWO_LANGUAGES = (
    MODEL
    + """
tokenizer = AutoTokenizer.from_pretrained(base)
peft_model = PeftModel.from_pretrained(model, first, adapter_name="adapter_fr")
peft_model.load_adapter(second, adapter_name="adapter_de")
"""
)

BLOCKS = {
    "000 modules_to_save": Block(
        *("000", 30, 44),
        fill={"/tmp/peft/2759": "folder"},
        after="assert not any(p.requires_grad for p in model.parameters())",
    ),
    "000 several adapters": Block(
        *("000", 52, 58),
        fill={
            "from_pretrained(...)": "from_pretrained(model, first)",
            "load_adapter(...)": "load_adapter(second, 'second')",
            "So far, so good, the first adapter does not have `requires_grad`.": "",
        },
        before=MODEL,
    ),
    "000 quickstart": Block("000", 153, 170, fill=ON_CPU),
    "000 inference": Block(
        "000",
        174,
        187,
        fill=ON_CPU,
        before=MODEL + "get_peft_model(model, LoraConfig()).save_pretrained('qwen2.5-3b-lora')",
    ),
    "000 add": Block(
        "000",
        240,
        243,
        fill={
            "...  # transformers model": "AutoModelForCausalLM.from_pretrained(base)",
            "LoraConfig(...)": "LoraConfig()",
            "peft_config = ": "peft_config = lora_config = ",
        },
    ),
    "000 load": Block(
        "000",
        247,
        248,
        fill={"...  # transformers model": "AutoModelForCausalLM.from_pretrained(base)", "<path-to-adapter>": "first"},
    ),
    "000 set": Block(
        "000",
        252,
        252,
        before=ONE + "model.add_adapter(lora_config, 'lora_2')\nmodel.set_adapter('lora_1')",
        after="assert model.active_adapters() == ['lora_2']",
    ),
    "001 config": Block("001", 45, 55),
    "001 add": Block("001", 61, 63, fill=TRAINER, before=MODEL + "lora_config = LoraConfig()"),
    "001 modules_to_save": Block("001", 71, 83, fill=TRAINER),
    "001 from_pretrained": Block("001", 96, 98, after="assert model.active_adapters() == ['default']"),
    "001 load_adapter": Block("001", 105, 108),
    "001 8 bit": Block(
        "001", 119, 125, after="assert model.is_loaded_in_8bit and model.active_adapters() == ['default']"
    ),
    "001 second": Block("001", 133, 133, before=ONE),
    "001 set": Block("001", 139, 139, before=ONE + "model.add_adapter(lora_config, adapter_name='lora_2')"),
    "001 enable": Block("001", 147, 152, before=MODEL + "lora_1 = LoraConfig()\nlora_2 = LoraConfig()"),
    "001 hotswap": Block(
        *("001", 164, 171),
        fill={"from_pretrained(...)": "from_pretrained(base)"},
        before="from transformers import AutoModel\n"
        "file_name_adapter_1, file_name_adapter_2 = headless(first), headless(second)",
    ),
    "001 compiled": Block(
        *("001", 177, 187),
        fill={
            "from_pretrained(...)": "from_pretrained(base)",
            "max_rank = ...": "max_rank = 4",
            "torch.compile(model, ...)": "torch.compile(model, backend='eager')",
            "model(...)": "model(tokens).last_hidden_state",
        },
        before="from transformers import AutoModel\nfile_name_1, file_name_2 = headless(first), headless(second)",
        after="assert not torch.equal(output_1, output_2)",
    ),
    "002 seq2seq": Block("002", 22, 34),
    "003 gaussian": Block("003", 24, 26, fill=REST, after=FITS),
    "003 not the identity": Block("003", 30, 32, fill=REST, after=FITS),
    "003 pissa": Block("003", 40, 41, fill=REST, after=FITS),
    "003 pissa_niter": Block(
        "003", 45, 45, fill=REST | {"[number of iters]": "4"}, after=FITS.replace("config", "lora_config")
    ),
    "003 olora": Block("003", 55, 56, fill=REST, after=FITS),
    "003 loftq": Block(
        *("003", 72, 80),
        fill=REST | {"from_pretrained(..., ": "from_pretrained(base, "},
        after="peft_model(tokens)",
    ),
    "003 rslora": Block("003", 97, 99, fill=REST, after=FITS),
    "003 dora": Block("003", 105, 107, fill=REST, after=FITS),
    "003 ephemeral": Block("003", 111, 113, fill=REST, after=FITS),
    "003 ephemeral loading": Block("003", 117, 119, before=MODEL + "base_model, peft_model_id = model, first"),
    "003 all-linear": Block("003", 131, 131, fill=REST, after=FITS),
    "003 layer replication": Block("003", 137, 137, fill=REST, after=FITS),
    "003 LoRA+": Block(
        *("003", 151, 172),
        fill={
            "base_model = ...": "base_model = AutoModelForCausalLM.from_pretrained(base)",
            "LoraConfig(...)": "LoraConfig()",
            "bnb.optim.Adam8bit": "bnb.optim.Adam8bit if torch.cuda.is_available() else torch.optim.AdamW",
            "    ...,": "    model=model, args=arguments, train_dataset=data,",
        },
        after="trainer.train()",
    ),
    "003 merge": Block("003", 182, 188),
    "003 merge and unmerge": Block("003", 192, 201),
    "003 base in half precision": Block("003", 207, 213),
    "003 first adapter": Block("003", 217, 218, before=MODEL + "base_model = model"),
    "003 weighted": Block("003", 222, 230, before=LOADED, after="assert model.active_adapters == ['sft-dpo']"),
    "003 inference": Block(
        "003", 236, 245, fill={'"cuda"': "model.device", "max_length=30": "max_length=60"}, before=LOADED
    ),
    "003 load": Block("003", 251, 262),
    "003 unload": Block("003", 266, 267, before=LOADED),
    "003 delete": Block("003", 269, 270, before=LOADED + "model.load_adapter(second, 'dpo')"),
    "003 mixed batch": Block("003", 292, 313, before=ADAPTERS_OF_TWO_LANGUAGES, after="assert len(output) == 9"),
    "003 two languages": Block(
        *("003", 278, 288),
        fill={"model_id = ...": "model_id = base", "model, <path>": "model, first", "r(<path>": "r(second"},
        after="assert list(peft_model.peft_config) == ['adapter_fr', 'adapter_de']",
    ),
}

SKIPPED = {
    ("001", 25): "a shell command that installs peft",
    ("001", 32): "a shell command that installs peft",
    ("002", 79): "DreamBooth's command line: tests/diffusion/test_examples.py runs it",
    ("002", 152): "a config for accelerate: examples/conditional_generation has it",
    ("002", 179): "a command that needs DeepSpeed and a GPU",
    ("002", 185): "the log of that command",
}
"""Fenced blocks that are no Python, by document and the line of their fence, with the reason in one line."""
NOT_YET: dict[str, str] = {}
"""Blocks that fail for want of something not built, with what it is; each must go on failing, or leave this table."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    """What stands in for the hub: base models, adapters of one of them, a tokenizer, and a data set."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    small = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(root / "seq2seq")
    for name, alpha in (("first", 8), ("second", 4)):
        config = LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, task_type="CAUSAL_LM")
        base = LlamaForCausalLM.from_pretrained(root / "base")
        get_peft_model(base, config).save_pretrained(root / name)
    return {
        "base": str(root / "base"),
        "seq2seq": str(root / "seq2seq"),
        "first": str(root / "first"),
        "second": str(root / "second"),
        "data": [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9))}] * 2,
        "tokens": torch.arange(3, 9)[None],
    }


def headless(adapter: str) -> str:
    """An adapter of the backbone alone, as `AutoModel` loads it: the same, with no "model." before its paths."""
    from safetensors.torch import load_file, save_file

    target = Path(f"headless-{Path(adapter).name}")
    target.mkdir()
    (target / "adapter_config.json").write_text(Path(adapter, "adapter_config.json").read_text())
    tensors = load_file(Path(adapter, "adapter_model.safetensors"))
    save_file(
        {k.replace("model.model.model.", "model.model."): v for k, v in tensors.items()},
        target / "adapter_model.safetensors",
    )
    return str(target)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text.install()
    yield tmp_path
    text.uninstall()


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_runs(name, world, place):
    block = BLOCKS[name]
    given = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from veneer import LoraConfig, PeftModel, get_peft_model
"""
    arguments = TrainingArguments(
        output_dir=str(place / "out"),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    names = world | {"arguments": arguments, "headless": headless}
    parts = {"before": given + block.before, "block": block.code(), "after": block.after}
    try:
        for part, code in parts.items():
            exec(compile(code, f"<{name}: {part}>", "exec"), names)
    except Exception:
        if name in NOT_YET:
            pytest.xfail(NOT_YET[name])
        raise
    assert name not in NOT_YET, "it runs now: take it off NOT_YET"


@pytest.mark.parametrize("document", ["001", "002"])
def test_every_fenced_block_is_run_or_skipped_with_a_reason(document):
    (path,) = FOLDER.glob(f"{document}_*.txt")
    lines = path.read_text(encoding="utf-8").splitlines()
    fences = [i for i, line in enumerate(lines, 1) if line.startswith("```")]
    starts = {(document, line) for line in fences[::2]}
    run = {(b.document, b.first - 1) for b in BLOCKS.values() if b.document == document}
    assert starts == run | {key for key in SKIPPED if key[0] == document}


def test_every_import_of_peft_in_the_documents_is_in_a_block():
    """Documents without fences: what is code there is told by its imports."""
    covered = {(b.document, line) for b in BLOCKS.values() for line in range(b.first, b.last + 1)}
    for document in ("000", "001", "002", "003"):
        (path,) = FOLDER.glob(f"{document}_*.txt")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.match(r"\s*(from peft|import peft)", line):
                assert (document, number) in covered, f"{document}:{number}: {line}"


def test_every_name_that_the_blocks_import_exists():
    imported = set()
    for block in BLOCKS.values():
        for line in block.lines:
            if line.startswith("from peft"):
                node = ast.parse(line.strip()).body[0]
                assert isinstance(node, ast.ImportFrom)
                imported |= {((node.module or "").replace("peft", "veneer"), alias.name) for alias in node.names}
    assert len(imported) >= 8
    missing = [f"{module}.{name}" for module, name in sorted(imported) if not hasattr(import_module(module), name)]
    assert not missing
