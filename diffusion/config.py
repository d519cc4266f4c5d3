"""The settings of a DreamBooth run: the single source of its flags, its YAML and its form in the studio.

No model library is imported here, so that help and mistakes show at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.runs import adapters
from ..core.runs.config import RunConfig, own_fields_first


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(adapters.AdapterOptions):
    """The adapter of one component of the pipeline."""

    learning_rate: float | None = None
    """Peak rate of AdamW. Not given, the model family's: 1e-4 for a Stable Diffusion UNet, 5e-5 for its text encoder,
    1e-3 for the embedded pipeline."""
    targets: tuple[str, ...] = ()
    """Layers to adapt, as dotted name suffixes such as `to_q`. Not given, the family's attention projections."""
    feed_forward: bool = False
    """Adapt the feed-forward layers too: about as many parameters again, better likeness."""
    conv: bool = False
    """Adapt the convolutions too (UNet): more parameters still; helps with texture, style and small subjects."""


@own_fields_first
@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig(RunConfig):
    """Teach a diffusion pipeline a subject or a style from a few images.

    Running the same output directory again resumes it where it stopped, or says that it is complete.
    """

    instance_data_dir: Path
    """Folder with 3 to 30 images of the subject. A text file beside an image (dog.jpg, dog.txt) is its caption; naming
    the background there keeps it from being learnt as part of the subject."""
    instance_prompt: str
    """What the images show, with a rare word as the subject's name: "a photo of sks dog". For images without
    caption."""
    output_dir: Path
    """The run's directory: settings, metrics, samples, checkpoints, and in the end the adapter."""
    model: str = "embedded"
    """The pipeline to adapt: a local directory, a hub id such as CompVis/stable-diffusion-v1-4, or "embedded" for the
    small one that ships with this package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Not given, the newest."""

    unet: AdapterOptions = AdapterOptions()
    """The denoiser's adapter."""
    text_encoder: AdapterOptions = AdapterOptions()
    """The text encoder's adapter: better likeness, more memory. Without one, prompts are encoded only once."""

    class_prompt: str | None = None
    """What the subject is one of: "a photo of a dog". Given, images of the class are learnt alongside, so that not
    every dog becomes this one (prior preservation)."""
    class_data_dir: Path | None = None
    """Folder of class images; missing ones are generated into it. Not given, a folder beside the output directory,
    named for model, prompt and seed, and shared by all runs there."""
    num_class_images: int = 100
    """How many class images to learn from, at least 1. 100 to 200 keep the class varied."""
    prior_loss_weight: float = 1.0
    """Weight of the class images in the loss, from 0 up. 1: as much as the subject."""

    resolution: int | None = None
    """Side of the training squares in pixels, a multiple of 8. Not given, what the pipeline was trained at."""
    min_image_size: int | None = None
    """Images whose shorter side is below this many pixels are skipped. Not given, half the resolution: enlarging
    further would teach blur."""
    random_crop: bool = False
    """Cut the squares at random places instead of the centre: for subjects that fill little of wide images."""
    flip: bool = False
    """Learn mirrored images too. Not for subjects with text or a parting."""
    views: int = 8
    """How many crops of each image are prepared when `random_crop` is on; at least 1. With `flip` alone there are 2."""

    max_train_steps: int = 400
    """Optimizer steps, at least 1. 100 an image is a fair start; a run can be prolonged later."""
    train_batch_size: int = 1
    """Images of the subject in one forward pass (per process), plus as many of the class."""
    snr_gamma: float | None = None
    """Min-SNR loss weighting; 5 is the paper's and often learns faster on epsilon models. Off by default: DreamBooth's
    plain error, so that runs compare with those of other trainers."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts drawn at step 0, every `sample_every` steps and at the end. Not given, the instance prompt."""
    sample_seeds: tuple[int, ...] = (0, 1)
    """One image a prompt and seed; the same seeds at every step, so that only the learning shows. Empty: no samples."""
    sample_every: int = 100
    """Steps between samples; 0 for step 0 and the end only."""
    sample_steps: int = 20
    """Denoising steps of samples and class images (DPM++); 12 to 30."""
    sample_batch_size: int = 4
    """Images drawn at once, for samples and class images."""
    guidance_scale: float | None = None
    """How closely samples and class images follow their prompt. Not given, the family's: 7.5, or 3 for the embedded
    pipeline."""

    def adapters(self) -> dict[str, AdapterOptions]:
        """The components that are to be trained."""
        asked = {"unet": self.unet, "text_encoder": self.text_encoder}
        return {name: options for name, options in asked.items() if options.method != "none"}

    @classmethod
    def may_change(cls) -> frozenset[str]:
        return super().may_change() | {"sample_prompts", "sample_seeds", "sample_every", "sample_batch_size"}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.adapters():
            yield "nothing to train: both unet.method and text_encoder.method are none"
        for name, options in self.adapters().items():
            yield from options.problems(name)
        if not self.instance_prompt.strip():
            yield "instance_prompt is empty"
        if not Path(self.instance_data_dir).is_dir():
            yield f"instance_data_dir={self.instance_data_dir} is not a folder"
        yield from self.below(1, "num_class_images", "views", "sample_steps", "sample_batch_size")
        yield from self.below(0, "prior_loss_weight", "sample_every")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            yield f"resolution={self.resolution} must be a positive multiple of 8"
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            yield f"snr_gamma={self.snr_gamma} must be positive"
        if self.class_data_dir is not None and self.class_prompt is None:
            yield "class_data_dir is given without class_prompt"
