"""Short real runs: what is learnt, how they stop and go on, what they write."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from veneer.core.config import config_classes
from veneer.core.runs.events import Done, Evaluation, Notice, Step, Stopped
from veneer.text import AdapterOptions, FineTuning
from veneer.text.events import Answers, Plan

METHODS = {kind.value.lower(): found for kind, found in config_classes().items()}
for unfit in ("multitask_prompt_tuning", "cpt"):  # they need more than texts: tasks, or a prompt of their own
    METHODS.pop(unfit, None)
OWN = {"diag_oft": {"block_size": 4}, "oft": {"oft_block_size": 8}, "adalora": {"tinit": 1, "tfinal": 1}}
OWN |= {
    "trainable_tokens": {"token_indices": "64,65,88"},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 1},
}


def run(config) -> list:
    return list(FineTuning(config).run())


def of(kind, events) -> list:
    return [event for event in events if isinstance(event, kind)]


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def stop_after(config, step: int) -> list:
    tuning, told = FineTuning(config), []
    for event in tuning.run():
        told.append(event)
        if isinstance(event, Step) and event.step == step:
            tuning.stop()
    return told


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_run_tells_and_keeps_what_it_learnt(make_config, tokenizer):
    config = make_config(
        adapter=AdapterOptions(rank=8, learning_rate=2e-2, targets=("all-linear",)),
        eval_fraction=0.25,
        eval_every=20,
        sample_prompts=("question 3",),
        sample_tokens=8,
        max_train_steps=60,
    )
    events = run(config)
    (plan,) = of(Plan, events)
    assert (plan.examples, plan.held_out, plan.method) == (6, 2, "lora")
    assert 0 < plan.learnt < plan.tokens
    losses = of(Evaluation, events)
    assert [event.step for event in losses] == [0, 20, 40, 60]
    assert losses[-1].loss < 0.5 * losses[0].loss
    assert losses[0].count == losses[-1].count > 0
    assert of(Answers, events)[-1].answers[0][1].startswith("aye")
    assert isinstance(events[-1], Done)
    told = [json.loads(line) for line in (config.output_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [0, 20, 40, 60]
    (answer,) = (config.output_dir / "samples" / "step-000060" / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["prompt"] == "question 3"
    assert json.loads((config.output_dir / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert [type(event) for event in run(config)] == [Done]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_resumes_exactly(make_config, tmp_path, method):
    options = {"rank": 4} if hasattr(METHODS[method], "r") and method != "oft" else {}
    config = make_config(
        adapter=AdapterOptions(method=method, learning_rate=1e-2, options=OWN.get(method, {}), **options)
    )
    assert isinstance(stop_after(config, 2)[-1], Stopped)
    before = adapter(config.output_dir / "checkpoints" / "step-000002")
    run(config)
    straight = replace(config, output_dir=tmp_path / "straight")
    run(straight)
    after = adapter(config.output_dir)
    assert_equal(after, adapter(straight.output_dir))
    assert any(not torch.equal(before[key], after[key]) for key in after)


def test_packing_dropout_accumulation_and_recomputation_resume_exactly(make_config, tmp_path):
    config = make_config(
        adapter=AdapterOptions(rank=4, dropout=0.2, targets=("all-linear",)),
        packing=True,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        lr_scheduler="cosine",
        lr_warmup_steps=2,
        eval_fraction=0.25,
        eval_every=1,
    )
    stop_after(config, 3)
    run(config)
    quiet = replace(config, output_dir=tmp_path / "quiet", eval_every=0)
    run(quiet)
    assert_equal(adapter(config.output_dir), adapter(quiet.output_dir))


def test_a_steps_loss_is_the_mean_over_its_tokens(make_config, tmp_path):
    """However they are spread: completions differ in length, so the mean of batches' means would be another."""
    whole = of(Step, run(make_config(train_batch_size=4, output_dir=tmp_path / "whole")))
    spread = of(
        Step, run(make_config(train_batch_size=1, gradient_accumulation_steps=4, output_dir=tmp_path / "spread"))
    )
    for one, other in zip(whole, spread, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.gradient_norms == pytest.approx(other.gradient_norms, rel=1e-3)


def test_bf16_keeps_the_adapter_in_float32(make_config):
    config = make_config(mixed_precision="bf16", packing=True)
    run(config)
    assert {tensor.dtype for tensor in adapter(config.output_dir).values()} == {torch.float32}


def test_a_4_bit_base_is_trained_and_resumed_exactly(make_config, tmp_path):
    """QLoRA, and QDoRA: the frozen weights are packed, the adapter is float32."""
    config = make_config(quantization="4bit", adapter=AdapterOptions(rank=4, learning_rate=1e-2, dora=True))
    stop_after(config, 2)
    steps = of(Step, run(config))
    straight = replace(config, output_dir=tmp_path / "straight")
    assert [step.loss for step in of(Step, run(straight))[2:]] == [step.loss for step in steps]
    assert_equal(adapter(config.output_dir), adapter(straight.output_dir))
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ValueError, match="needs a directory or hub id; a GGUF file"):
        run(replace(config, model=str(tmp_path / "x.gguf"), output_dir=tmp_path / "gguf"))


def test_what_is_cut_is_told_and_then_counted(make_config):
    notices = [event.message for event in of(Notice, run(make_config(max_length=24, max_train_steps=1)))]
    assert notices[0].endswith("data.jsonl:3 is longer than 24 tokens: its last 2 are not seen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": AdapterOptions(method="none")}, "nothing to train"),
        ({"adapter": AdapterOptions(targets=("q_prj",))}, "q_prj"),
        ({"adapter": AdapterOptions(options={"rnak": 1})}, "adapter: LoraConfig has no option rnak; it has"),
        ({"adapter": AdapterOptions(method="ia3", rank=4)}, "adapter.rank: ia3 has no such option"),
        ({"adapter": AdapterOptions(method="multitask_prompt_tuning")}, "needs the task of every row"),
        ({"adapter": AdapterOptions(method="prompt_tuning"), "packing": True}, "packing does not fit prompt_tuning"),
        ({"eval_fraction": 0.7}, "must lie between 0 and 0.5"),
        ({"eval_fraction": 0.01}, "of 8 examples is none"),
        ({"max_length": 8}, "no example has anything to learn within max_length=8"),
        ({"model": "/nowhere/at/all"}, "model=/nowhere/at/all cannot be loaded"),
    ],
)
def test_impossible_settings_are_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        run(make_config(**changes))


def test_changed_data_are_told_and_changed_settings_refused(make_config, write):
    config = make_config()
    stop_after(config, 2)
    with pytest.raises(ValueError, match=r"packing: False -> True"):
        run(replace(config, packing=True))
    write({"text": "another thing"})
    assert [event.message for event in of(Notice, run(config))] == ["the training data have changed since step 2"]
