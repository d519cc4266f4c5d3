"""What programs call a model's modules: every spelling of every module, in one table to look up.

`Names` starts from the modules of a live pipeline or of a stored architecture. A *style* is a function from those paths
to another library's; with a prefix in front, and sometimes dots as underscores, it is a spelling. Reading looks a
file's spelling up; nothing is replaced or guessed.

A module of Stability's or Black Forest Labs' own code may be several of diffusers' fused into one. Its `Place`s then
say which of its output rows belong to which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Any, NamedTuple, TypeVar

from .architectures import ARCHITECTURES, Table, architecture
from .canonical import Rows

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline that an adapter file may hold."""

_TEXT_MODEL = "text_model."
_CLIP_INNER = ("encoder.layers.", "embeddings.", "final_layer_norm")


def clip_path(key: str, *, nested: bool) -> str:
    """A key of CLIP's text encoder with (`nested`) or without the `text_model.` that transformers 5 took away.

    >>> clip_path("encoder.layers.0.mlp.fc1.lora_A.weight", nested=True)
    'text_model.encoder.layers.0.mlp.fc1.lora_A.weight'
    >>> clip_path("down_blocks.0.attentions.0.proj_in.lora_A.weight", nested=True)
    'down_blocks.0.attentions.0.proj_in.lora_A.weight'
    """
    inner = key.removeprefix(_TEXT_MODEL)
    if not inner.startswith(_CLIP_INNER):
        return key
    return _TEXT_MODEL + inner if nested else inner


def live_path(path: str, model: Any) -> str:
    """A canonical path as this very `model` has it: encoders of T5 and UNets have no `text_model.` in any version."""
    return clip_path(path, nested=hasattr(model, "text_model"))


Value = TypeVar("Value")


def fit_names(values: Mapping[str, Value], model: Any) -> dict[str, Value]:
    """`values` by the module paths, or keys that begin with them, of this very `model`."""
    return {live_path(key, model): value for key, value in values.items()}


class Place(NamedTuple):
    """A module, or the rows of a fused one that are this module's."""

    component: str
    path: str
    rows: Rows | None = None


Style = Callable[[Table], Iterator[tuple[str, str, Rows | None]]]
"""Table of modules -> (name, path, rows) of each in another library."""


def dotted(table: Table) -> Iterator[tuple[str, str, Rows | None]]:
    """diffusers' and transformers' own paths."""
    return ((path, path, None) for path in table)


def flattened(table: Table) -> Iterator[tuple[str, str, Rows | None]]:
    """CLIP's paths without `text_model.`, as transformers 5 has them."""
    return ((clip_path(path, nested=False), path, None) for path in table)


def processors(table: Table) -> Iterator[tuple[str, str, Rows | None]]:
    """diffusers before 0.26: layers of the attention *processor*, of which `to_out` is one layer.

    `attn1.to_q` -> `attn1.processor.to_q_lora`, `attn1.to_out.0` -> `attn1.processor.to_out_lora`.
    """
    for path in table:
        parent, _, name = path.removesuffix(".0").rpartition(".")
        if parent.endswith(("attn1", "attn2", "attn")) and name.startswith("to_"):
            yield f"{parent}.processor.{name}_lora", path, None


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LDM_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}


def ldm(table: Table) -> Iterator[tuple[str, str, Rows | None]]:
    """Stability's UNet, which numbers its blocks through: input_blocks, middle_block, output_blocks.

    A block is a resnet, then what follows it: attention as inner 1, a sampler as a block of its own on the way down and
    as the last inner one on the way up.
    """
    resnets = 1 + max((int(p.split(".")[3]) for p in table if p.startswith("down_blocks.0.resnets.")), default=1)
    attended = {tuple(p.split(".")[:2]) for p in table if ".attentions." in p and not p.startswith("mid_block")}
    for path in table:
        if path in _LDM_ENDS:
            yield _LDM_ENDS[path], path, None
            continue
        block, *rest = path.split(".")
        if block == "mid_block":
            kind, j, *inner = rest
            yield _inside(f"middle_block.{_MIDDLE[kind, int(j)]}", kind, inner), path, None
        elif block in ("down_blocks", "up_blocks"):
            i, kind, j, *inner = rest
            has_attention = (block, i) in attended
            yield _inside(_ldm_block(block, int(i), kind, int(j), resnets, has_attention), kind, inner), path, None


