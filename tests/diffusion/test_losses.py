"""The objective, against its definitions."""

import pytest
import torch
from diffusers import DDPMScheduler
from veneer.diffusion.losses import (
    PREDICTION_TYPES,
    denoising_loss,
    signal_to_noise,
    snr_weights,
    split_loss,
    training_target,
)


def schedule(prediction_type: str, **changes) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, **changes)


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 4, 8, 8, generator=random, dtype=torch.float64)
    return clean, noise, torch.tensor([0, 10, 400, 800, 999])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_gives_back_the_clean_latents(prediction_type: str, batch):
    """Each prediction, put into its own formula for x_0, must return x_0."""
    clean, noise, steps = batch
    scheduler = schedule(prediction_type)
    noisy = scheduler.add_noise(clean, noise, steps)
    target = training_target(scheduler, clean, noise, steps)
    a = scheduler.alphas_cumprod[steps].sqrt().view(-1, 1, 1, 1)
    s = (1 - scheduler.alphas_cumprod[steps]).sqrt().view(-1, 1, 1, 1)
    recovered = {"epsilon": (noisy - s * target) / a, "v_prediction": a * noisy - s * target, "sample": target}
    torch.testing.assert_close(recovered[prediction_type], clean, rtol=1e-4, atol=1e-4)


def test_an_unknown_prediction_type_is_an_error(batch):
    scheduler = schedule("epsilon")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="flow"):
        training_target(scheduler, *batch)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_the_same_error_of_x0_alike(prediction_type: str, batch):
    """An error of x_0 costs min(snr, gamma) whatever the denoiser predicts."""
    *_, steps = batch
    scheduler = schedule(prediction_type)
    a, s = scheduler.alphas_cumprod[steps].sqrt(), (1 - scheduler.alphas_cumprod[steps]).sqrt()
    factor = {"epsilon": a / s, "v_prediction": 1 / s, "sample": torch.ones(5)}[prediction_type]  # of error by x_0's
    snr = signal_to_noise(scheduler, steps)
    cost = snr_weights(snr, prediction_type, 5.0) * factor.square()
    torch.testing.assert_close(cost, snr.clamp(max=5.0), rtol=1e-3, atol=1e-4)


def test_min_snr_survives_zero_terminal_snr():
    scheduler = schedule("epsilon", rescale_betas_zero_snr=True)
    snr = signal_to_noise(scheduler, torch.tensor([999]))
    for kind in PREDICTION_TYPES:
        assert snr_weights(snr, kind, 5.0).isfinite().all()


def test_loss_is_a_mean_per_example_in_float32():
    prediction, target = torch.ones(3, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(3, 4, 8, 8)
    assert denoising_loss(prediction, target).tolist() == [1, 1, 1]
    assert denoising_loss(prediction, target, torch.tensor([0.0, 1.0, 2.0])).tolist() == [0, 1, 2]
    assert denoising_loss(prediction, target).dtype == torch.float32


def test_prior_preservation_is_a_weighted_second_mean():
    total, parts = split_loss(torch.tensor([1.0, 3.0, 10.0, 20.0]), 2, 0.5)
    assert (total.item(), parts["instance"].item(), parts["prior"].item()) == (9.5, 2.0, 15.0)
    total, parts = split_loss(torch.tensor([1.0, 3.0]), 2, 0.5)
    assert (total.item(), list(parts)) == (2.0, ["instance"])
