"""Scenes drawn in batches with torch, on any device: rows of `scenes.py` in, RGB images out."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import COLOURS, GROUNDS, THING, THINGS
from torch import Tensor

PIXELS = 64


def load_sprites(folder: Path, rows: list[int] | None = None) -> Tensor:
    """uint8 RGBA (n, 4, 96, 96) of these rows of the prepared data; all by default."""
    stored = np.load(folder / "sprites.npz")
    data, offsets = stored["data"], stored["offsets"]

    def decode(row: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data[offsets[row] : offsets[row + 1]].tobytes())).convert("RGBA"))

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(decode, range(len(offsets) - 1) if rows is None else rows))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def render(rows: Tensor, sprites: Tensor) -> Tensor:
    """Float images (n, 3, 64, 64) in 0..1 of the scenes `rows` (n, WIDTH), whose sprites are indices of `sprites`."""
    images = _grounds(rows[:, THINGS * THING :])
    for start in range(0, THINGS * THING, THING):
        thing = rows[:, start : start + THING]
        there = (thing[:, 0] >= 0).nonzero().flatten()
        if len(there):
            placed = _placed(thing[there], sprites)
            images[there] = placed[:, :3] + (1 - placed[:, 3:]) * images[there]
    return images.clamp(0, 1)


def _placed(things: Tensor, sprites: Tensor) -> Tensor:
    """Premultiplied RGBA (n, 4, 64, 64) of each thing alone."""
    sprite = sprites[things[:, 0].long()].float() / 255
    colour, alpha = _recoloured(sprite[:, :3], sprite[:, 3:], things[:, 6].long()), sprite[:, 3:]
    right, down, size, angle = things[:, 1] * 2 - 1, things[:, 2] * 2 - 1, things[:, 3], things[:, 4].deg2rad()
    mirror = 1 - 2 * things[:, 5]
    cos, sin = angle.cos() / size, angle.sin() / size
    across = torch.stack([mirror * cos, mirror * sin, -mirror * (cos * right + sin * down)], 1)
    along = torch.stack([-sin, cos, sin * right - cos * down], 1)
    # Twice as large, then averaged: anti-aliased at any size.
    grid = F.affine_grid(torch.stack([across, along], 1), (len(things), 4, 2 * PIXELS, 2 * PIXELS), align_corners=False)
    large = F.grid_sample(torch.cat([colour * alpha, alpha], 1), grid, align_corners=False)
    return F.avg_pool2d(large, 2)


def _recoloured(rgb: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
    """Mapped by brightness onto black - colour - white; colour 0 leaves a sprite as it is."""
    palette = rgb.new_tensor([(0, 0, 0), *COLOURS.values()]) / 255
    chosen = palette[colour].view(-1, 3, 1, 1)
    light = (rgb * rgb.new_tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    middle = ((light * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp(min=1)).clamp(0.3, 0.8)
    mapped = torch.where(
        light < middle, chosen * light / middle, chosen + (1 - chosen) * (light - middle) / (1 - middle)
    )
    return torch.where((colour > 0).view(-1, 1, 1, 1), 0.88 * mapped + 0.12 * rgb, rgb)


# ---- grounds ---------------------------------------------------------------------------------------------------------


def _grounds(rows: Tensor) -> Tensor:
    """(n, 3, 64, 64), drawn kind by kind."""
    images = (rows[:, 1:4, None, None] / 255).repeat(1, 1, PIXELS, PIXELS)
    for number, kind in enumerate(GROUNDS[1:], 1):
        these = (rows[:, 0] == number).nonzero().flatten()
        if len(these):
            images[these] = getattr(_Ground(rows[these]), kind)().expand(-1, 3, PIXELS, PIXELS).clamp(0, 1)
    return images


def _mix(share: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`first` where share is 1, `second` where it is 0."""
    return share * first + (1 - share) * second


def _step(value: Tensor) -> Tensor:
    """0 below zero, 1 above, half a pixel soft."""
    return torch.sigmoid(value * PIXELS * 2)