def _ldm_block(block: str, i: int, kind: str, j: int, resnets: int, has_attention: bool) -> str:
    if block == "down_blocks":
        number = 1 + i * (resnets + 1) + (resnets if kind == "downsamplers" else j)
        return f"input_blocks.{number}.{int(kind == 'attentions')}"
    number = i * (resnets + 1) + (resnets if kind == "upsamplers" else j)
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 1 + has_attention}[kind]
    return f"output_blocks.{number}.{inner}"


def _inside(prefix: str, kind: str, inner: list[str]) -> str:
    name = ".".join(inner)
    if kind == "downsamplers":
        name = "op"
    return f"{prefix}.{_RESNET[name] if kind == 'resnets' else name}"


_BFL_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_BFL_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "modulation.lin": ("norm.linear",),
}
_BFL_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_XLABS_DOUBLE = {
    "processor.qkv_lora1": _BFL_DOUBLE["img_attn.qkv"],
    "processor.proj_lora1": _BFL_DOUBLE["img_attn.proj"],
    "processor.qkv_lora2": _BFL_DOUBLE["txt_attn.qkv"],
    "processor.proj_lora2": _BFL_DOUBLE["txt_attn.proj"],
}
_XLABS_SINGLE = {"processor.qkv_lora": _BFL_SINGLE["linear1"][:3], "processor.proj_lora": _BFL_SINGLE["linear2"]}


def bfl(table: Table) -> Iterator[tuple[str, str, Rows | None]]:
    """Black Forest Labs' Flux: double_blocks and single_blocks, with fused projections.

    The last modulation has shift before scale there, and scale before shift in diffusers.
    """
    yield from _flux_blocks(table, _BFL_DOUBLE, _BFL_SINGLE)
    yield from ((name, path, None) for name, path in _BFL_ENDS.items() if path in table)
    if "norm_out.linear" in table:
        size = table["norm_out.linear"][0]
        yield "final_layer.adaLN_modulation.1", "norm_out.linear", ((size // 2, size), (0, size // 2))


def xlabs(table: Table) -> Iterator[tuple[str, str, Rows | None]]:
    """XLabs' Flux processors: 1 is the image's, 2 the text's."""
    yield from _flux_blocks(table, _XLABS_DOUBLE, _XLABS_SINGLE)


def _flux_blocks(
    table: Table, double: Mapping[str, tuple[str, ...]], single: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, str, Rows | None]]:
    for theirs, ours, names in (
        ("double_blocks", "transformer_blocks", double),
        ("single_blocks", "single_transformer_blocks", single),
    ):
        for i in sorted({path.split(".")[1] for path in table if path.startswith(f"{ours}.")}):
            for name, members in names.items():
                paths = [path for member in members if (path := f"{ours}.{i}.{member}") in table]
                yield from _fused(f"{theirs}.{i}.{name}", paths, table)


def _fused(name: str, paths: list[str], table: Table) -> Iterator[tuple[str, str, Rows | None]]:
    start = 0
    for path in paths:
        end = start + table[path][0]
        yield name, path, None if len(paths) == 1 else ((start, end),)
        start = end


@dataclass(frozen=True)
class Spelling:
    """A style, what stands before it, and whether its dots are underscores."""

    prefix: str
    style: Style = dotted
    flat: bool = False

    def names(self, table: Table) -> Iterator[tuple[str, str, Rows | None]]:
        """(name, path, rows) of every module of `table`."""
        for name, path, rows in self.style(table):
            yield self.prefix + (name.replace(".", "_") if self.flat else name), path, rows


def _text(*prefixes: str) -> tuple[Spelling, ...]:
    """Spellings of a text encoder: dotted prefixes end in a dot."""
    return tuple(
        Spelling(prefix, style, flat=not prefix.endswith(".")) for prefix in prefixes for style in (dotted, flattened)
    )


SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "unet": (
        Spelling("unet."),
        Spelling("unet.", processors),
        Spelling("lora_unet_", flat=True),
        Spelling("lycoris_", flat=True),
        Spelling("lora_unet_", ldm, flat=True),
        Spelling("lycoris_", ldm, flat=True),
        Spelling("diffusion_model.", ldm),
        Spelling("", ldm),
        Spelling("", processors),
        Spelling(""),
    ),
    "transformer": (
        Spelling("transformer."),
        Spelling("transformer.", processors),
        Spelling("lora_transformer_", flat=True),
        Spelling("lora_unet_", flat=True),
        Spelling("lycoris_", flat=True),
        Spelling("lora_unet_", bfl, flat=True),
        Spelling("lycoris_", bfl, flat=True),
        Spelling("diffusion_model.", bfl),
        Spelling("diffusion_model."),
        Spelling("", bfl),
        Spelling("", xlabs),
        Spelling(""),
    ),
    "clip": _text("text_encoder.", "lora_te_", "lora_te1_", "text_encoders.clip_l.transformer.",
                  "text_encoders.clip_h.transformer."),
    "clip_2": _text("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."),
    "t5": _text("text_encoder_2.", "text_encoder_3.", "lora_te2_", "lora_te3_", "text_encoders.t5xxl.transformer."),
}  # fmt: skip
"""Kind of component -> every spelling it is known by, the library's own first."""


