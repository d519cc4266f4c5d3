"""The training objective: what the denoiser is asked to predict, and how far off it is.

With x_t = a_t x_0 + s_t e (a_t^2 + s_t^2 = 1) a pipeline's denoiser predicts one of

    epsilon        e
    v_prediction   a_t e - s_t x_0        (Salimans & Ho 2022, arXiv:2202.00512)
    sample         x_0

and DreamBooth (Ruiz et al. 2022, arXiv:2208.12242) minimises |prediction - target|^2 on the subject's images plus
`prior_loss_weight` times the same on images of the class, so that the class does not turn into the subject.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def training_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser should return.

    **Arguments**: `scheduler` a `DDPMScheduler`; `latents`, `noise` (batch, channels, height, width); `timesteps`
    (batch,) of int64. Returns the shape of `latents`.
    """
    match scheduler.config["prediction_type"]:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(latents, noise, timesteps)
        case "sample":
            return latents
        case other:
            raise ValueError(f"the pipeline's scheduler predicts {other!r}; known: {', '.join(PREDICTION_TYPES)}")


def signal_to_noise(scheduler: Any, timesteps: Tensor) -> Tensor:
    """a_t^2 / s_t^2 of each timestep, (batch,); 0 at the last step of a zero-terminal-SNR schedule."""
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas / (1 - alphas)


def snr_weights(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR weights (Hang et al. 2023, arXiv:2303.09556), (batch,): w = min(snr, gamma) on the error of x_0.

    The error of epsilon is snr times that of x_0 and the error of v is snr + 1 times, hence the divisions. Written so
    that snr = 0 gives the limit instead of 0 / 0.
    """
    capped = snr.clamp(max=gamma)
    match prediction_type:
        case "epsilon":
            return (gamma / snr).clamp(max=1.0)
        case "v_prediction":
            return capped / (snr + 1)
        case _:
            return capped


def denoising_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each example, (batch,), in float32; `weights` (batch,) multiply it."""
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return errors if weights is None else errors * weights


def split_loss(errors: Tensor, instances: int, prior_loss_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and parts of a batch whose first `instances` examples show the subject and the rest its class.

    **Arguments**: `errors` (instances + classes,). Returns a scalar and the unweighted scalars by name.
    """
    parts = {"instance": errors[:instances].mean()}
    if len(errors) == instances:
        return parts["instance"], parts
    parts["prior"] = errors[instances:].mean()
    return parts["instance"] + prior_loss_weight * parts["prior"], parts