class _Ground:
    """Each method draws one kind of ground for a batch; what varies comes from the rows' seeds."""

    def __init__(self, rows: Tensor):
        n, device = len(rows), rows.device
        self.first, self.second = (rows[:, i : i + 3].view(n, 3, 1, 1) / 255 for i in (1, 4))
        self.seed = rows[:, 7].view(n, 1, 1, 1)
        self.share = self.seed / 65536
        self.down = torch.arange(PIXELS, device=device).view(1, 1, PIXELS, 1) / PIXELS
        self.right = self.down.mT
        self.horizon = 0.55 + 0.2 * self.share

    def _rgb(self, *colour: float) -> Tensor:
        return torch.tensor(colour, device=self.seed.device).view(1, 3, 1, 1) / 255

    def _fade(self, bottom: tuple[int, ...], top: tuple[int, ...]) -> Tensor:
        return _mix(self.down, self._rgb(*bottom), self._rgb(*top))

    def _discs(self, cells: int, radius: float, kept: float) -> Tensor:
        """Soft discs, at most one in each cell of a grid."""
        column, row = torch.floor(self.right * cells), torch.floor(self.down * cells)

        def noise(salt: float) -> Tensor:
            wave = torch.sin(column * 127.1 + row * 311.7 + self.seed * 0.37 + salt * 74.7).abs()
            return torch.frac(wave * 43.5453)

        across, along = (column + 0.2 + 0.6 * noise(1)) / cells, (row + 0.2 + 0.6 * noise(2)) / cells
        distance = torch.sqrt((self.right - across) ** 2 + (self.down - along) ** 2)
        return _step(radius - distance) * (noise(3) < kept)

    def _wavy(self, height: float, waves: float) -> Tensor:
        return height * torch.sin(self.right * waves + self.share * 6)

    def grass(self) -> Tensor:
        sky = self._fade((214, 238, 252), (132, 196, 246))
        return _mix(_step(self.down - self.horizon), self._fade((84, 150, 54), (150, 204, 80)), sky)

    def beach(self) -> Tensor:
        sea = _mix(_step(self.down - 0.45), self._rgb(64, 164, 206), self._rgb(172, 222, 250))
        return _mix(_step(self.down - self.horizon - self._wavy(0.03, 12)), self._rgb(240, 218, 160), sea)

    def night(self) -> Tensor:
        return _mix(self._discs(7, 0.014, 0.7), self._rgb(250, 246, 210), self._fade((38, 42, 92), (14, 16, 44)))

    def snow(self) -> Tensor:
        sky = self._fade((206, 226, 242), (150, 186, 220))
        land = _mix(_step(self.down - self.horizon - self._wavy(0.02, 9)), self._rgb(250, 252, 255), sky)
        return _mix(self._discs(6, 0.024, 0.8), self._rgb(255, 255, 255), land)

    def sunset(self) -> Tensor:
        return self._fade((254, 190, 90), (190, 70, 130))

    def sky(self) -> Tensor:
        cloud = torch.maximum(self._discs(3, 0.16, 0.6), self._discs(2, 0.15, 0.5))
        return _mix(cloud * 0.85, self._rgb(255, 255, 255), self._fade((170, 216, 252), (104, 178, 244)))

    def water(self) -> Tensor:
        ripple = torch.sin(self.down * 40 + 2 * torch.sin(self.right * 9 + self.share * 6))
        return self._fade((18, 82, 150), (70, 178, 222)) + 0.05 * ripple

    def city(self) -> Tensor:
        houses = torch.sin(torch.floor(self.right * 7) * 91.7 + self.seed * 0.11).abs()
        windows = ((torch.frac(self.right * 21) > 0.4) & (torch.frac(self.down * 16) > 0.5)) * 0.25
        sky = self._fade((226, 234, 246), (176, 204, 240))
        roofs = 0.35 + 0.35 * torch.frac(houses * 43.5453)
        return _mix((self.down > roofs).float(), self._rgb(96, 108, 136) + windows, sky)

    def stripes(self) -> Tensor:
        slanted = (self.right + self.down) / 1.4
        upright = torch.where(self.share < 0.66, self.down, slanted)
        along = torch.where(self.share < 0.33, self.right, upright)
        return self._two_coloured(_step(torch.sin(along * self._number * 2 * math.pi) * 0.04))

    def dots(self) -> Tensor:
        across, along = (torch.frac(axis * self._number) - 0.5 for axis in (self.right, self.down))
        return self._two_coloured(_step((0.28 - torch.sqrt(across**2 + along**2)) / self._number))

    def checks(self) -> Tensor:
        across, along = (torch.sin(axis * self._number * math.pi) for axis in (self.right, self.down))
        return self._two_coloured(_step(across * along * 0.06))

    @property
    def _number(self) -> Tensor:
        """How often a pattern repeats: 4 to 7 times."""
        return 4 + torch.floor(self.share * 4)

    def _two_coloured(self, share: Tensor) -> Tensor:
        return _mix(share, self.second, self.first)
