"""Answering and merging, from the command line too."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from veneer import cli
from veneer.text import AdapterOptions, AnswerConfig, FineTuning, MergeConfig, generate_text, merge_adapters
from veneer.text.generate import parse_weighted
from veneer.text.with_adapters import load_with_adapters


@pytest.fixture
def adapters(make_config, write, tmp_path) -> list[str]:
    """Two adapters of different methods that answer differently."""
    folders = []
    for name, method, words in (("aye", "lora", "aye aye"), ("nay", "ia3", "nay nay")):
        line = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": words}]}
        config = make_config(
            data=write(line, name=f"{name}.jsonl"),
            output_dir=tmp_path / name,
            adapter=AdapterOptions(method=method, learning_rate=5e-2),
            max_train_steps=20,
        )
        for _ in FineTuning(config).run():
            pass
        folders.append(str(config.output_dir))
    return folders


def ask(model_dir, *prompts, **options) -> list[str]:
    return generate_text(AnswerConfig(model=str(model_dir), prompts=prompts, max_new_tokens=8, device="cpu", **options))


def test_a_mixed_batch_answers_as_each_adapter_alone(model_dir, adapters):
    prompts = ("who?", "who are you, then?", "who?")
    alone = [
        ask(model_dir, prompt, adapters=used)[0]
        for prompt, used in zip(prompts, ((adapters[0],), (adapters[1],), ()), strict=True)
    ]
    assert alone[0].startswith("aye")
    assert ask(model_dir, *prompts, adapters=(*adapters, "base"), each=True) == alone
    assert len(set(alone)) == 3


def test_weights_and_sampling(model_dir, adapters):
    off = ask(model_dir, "who?", adapters=(f"{adapters[0]}=0",))
    assert off == ask(model_dir, "who?")
    drawn = [ask(model_dir, "who?", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_answer_is_printed_as_it_is_written(model_dir, adapters, capsys):
    cli.main(
        [
            "text",
            "generate",
            "--model",
            str(model_dir),
            "--adapters",
            adapters[0],
            "--prompts",
            "who?",
            "--device",
            "cpu",
        ]
    )
    assert capsys.readouterr().out.startswith("aye aye")
    cli.main(["text", "generate", "--model", str(model_dir), "--prompts", "a", "b", "--max-new-tokens", "2"])
    assert "> a\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "nothing to answer"),
        ({"prompts": ("a", "b"), "each": True, "adapters": ("x",)}, "as many adapters as prompts, not 1 and 2"),
        ({"prompts": ("a",), "top_p": 0.5}, "only with a temperature above 0"),
        ({"prompts": ("a",), "system": "b", "chat": False}, "a system message belongs to a chat"),
    ],
)
def test_impossible_questions_are_refused(model_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        generate_text(AnswerConfig(model=str(model_dir), **changes))


def test_merged_it_is_a_plain_model(model_dir, adapters, tmp_path, capsys):
    out = tmp_path / "merged"
    flags = ["--model", str(model_dir), "--adapters", adapters[0], f"{adapters[1]}=0.5", "--out", str(out)]
    cli.main(["text", "merge", *flags])
    assert "AutoModelForCausalLM" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    weighted = parse_weighted((adapters[0], f"{adapters[1]}=0.5"))
    adapted, tokenizer = load_with_adapters(str(model_dir), weighted, dtype=torch.float32)
    ids = torch.tensor([tokenizer("who?")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    with pytest.raises(ValueError, match="is there already"):
        merge_adapters(MergeConfig(model=str(model_dir), adapters=(adapters[0],), out=out))


def test_settings_go_through_yaml(model_dir, tmp_path, capsys):
    flags = ["--data", "x.jsonl", "--model", "m", "--output-dir", "o", "--adapter.method", "ia3", "--packing"]
    cli.main(["text", "train", *flags, "--print-config"])
    shown = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(shown)
    cli.main(["text", "train", "--config", str(tmp_path / "run.yaml"), "--print-config"])
    assert capsys.readouterr().out == shown
    assert "method: ia3" in shown
    cli.main(["text"])
    assert capsys.readouterr().out.count("veneer text ") == 3


def test_training_from_the_command_line(make_config, capsys):
    config = make_config()
    flags = ["--data", str(config.data), "--model", config.model, "--output-dir", str(config.output_dir)]
    cli.main(["text", "train", *flags, "--max-train-steps", "2", "--device", "cpu", "--eval-fraction", "0.25"])
    said = "".join(capsys.readouterr())
    assert "held-out loss after step 2" in said
    assert json.loads((config.output_dir / "finished.json").read_text()) == {"step": 2}
