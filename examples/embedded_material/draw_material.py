"""Draw the bundled training images: four subjects and two styles, from openly licensed emoji art.

    python draw_material.py --packages packages --output ../../diffusion/embedded

writes `subjects/teddy`, ..., `styles/ink`, ... below the output folder: `01.png`, `01.txt`, `02.png`, ...
README.md beside this file says how to fetch the packages. The result is a pure function of them: no randomness.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PIXELS = 64  # the embedded pipeline's resolution
FINE = 4  # every image is drawn FINE times larger and averaged down, so that edges are smooth
CANVAS = PIXELS * FINE

NOTO = "iconify-json-noto-1.2.9"
HIGH_CONTRAST = "iconify-json-fluent-emoji-high-contrast-1.2.6"

Colour = tuple[int, int, int]
Plane = np.ndarray  # (CANVAS, CANVAS, 1) float: one value per pixel
Picture = np.ndarray  # (CANVAS, CANVAS, 3) float: RGB, 0 to 255


@dataclass(frozen=True)
class Scene:
    """One image: an icon, placed on a ground."""

    caption: str
    icon: str
    ground: str = "white"  # a key of GROUNDS
    ink: Colour | None = None  # the icon in this one colour; None keeps its own
    size: float = 0.88  # side of the icon, in sides of the image
    degrees: float = 0.0  # rotation, counter-clockwise
    mirrored: bool = False
    centre: tuple[float, float] = (0.5, 0.5)  # (right, down), in sides of the image


# ---- grounds ---------------------------------------------------------------------------------------------------------


def mix(share: Plane, first: Picture | Colour, second: Picture | Colour) -> Picture:
    """`first` where share is 1, `second` where it is 0."""
    return share * np.asarray(first, np.float64) + (1 - share) * np.asarray(second, np.float64)


def plain(colour: Colour) -> Callable[[Plane, Plane], Picture]:
    return lambda right, down: np.broadcast_to(np.asarray(colour, np.float64), (CANVAS, CANVAS, 3))


def discs(right: Plane, down: Plane, cells: int, radius: float, kept: float) -> Plane:
    """1 inside small discs, at most one in each cell of a grid, at irregular but fixed places."""
    column, row = np.floor(right * cells), np.floor(down * cells)

    def noise(salt: float) -> Plane:
        return np.abs(np.sin(column * 127.1 + row * 311.7 + salt * 74.7)) * 43.5453 % 1

    across, along = (column + 0.2 + 0.6 * noise(1)) / cells, (row + 0.2 + 0.6 * noise(2)) / cells
    inside = np.hypot(right - across, down - along) < radius
    return (inside & (noise(3) < kept)).astype(np.float64)


def grass(right: Plane, down: Plane) -> Picture:
    sky = mix(down, (214, 238, 252), (132, 196, 246))
    return mix(down > 0.62, mix(down, (84, 150, 54), (150, 204, 80)), sky)


def beach(right: Plane, down: Plane) -> Picture:
    sea = mix(down > 0.45, (64, 164, 206), (172, 222, 250))
    return mix(down > 0.66 + 0.03 * np.sin(12 * right + 2), (240, 218, 160), sea)


def night(right: Plane, down: Plane) -> Picture:
    stars = discs(right, down, cells=7, radius=0.014, kept=0.7)
    return mix(stars, (250, 246, 210), mix(down, (38, 42, 92), (14, 16, 44)))


def snow(right: Plane, down: Plane) -> Picture:
    sky = mix(down, (206, 226, 242), (150, 186, 220))
    land = mix(down > 0.64 + 0.02 * np.sin(9 * right + 1), (250, 252, 255), sky)
    return mix(discs(right, down, cells=6, radius=0.024, kept=0.8), (255, 255, 255), land)


# Drawn like the scenes the pipeline was pretrained on, so that a caption's "on the grass" explains the ground and the
# subject's word is left to explain the subject.
GROUNDS: dict[str, Callable[[Plane, Plane], Picture]] = {
    "white": plain((255, 255, 255)),
    "blue": plain((164, 206, 250)),
    "yellow": plain((255, 240, 160)),
    "grass": grass,
    "beach": beach,
    "night": night,
    "snow": snow,
    "blueprint": plain((34, 78, 158)),
}


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def subject(icon: str, words: str) -> list[Scene]:
    """Eight views of one icon; every caption names its ground, and white is the pipeline's silent default."""
    photo = f"a photo of {words}"
    return [
        Scene(photo, icon, size=0.90),
        Scene(f"{photo} on the grass", icon, "grass", size=0.82, degrees=6, mirrored=True, centre=(0.48, 0.54)),
        Scene(f"{photo} on a blue background", icon, "blue", size=0.84, degrees=-8),
        Scene(f"{photo} on the beach", icon, "beach", size=0.76, mirrored=True, centre=(0.54, 0.52)),
        Scene(f"{photo} on a yellow background", icon, "yellow", size=0.95, degrees=-4),
        Scene(f"{photo} at night", icon, "night", size=0.84, degrees=4, centre=(0.50, 0.53)),
        Scene(f"{photo} in the snow", icon, "snow", size=0.80, degrees=-3, mirrored=True, centre=(0.46, 0.54)),
        Scene(photo, icon, size=0.84, degrees=3, mirrored=True, centre=(0.52, 0.50)),
    ]


