"""Short real runs: what is trained, what is refused, what is written."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from veneer.core.runs.directory import RunDirectory
from veneer.diffusion import (
    AdapterOptions,
    Checkpoint,
    ConfigError,
    DataError,
    Done,
    DreamBooth,
    Notice,
    Plan,
    Progress,
    Sample,
    Step,
    Stopped,
    TrainingError,
    denoising,
    families,
)

NONE = AdapterOptions(method="none")
SMALL = AdapterOptions(rank=2, learning_rate=1e-3)


def run(config) -> list:
    return list(DreamBooth(config).run())


def of(kind, events) -> list:
    return [event for event in events if isinstance(event, kind)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*/adapter_model.safetensors"))
    return {f"{file.parent.name}.{key}": tensor for file in files for key, tensor in load_file(file).items()}


def assert_equal_runs(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def changed(folder: Path) -> set[str]:
    """Components whose adapter no longer is the identity: a factor that starts at zero has moved."""
    zero_at_start = ("lora_B", "hada_w2_b", "lokr_w1")
    return {
        key.partition(".")[0]
        for key, tensor in weights(folder).items()
        if any(name in key for name in zero_at_start) and tensor.abs().max() > 0
    }


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "options",
    [
        AdapterOptions(rank=2, conv=True, feed_forward=True, dropout=0.1),
        AdapterOptions(rank=2, dora=True),
        AdapterOptions(method="loha", rank=2, conv=True, options={"use_effective_conv2d": True}),
        AdapterOptions(method="lokr", rank=2, options={"decompose_factor": 8}),
    ],
    ids=["lora-conv-ff-dropout", "dora", "loha-conv", "lokr"],
)
def test_every_method_trains_both_components(make_config, options):
    config = make_config(unet=options, text_encoder=replace(options, conv=False))
    events = run(config)
    assert [event.step for event in of(Step, events)] == [1, 2]
    assert isinstance(events[-1], Done)
    assert changed(config.output_dir) == {"unet", "text_encoder"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_the_pipelines_prediction_type_is_honoured(make_config, pipeline_predicting, prediction_type):
    config = make_config(model=str(pipeline_predicting(prediction_type)), snr_gamma=5.0)
    (plan,) = of(Plan, events := run(config))
    assert plan.prediction_type == prediction_type
    assert all(step.loss > 0 for step in of(Step, events))


def test_components_have_their_own_rank_alpha_and_rate(make_config):
    config = make_config(
        unet=AdapterOptions(rank=4, alpha=8, learning_rate=1e-3),
        text_encoder=AdapterOptions(rank=2, learning_rate=1e-4, targets=("q_proj",)),
    )
    assert of(Step, run(config))[-1].learning_rates == {"unet": 1e-3, "text_encoder": 1e-4}
    unet, text = (
        json.loads((config.output_dir / c / "adapter_config.json").read_text()) for c in ("unet", "text_encoder")
    )
    assert (unet["r"], unet["lora_alpha"], text["r"], text["lora_alpha"]) == (4, 8, 2, 2)
    assert text["target_modules"] == ["q_proj"]


def test_a_frozen_text_encoder_is_encoded_once(make_config):
    config = make_config(text_encoder=NONE)
    run(config)
    assert changed(config.output_dir) == {"unet"}


def test_the_text_encoder_alone(make_config):
    config = make_config(unet=NONE, gradient_checkpointing=True)
    run(config)
    assert changed(config.output_dir) == {"text_encoder"}


def test_checkpointing_and_accumulation_change_memory_not_results(make_config, tmp_path):
    plain = of(Step, run(make_config(train_batch_size=2, output_dir=tmp_path / "a")))
    saving = of(Step, run(make_config(train_batch_size=2, gradient_checkpointing=True, output_dir=tmp_path / "b")))
    for one, other in zip(plain, saving, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.gradient_norms == pytest.approx(other.gradient_norms, rel=1e-3)
    config = make_config(gradient_accumulation_steps=3, output_dir=tmp_path / "c")
    assert [step.step for step in of(Step, run(config))] == [1, 2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_adapters_in_float32(make_config, precision):
    config = make_config(mixed_precision=precision, gradient_checkpointing=True, max_train_steps=3)
    events = run(config)
    assert of(Step, events)[0].loss == pytest.approx(0.5, abs=0.5)
    assert {tensor.dtype for tensor in weights(config.output_dir).values()} == {torch.float32}
    assert changed(config.output_dir) == {"unet", "text_encoder"}


def test_samples_do_not_disturb_training(make_config, tmp_path):
    dropping = AdapterOptions(rank=2, learning_rate=1e-3, dropout=0.2)
    quiet = make_config(unet=dropping, output_dir=tmp_path / "quiet", max_train_steps=3)
    run(quiet)
    shown = make_config(
        unet=dropping, output_dir=tmp_path / "shown", max_train_steps=3, sample_seeds=(0, 1), sample_every=1
    )
    samples = of(Sample, run(shown))
    assert [sample.step for sample in samples] == [0, 1, 2, 3]
    assert all(len(sample.images) == 2 for sample in samples)
    assert samples[-1].sheet.exists()
    assert_equal_runs(quiet.output_dir, shown.output_dir)


def test_global_random_state_is_left_alone(make_config):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(make_config(unet=AdapterOptions(rank=2, dropout=0.2)))
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- prior preservation


def test_class_images_are_drawn_once_and_shared(make_config, tmp_path):
    changes = {"class_prompt": "a photo of a disc", "num_class_images": 2}
    events = run(make_config(**changes))
    assert of(Plan, events)[0].class_images == 2
    assert {"instance", "prior"} == of(Step, events)[0].losses.keys()
    (folder,) = (tmp_path / "class_images").iterdir()
    drawn = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(drawn) == 2

    events = run(make_config(output_dir=tmp_path / "second", **(changes | {"num_class_images": 3})))
    assert [(p.done, p.total) for p in of(Progress, events) if p.stage == "class images"] == [(1, 1)]
    assert len(list(folder.glob("*.png"))) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in drawn.items())


def test_the_users_class_images_count_and_another_recipe_is_refused(make_config, images, tmp_path):
    changes = {"class_prompt": "a disc", "class_data_dir": images, "num_class_images": 4}
    assert of(Plan, run(make_config(**changes)))[0].class_images == 4
    with pytest.raises(DataError, match=r"another recipe .*prompt: 'a disc' -> 'a ball'"):
        run(make_config(output_dir=tmp_path / "other", **(changes | {"class_prompt": "a ball"})))


# ---------------------------------------------------------------- cannot fail silently


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": NONE, "text_encoder": NONE}, "nothing to train"),
        ({"unet": AdapterOptions(rank=0)}, "unet.rank=0 must be at least 1"),
        ({"max_train_steps": 0}, "max_train_steps=0 must be at least 1"),
        ({"resolution": 65}, "resolution=65 must be a positive multiple of 8"),
        ({"instance_prompt": " "}, "instance_prompt is empty"),
        ({"instance_data_dir": Path("nowhere")}, "instance_data_dir=nowhere is not a folder"),
        ({"unet": AdapterOptions(options={"rnak": 3})}, "unet: LoraConfig has no option rnak"),
        ({"unet": AdapterOptions(targets=("to_qq",))}, "to_qq"),
        ({"text_encoder": AdapterOptions(conv=True)}, "text_encoder.conv: the text_encoder has no such layers"),
        ({"text_encoder": AdapterOptions(rank_pattern={"mlp.fc9": 4})}, "mlp.fc9"),
        ({"model": "no-such-model"}, "neither a directory, nor a hub id"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(make_config, changes, message):
    config = make_config(**changes)
    with pytest.raises(ValueError, match=message) as error:
        run(config)
    assert "\n" not in str(error.value)


def test_an_adapter_that_no_gradient_reaches_ends_the_run(make_config, monkeypatch):
    def cut_off(pipe, tokens):
        return {"encoder_hidden_states": pipe.text_encoder(tokens)[0].detach()}

    monkeypatch.setattr(families, "TINY", replace(families.TINY, encode_text=cut_off))
    with pytest.raises(TrainingError, match="no gradient reaches the adapter of text_encoder"):
        run(make_config())


def test_nan_ends_the_run_and_keeps_the_last_checkpoint(make_config, monkeypatch):
    config = make_config(max_train_steps=4, checkpointing_steps=1)
    real, calls = denoising.denoising_loss, []

    def breaks_at_step_3(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(denoising, "denoising_loss", breaks_at_step_3)
    with pytest.raises(TrainingError, match=r"the loss of step 3 is nan; .* Kept: .*step-000002"):
        run(config)
    kept = weights(config.output_dir / "checkpoints" / "step-000002")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_bad_images_and_cut_prompts_are_told(make_config, images):
    (images / "broken.png").write_bytes(b"no image")
    (images / "0.txt").write_text("a very round disc " * 20)
    notices = [notice.message for notice in of(Notice, run(make_config()))]
    assert any(message.startswith("skipped broken.png: cannot be read") for message in notices)
    assert any("reads only 32 tokens" in message for message in notices)


# ---------------------------------------------------------------- rerun


def test_ctrl_c_saves_and_a_rerun_ends_like_an_undisturbed_run(make_config, tmp_path):
    undisturbed = make_config(max_train_steps=4, output_dir=tmp_path / "undisturbed")
    run(undisturbed)
    stopped, told = make_config(max_train_steps=4), []
    for event in DreamBooth(stopped).run():
        told.append(event)
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
    assert told[-1] == Stopped(2, stopped.output_dir)
    assert isinstance(told[-2], Checkpoint)
    events = run(stopped)
    assert of(Plan, events)[0].start_step == 2
    assert_equal_runs(undisturbed.output_dir, stopped.output_dir)


def test_samples_and_checkpoints_on_demand_come_once_and_teach_nothing(make_config, tmp_path):
    undisturbed = make_config(max_train_steps=4, output_dir=tmp_path / "undisturbed")
    run(undisturbed)
    config = make_config(max_train_steps=4, sample_seeds=(0,), sample_every=0)
    booth, told = DreamBooth(config), []
    for event in booth.run():
        told.append(event)
        if isinstance(event, Step) and event.step == 2:
            booth.sample()
            booth.save()
    assert [sample.step for sample in of(Sample, told)] == [0, 2, 4]
    assert [checkpoint.step for checkpoint in of(Checkpoint, told)] == [2, 4]
    asked, left = (weights(folder.output_dir) for folder in (config, undisturbed))
    assert asked.keys() == left.keys()
    assert all(torch.equal(asked[key], left[key]) for key in left)


def test_changed_images_are_told_on_resume(make_config, images):
    run(make_config())
    (images / "0.txt").write_text("a disc on white")
    notices = of(Notice, run(make_config(max_train_steps=3)))
    assert [notice.message for notice in notices] == ["the instance data have changed since step 2"]


def test_a_finished_run_says_so_and_can_be_prolonged(make_config, tmp_path):
    config = make_config()
    run(config)
    assert run(config) == [Done(2, config.output_dir)]
    longer = make_config(max_train_steps=4)
    assert [step.step for step in of(Step, run(longer))] == [3, 4]
    straight = make_config(max_train_steps=4, output_dir=tmp_path / "straight")
    run(straight)
    assert_equal_runs(longer.output_dir, straight.output_dir)
    with pytest.raises(ConfigError, match="has done 4 steps already"):
        run(config)


def test_other_settings_in_the_same_directory_are_refused_by_name(make_config):
    run(make_config())
    other = make_config(train_batch_size=2, unet=replace(SMALL, rank=4), sample_every=7)
    with pytest.raises(ConfigError, match=r"train_batch_size: 1 -> 2; unet.rank: 2 -> 4\)"):
        run(other)


def test_a_folder_of_something_else_is_not_overwritten(make_config):
    config = make_config()
    (config.output_dir / "unet").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"without config.yaml"):
        run(config)


def test_only_the_newest_checkpoints_are_kept(make_config):
    config = make_config(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    run(config)
    assert [path.name for path in sorted((config.output_dir / "checkpoints").iterdir())] == [
        "step-000003",
        "step-000004",
    ]


def test_one_process_a_run(make_config):
    config = make_config()
    with RunDirectory(config.output_dir).opened(config), pytest.raises(ConfigError, match="another process"):
        run(config)
