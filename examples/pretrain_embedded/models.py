"""The pipeline's parts: Stable Diffusion's classes, some hundred times smaller."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 192
"""Of the text encoder, and so of the UNet's cross-attention."""
TOKENS = 32
"""The longest caption."""


def make_vae(channels: tuple[int, int, int] = (64, 128, 128)) -> AutoencoderKL:
    """64 x 64 x 3 -> 16 x 16 x 4. `scaling_factor` is 1, because training ends by whitening the latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        norm_num_groups=16,
        scaling_factor=1.0,
    )


def make_unet() -> UNet2DConditionModel:
    """16 x 16 and 8 x 8, cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(112, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=(7, 5),
        norm_num_groups=16,
    )


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """The last two words of the vocabulary start and end a caption."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Scaled-linear noise, v-prediction (Salimans and Ho 2022, arXiv:2202.00512)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