def kind_of(component: str, table: Table) -> str:
    """Which row of `SPELLINGS` a component has."""
    if component in ("unet", "transformer"):
        return component
    if "shared" in table:
        return "t5"
    return "clip" if component == "text_encoder" else "clip_2"


class Names:
    """The modules of a pipeline, and every name by which a file may call them.

    **Arguments**: `family` for people; `tables` the modules of each component under canonical paths.
    """

    def __init__(self, family: str, tables: Mapping[str, Table]):
        self.family, self.tables = family, tables

    @classmethod
    def of_pipeline(cls, pipe: Any) -> Names:
        """The modules of a live pipeline."""
        parts = {name: getattr(pipe, name, None) for name in COMPONENTS}
        tables = {name: _live_table(model) for name, model in parts.items() if model is not None}
        return cls(type(pipe).__name__, tables)

    @cached_property
    def places(self) -> dict[str, tuple[Place, ...]]:
        """Spelled name -> the module that it means, or the several that are fused in it."""
        found: dict[str, dict[Place, None]] = {}
        owner: dict[str, tuple[str, Spelling]] = {}
        for component, table in self.tables.items():
            for spelling in SPELLINGS[kind_of(component, table)]:
                for name, path, rows in spelling.names(table):
                    # of two meanings the first counts: an own path before another library's
                    if owner.setdefault(name, (component, spelling)) == (component, spelling):
                        found.setdefault(name, {})[Place(component, path, rows)] = None
        return {name: tuple(places) for name, places in found.items()}

    def spelled(self, component: str, spelling: Spelling) -> dict[str, tuple[Place, ...]]:
        """As `places`, of one component in one spelling: what a writer goes by."""
        found: dict[str, list[Place]] = {}
        for name, path, rows in spelling.names(self.tables[component]):
            found.setdefault(name, []).append(Place(component, path, rows))
        return {name: tuple(places) for name, places in found.items()}

    def near(self, name: str) -> list[str]:
        """Names that resemble `name`, the best first."""
        start = name[: max(4, len(name) // 3)]
        return get_close_matches(name, [n for n in self.places if n.startswith(start)] or [], n=2, cutoff=0.7)

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes pooled text and sizes: what kohya's names depend on."""
        return "add_embedding.linear_1" in self.tables.get("unet", {})

    @property
    def architecture(self) -> str:
        """The stored family that these modules are built like, whatever their widths."""
        if "transformer" in self.tables:
            return "flux" if "single_transformer_blocks.0.proj_mlp" in self.tables["transformer"] else ""
        context = self.tables.get("unet", {}).get("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (0, 0))
        return "sdxl" if self.is_sdxl else "sd2" if context[1] == 1024 else "sd1"


@cache
def family_names(family: str) -> Names:
    """The names of a stored architecture."""
    return Names(family, architecture(family))


def families() -> Iterable[str]:
    """Families with a stored architecture."""
    return ARCHITECTURES


def _live_table(model: Any) -> Table:
    """Paths and weight shapes of a model, seen through adapters."""
    from ...core.targets import walk

    table = {}
    for path, place in walk(model).items():
        weight = getattr(getattr(place.module, "base_layer", place.module), "weight", None)
        if weight is not None:
            table[clip_path(path, nested=True)] = tuple(weight.shape)
    return table