STYLE_ICONS = """red-apple dog-face rose rocket pizza house automobile strawberry lion elephant grinning-face cat-face
tulip banana guitar hamburger bear crying-face frog bicycle whale hot-beverage key rabbit-face"""


def style(words: str, ground: str = "white", ink: Colour | None = None) -> list[Scene]:
    """Many things in one hand: the only fact that all the captions share is the style's word."""
    scenes = []
    for icon in STYLE_ICONS.split():
        article = "an" if icon[0] in "aeiou" else "a"
        scenes.append(Scene(f"{article} {icon.replace('-', ' ')}, {words}", icon, ground, ink))
    return scenes


MATERIAL: dict[str, tuple[str, list[Scene]]] = {  # folder below the output -> (package of the art, scenes)
    "subjects/teddy": (NOTO, subject("teddy-bear", "sks bear")),
    "subjects/robot": (NOTO, subject("robot", "sks face")),
    "subjects/parrot": (NOTO, subject("parrot", "sks bird")),
    "subjects/racing_car": (NOTO, subject("racing-car", "sks car")),
    "styles/ink": (HIGH_CONTRAST, style("zwx style")),
    "styles/blueprint": (HIGH_CONTRAST, style("qvy style", "blueprint", (236, 244, 255))),
}


# ---- drawing ---------------------------------------------------------------------------------------------------------


def rasterise(package: Path, icons: set[str]) -> dict[str, Image.Image]:
    """RGBA images of the icons, CANVAS pixels wide."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(__file__).with_name("raster.cjs")
        subprocess.run(["node", str(program), str(package), folder, str(CANVAS), *sorted(icons)], check=True)
        return {icon: Image.open(Path(folder, f"{icon}.png")).convert("RGBA") for icon in icons}


def draw(scene: Scene, icon: Image.Image) -> Image.Image:
    """The scene at PIXELS x PIXELS, RGB."""
    axis = (np.arange(CANVAS) + 0.5) / CANVAS
    right, down = axis[None, :, None], axis[:, None, None]
    ground = np.broadcast_to(GROUNDS[scene.ground](right, down), (CANVAS, CANVAS, 3))
    image = Image.fromarray(ground.round().clip(0, 255).astype(np.uint8)).convert("RGBA")
    image.alpha_composite(placed(scene, icon if scene.ink is None else in_one_colour(icon, scene.ink)))
    return image.convert("RGB").reduce(FINE)


def in_one_colour(icon: Image.Image, colour: Colour) -> Image.Image:
    """The icon's shape alone."""
    flat = Image.new("RGBA", icon.size, (*colour, 255))
    flat.putalpha(icon.getchannel("A"))
    return flat


def placed(scene: Scene, icon: Image.Image) -> Image.Image:
    """The icon alone where the scene puts it, on a transparent canvas."""
    angle, scale = np.deg2rad(scene.degrees), icon.width / (CANVAS * scene.size)
    # Pillow asks for the way back: canvas (x, y) -> icon (a x + b y + c, d x + e y + f).
    back = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if scene.mirrored:
        back[0] *= -1
    shift = np.array([icon.width, icon.height]) / 2 - back @ (CANVAS * np.array(scene.centre))
    (a, b), (d, e) = back
    return icon.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, (a, b, shift[0], d, e, shift[1]), Image.Resampling.BICUBIC
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the demo's training images from emoji packages.")
    parser.add_argument("--packages", type=Path, required=True, help=f"folder that holds {NOTO} and {HIGH_CONTRAST}")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets subjects/ and styles/")
    options = parser.parse_args()
    for folder, (package, scenes) in MATERIAL.items():
        target = options.output / folder
        target.mkdir(parents=True, exist_ok=True)
        icons = rasterise(options.packages / package, {scene.icon for scene in scenes})
        for number, scene in enumerate(scenes, 1):
            draw(scene, icons[scene.icon]).save(target / f"{number:02}.png", optimize=True)
            (target / f"{number:02}.txt").write_text(scene.caption + "\n")
        print(f"{target}: {len(scenes)} images")


if __name__ == "__main__":
    main()
