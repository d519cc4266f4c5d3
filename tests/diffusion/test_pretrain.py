"""The programs that train the embedded pipeline, from art to a pipeline that draws, at the smallest scale."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

PROGRAMS = Path(__file__).parents[2] / "examples" / "pretrain_embedded"
LABELS = ["red apple", "cherries", "horse", "horse face", "automobile", "bread", "robot", "woman’s boot"]  # noqa: RUF001


@pytest.fixture(scope="module")
def programs():
    """The folder's modules, importable as when they run as programs."""
    before = set(sys.modules)
    sys.path.insert(0, str(PROGRAMS))
    yield PROGRAMS
    sys.path.remove(str(PROGRAMS))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == PROGRAMS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What `prepare.py` writes, with drawn discs in place of the art; the robot is held out."""
    folder = tmp_path_factory.mktemp("data")
    concepts = [
        {"code": str(i), "label": label, "tags": ["thing"], "short": [label.split()[-1]], "sub": "animal-mammal"}
        | {"kind": "animal", "weight": 1.0, "held_out": label == "robot"}
        for i, label in enumerate(LABELS)
    ]
    blobs, index = [], []
    for style in ("noto", "blob", "flat", "3d"):
        for i in range(len(LABELS)):
            image = Image.new("RGBA", (96, 96))
            ImageDraw.Draw(image).ellipse((8, 8 + 4 * i, 88, 88), fill=(30 * i, 200 - 20 * i, 90, 255))
            encoded = io.BytesIO()
            image.save(encoded, "WEBP", lossless=True)
            blobs.append(np.frombuffer(encoded.getvalue(), np.uint8))
            index.append((style, i))
    np.savez(folder / "sprites.npz", data=np.concatenate(blobs), offsets=np.cumsum([0, *map(len, blobs)]))
    (folder / "concepts.json").write_text(json.dumps({"concepts": concepts, "index": index}))
    return folder


@pytest.mark.parametrize(
    ("phrase", "spoken", "two"),
    [
        ("apple", "an apple", "two apples"),
        ("unicorn", "a unicorn", "two unicorns"),
        ("bowl of noodles", "a bowl of noodles", "two bowls of noodles"),
        ("fox", "a fox", "two foxes"),
        ("knife", "a knife", "two knives"),
        ("woman", "a woman", "two women"),
        ("bus", "a bus", "two buses"),
        ("cherries", "cherries", "two cherries"),
        ("man with red hair", "a man with red hair", "two men with red hair"),
    ],
)
def test_articles_and_plurals(programs, phrase, spoken, two):
    from names import counted, with_article

    assert with_article(phrase) == spoken
    assert counted("two", phrase) == two


def test_a_name_means_one_concept(programs, data):
    from scenes import Emoji

    emoji = Emoji(data)
    said = [name for called in emoji.names for name in (called.label, *called.aliases)]
    assert len(said) == len(set(said))
    assert "car" in emoji.names[LABELS.index("automobile")].aliases
    assert "horse" not in emoji.names[LABELS.index("horse face")].aliases
    assert "boot" in emoji.names[-1].aliases


def test_scenes_are_reproducible_and_never_show_what_is_held_out(programs, data):
    from scenes import THING, THINGS, Emoji, scenes

    emoji = Emoji(data)
    rows, captions = scenes(emoji, 400, seed=3)
    again, same = scenes(emoji, 400, seed=3)
    assert np.array_equal(rows, again)
    assert captions == same
    shown = {emoji.index[int(i)][1] for i in rows[:, : THINGS * THING : THING].ravel() if i >= 0}
    assert LABELS.index("robot") not in shown
    assert not any("robot" in caption for caption in captions)
    assert {"two", "a photo of", "on the grass", "3d style"} <= {
        words for words in ("two", "a photo of", "on the grass", "3d style") if any(words in c for c in captions)
    }
    assert not any(" a a" in caption or "a cherries" in caption or "a bread" in caption for caption in captions)


def test_every_ground_and_colour_renders(programs, data):
    from render import load_sprites, render
    from scenes import COLOUR_NAMES, GROUNDS, THING, THINGS, one

    rows = np.stack([one(0) for _ in range(len(GROUNDS) + len(COLOUR_NAMES))])
    rows[: len(GROUNDS), THINGS * THING] = range(len(GROUNDS))
    rows[len(GROUNDS) :, THING - 1] = range(1, len(COLOUR_NAMES) + 1)
    images = render(torch.from_numpy(rows), load_sprites(data))
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1
    blue = images[len(GROUNDS) + COLOUR_NAMES.index("blue"), :, 32, 32]
    assert blue.argmax() == 2


def test_muon_orthogonalises(programs):
    from training import orthogonal

    for shape in ((3, 8, 20), (2, 20, 8)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
        assert ((singular > 0.6) & (singular < 1.3)).all()


def test_a_rotated_latent_space_is_found_and_undone(programs):
    from models import make_unet
    from warm_start import rotation, turn

    matrix = torch.linalg.qr(torch.randn(4, 4)).Q
    new = torch.randn(64, 4, 16, 16)
    old = torch.einsum("ij,njhw->nihw", matrix, new)
    assert torch.allclose(rotation(old, new), matrix, atol=1e-5)
    unet, words, times = make_unet(), torch.randn(2, 3, 192), torch.tensor([10, 700])
    with torch.no_grad():
        before = unet(old[:2], times, words).sample
        turn(unet, matrix)
        after = torch.einsum("ij,njhw->nihw", matrix, unet(new[:2], times, words).sample)
    assert torch.allclose(before, after, atol=1e-4)


def test_from_art_to_a_pipeline_that_draws(programs, data, tmp_path, capsys):
    import assemble
    import encode_pool
    import evaluate
    import make_tokenizer
    import train_unet
    import train_vae

    tokenizer, state, out = tmp_path / "tokenizer", tmp_path / "state", tmp_path / "pipeline"
    make_tokenizer.main(make_tokenizer.Options(data=data, out=tokenizer, captions=400))
    scale = {"data": data, "state": state, "pool": 64, "workers": 1}
    brief = {"batch": 2, "compile": False}
    train_vae.main(train_vae.Options(**scale, **brief, minutes=0.05, channels=(16, 16, 16)))
    encode_pool.main(encode_pool.Options(**scale, tokenizer=tokenizer))
    unet = {**scale, **brief, "tokenizer": tokenizer}
    train_unet.main(train_unet.Options(**unet, minutes=0.04, stop=0))  # ends at once, and keeps its state
    started = torch.load(state / "unet.pt", weights_only=True)
    train_unet.main(train_unet.Options(**unet, minutes=0.04))
    finished = torch.load(state / "unet.pt", weights_only=True)
    assert started["step"] < finished["step"]
    assert started["spent"] < finished["spent"]
    assemble.main(assemble.Options(state=state, tokenizer=tokenizer, out=out))
    assert not any(str(tmp_path) in config.read_text() for config in out.rglob("*.json"))
    options = {"data": data, "pipelines": (out,), "out": tmp_path / "evaluation", "concepts": 2, "threads": 1}
    evaluate.main(evaluate.Options(**options, prompts=("a red apple",)))
    assert "of 2 |" in (tmp_path / "evaluation" / "table.md").read_text()
    assert (tmp_path / "evaluation" / "1-pipeline-prompts.png").is_file()
    warm = train_unet.Options(**{**unet, "state": tmp_path / "warm"}, start=out, minutes=0.01)
    shutil.copytree(state / "vae", warm.state / "vae")
    shutil.copy(encode_pool.latents_file(state), encode_pool.latents_file(warm.state))
    train_unet.main(warm)
    assert (warm.state / "unet" / "diffusion_pytorch_model.safetensors").is_file()
