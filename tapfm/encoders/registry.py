"""The foundation models, one frozen row each; `encoders.backbones` loads them.

Adding a model is adding a row to `ROWS`; a test builds it on the meta device and compares its
parameters, prefix tokens and width. `LEFT_OUT` names models that users ask for and that have no
row, each with the reason.

Toolkits disagree on some names. A row says what its name means here, and its `note` who uses it for
something else. `find` in `encoders.backbones` takes `<key>-cls` and `<key>-cls-mean` for the other
feature of the same weights.

Source: the publishers' model cards, for recipes, normalisation, features and licences.
Differs: kwargs are those that build the same model on timm >= 1.0.15 (DINOv3: 1.0.20). Tiles are
    read at the model's own size and microns per pixel, never resized or cropped afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from timm.layers import SwiGLUPacked
from torch import nn

from tapfm.encoders.heads import AttentionPool, Projection

Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
H_OPTIMUS: tuple[Triple, Triple] = (
    (0.707223, 0.578729, 0.703617),
    (0.211883, 0.230117, 0.177517),
)
HIBOU: tuple[Triple, Triple] = ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816))
LUNIT: tuple[Triple, Triple] = (
    (0.70322989, 0.53606487, 0.66096631),
    (0.21716536, 0.26081574, 0.20723464),
)
FEATURES = ("cls", "cls+mean", "mean", "head")


@dataclass(frozen=True)
class Backbone:
    """A model: how to build it, and how its publisher uses it."""

    key: str
    """The name users type; case, `-`, `_` and `.` do not matter."""
    source: str
    """`hf-hub:` id, or `package` for weights that ship with tapfm."""
    arch: str
    """timm architecture."""
    width: int
    """Feature width D of one token."""
    prefix_tokens: int
    """CLS and registers, in front of the patch tokens; 0 where there is no CLS token."""
    parameters: int
    """Number of parameters at `tile_px`, exact."""
    licence: str
    tile_px: int = 224
    """Side of the tile the model sees."""
    mpp: float = 0.5
    """Microns per pixel it was trained at, or the most usual of several."""
    feature: str = "cls"
    """`cls`; `cls+mean`: CLS joined with the mean patch token; `mean`: the mean token alone;
    `head`: what `head` makes of the tokens."""
    stats: tuple[Triple, Triple] = IMAGENET
    """Mean and standard deviation of its inputs."""
    precision: str = "fp32"
    """Precision in which its publisher extracts features: `fp32`, `fp16` or `bf16`."""
    gated: bool = False
    """Whether a licence must be accepted at the publisher first."""
    aliases: tuple[str, ...] = ()
    """Other names that users know."""
    file: str | None = None
    """The weights' file at the source, if its name is unusual."""
    note: str = ""
    """What other toolkits mean by the name, where they disagree."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that differ from the timm architecture's defaults."""
    head: tuple[type[nn.Module], int] | None = None
    """A class of `encoders.heads` and the width of its feature; becomes the model's `head`."""
    parts: tuple[tuple[str, str], ...] = ()
    """Prefixes of the publisher's keys, and ours; other keys belong to networks not used here."""

    @property
    def dim(self) -> int:
        """Return the width of the feature that `feature` chooses."""
        if self.feature == "head":
            return self.head[1]
        return self.width * (2 if self.feature == "cls+mean" else 1)

    @property
    def page(self) -> str:
        """Return the address of the publisher's page, with licence and gate."""
        return f"https://huggingface.co/{self.source.partition(':')[2]}"

    @property
    def terms(self) -> str:
        """Return source, licence and gate in a line."""
        gate = f", gated: accept it at {self.page}" if self.gated else ""
        return f"{self.source}, licence {self.licence}{gate}"


_SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
_SCALED = {"init_values": 1e-5}
_GIANT = {"mlp_ratio": 5.33334, **_SCALED}
_UNI2 = {"depth": 24, "num_heads": 24, "embed_dim": 1536, "reg_tokens": 8, "no_embed_class": True}
_VIRCHOW = {"mlp_ratio": 5.3375, **_SCALED, **_SWIGLU}
_DEMO = {"embed_dim": 128, "depth": 6, "num_heads": 4, "reg_tokens": 4}
_TOKEN = {"global_pool": "token"}  # timm's DINOv3 pools by mean unless told
_NC_ND = "CC-BY-NC-ND-4.0"
_OWKIN, _KAIKO, _LUNIT = "Owkin non-commercial", "Kaiko non-commercial", "Lunit non-commercial"
_KAIKO_HUB = "hf-hub:1aurent/{}.kaiko_ai_towards_large_pathology_fms"
_DINOV2 = "hf-hub:timm/vit_{}_dinov2.lvd142m"
_DINOV3 = "hf-hub:timm/vit_{}_patch16_dinov3.lvd1689m"
_WHOLE_TILE = (
    "TRIDENT shrinks tiles of 256 px at 0.5 microns per pixel to 224: for its features ask for "
    "--mpp 0.5714"
)

# key, source, arch, width, prefix tokens, parameters, licence, then what differs
ROWS = (
    Backbone(
        "demo_vit", "package", "vit_tiny_patch16_224", 128, 5, 1_295_872, "Apache-2.0",
        tile_px=112, stats=HALF, file="demo_vit.safetensors", kwargs=_DEMO,
    ),
    # pathology
    Backbone(
        "uni", "hf-hub:MahmoodLab/UNI", "vit_large_patch16_224", 1024, 1, 303_350_784, _NC_ND,
        precision="fp16", gated=True, aliases=("uni_v1",), note=_WHOLE_TILE, kwargs=_SCALED,
    ),
    Backbone(
        "uni2_h", "hf-hub:MahmoodLab/UNI2-h", "vit_giant_patch14_224", 1536, 9, 681_394_176,
        _NC_ND, precision="bf16", gated=True, aliases=("uni2", "uni_v2"), note=_WHOLE_TILE,
        kwargs=_UNI2 | _GIANT | _SWIGLU,
    ),
    Backbone(
        "virchow", "hf-hub:paige-ai/Virchow", "vit_huge_patch14_224", 1280, 1, 631_229_184,
        "Apache-2.0", feature="cls+mean", precision="fp16", gated=True, kwargs=_VIRCHOW,
    ),
    Backbone(
        "virchow2", "hf-hub:paige-ai/Virchow2", "vit_huge_patch14_224", 1280, 5, 631_239_424,
        _NC_ND, feature="cls+mean", precision="fp16", gated=True,
        note="STAMP takes CLS alone: virchow2-cls", kwargs=_VIRCHOW | {"reg_tokens": 4},
    ),
    Backbone(
        "gigapath", "hf-hub:prov-gigapath/prov-gigapath", "vit_giant_patch14_dinov2", 1536, 1,
        1_134_953_984, "Apache-2.0, research conditions", precision="fp16", gated=True,
        aliases=("prov_gigapath",), kwargs={"patch_size": 16} | _GIANT,
        note="the publisher crops 224 px of 256; eva shrinks the whole tile: ask for --mpp 0.5714",
    ),
    Backbone(
        "h_optimus_0", "hf-hub:bioptimus/H-optimus-0", "vit_giant_patch14_reg4_dinov2", 1536, 5,
        1_134_774_272, "Apache-2.0", stats=H_OPTIMUS, precision="fp16", aliases=("h_optimus",),
        note="toolkits resize to 224 px in three ways; here 224 px are read and nothing is resized",
        kwargs=_SCALED,
    ),
    Backbone(
        "h_optimus_1", "hf-hub:bioptimus/H-optimus-1", "vit_giant_patch14_reg4_dinov2", 1536, 5,
        1_134_774_272, _NC_ND, stats=H_OPTIMUS, precision="fp16", gated=True,
        note="toolkits resize to 224 px in three ways; here 224 px are read and nothing is resized",
        kwargs=_SCALED,
    ),
    Backbone(
        "h0_mini", "hf-hub:bioptimus/H0-mini", "vit_base_patch14_reg4_dinov2", 768, 5, 85_739_520,
        _NC_ND, stats=H_OPTIMUS, precision="fp16", gated=True,
        note="CLS, as TRIDENT; slide2vec joins the mean patch token: h0-mini-cls-mean",
        kwargs={"mlp_ratio": 5.33334, **_SWIGLU},
    ),
    Backbone(
        "phikon", "hf-hub:owkin/phikon", "vit_base_patch16_224", 768, 1, 85_798_656, _OWKIN,
        kwargs={"norm_layer": partial(nn.LayerNorm, eps=1e-12)},
    ),
    Backbone(
        "phikon_v2", "hf-hub:owkin/phikon-v2", "vit_large_patch16_224", 1024, 1, 303_350_784,
        _OWKIN, aliases=("phikon2",), kwargs=_SCALED,
    ),
    Backbone(
        "hibou_b", "hf-hub:histai/hibou-b", "vit_base_patch14_reg4_dinov2", 768, 5, 85_727_232,
        "Apache-2.0", stats=HIBOU, gated=True,
    ),
    Backbone(  # ViT-L/14 has 303.2 M; the published 303.7 M are a SwiGLU's (not verified otherwise)
        "hibou_l", "hf-hub:histai/hibou-L", "vit_large_patch14_reg4_dinov2", 1024, 5, 303_657_216,
        "Apache-2.0", stats=HIBOU, gated=True, kwargs={"mlp_ratio": 5.34375, **_SWIGLU},
    ),
    Backbone(
        "midnight_12k", "hf-hub:kaiko-ai/midnight", "vit_giant_patch14_dinov2", 1536, 1,
        1_134_769_664, "MIT", feature="cls+mean", stats=HALF, precision="fp16",
        aliases=("midnight",), note="TRIDENT takes CLS alone: midnight-12k-cls",
    ),
    Backbone(
        "openmidnight", "hf-hub:SophontAI/OpenMidnight", "vit_giant_patch14_reg4_dinov2", 1536, 5,
        1_134_774_272, "Apache-2.0", precision="fp16", file="teacher_checkpoint_load.pt",
    ),
    Backbone(
        "gpfm", "hf-hub:majiabo/GPFM", "vit_large_patch14_dinov2", 1024, 1, 303_227_904,
        "MIT or CC-BY-NC-ND (its sources differ)", file="GPFM.pth", kwargs=_SCALED,
        note="the publisher shrinks tiles of 512 px at 0.25 to 224: ask for --mpp 0.5714",
    ),
    Backbone(
        "mstar", "hf-hub:Wangyh/mSTAR", "vit_large_patch16_224", 1024, 1, 303_350_784,
        "not stated", gated=True, note=_WHOLE_TILE, kwargs=_SCALED,
    ),
    Backbone(
        "pathorchestra", "hf-hub:AI4Pathology/PathOrchestra", "vit_large_patch16_224", 1024, 1,
        303_350_784, "CC-BY-NC-ND", precision="fp16", gated=True, kwargs=_SCALED,
    ),
    Backbone(  # `visual_head` stands behind `visual`; the text tower is left out
        "keep", "hf-hub:Astaxanthin/KEEP", "vit_large_patch16_224", 1024, 1, 304_728_576, "MIT",
        feature="head", precision="fp16", note=_WHOLE_TILE, kwargs=_SCALED, head=(Projection, 768),
        parts=(("visual.", ""), ("visual_head.", "head.")),
    ),
    Backbone(  # not verified: timm's resampling of 14 x 14 published positions to 28 x 28
        "conch_v1_5", "hf-hub:MahmoodLab/conchv1_5", "vit_large_patch16_224", 1024, 1, 306_711_296,
        _NC_ND, tile_px=448, feature="head", precision="fp16", gated=True, aliases=("conchv1_5",),
        file="pytorch_model_vision.bin", kwargs={"init_values": 1.0}, head=(AttentionPool, 768),
        note="the publisher shrinks tiles of 512 px at 0.5 to 448: ask for --mpp 0.5714",
        parts=(
            ("trunk.", ""), ("attn_pool_contrast.", "head."), ("ln_contrast.", "head.norm."),
        ),
    ),
    Backbone(
        "kaiko_s16", _KAIKO_HUB.format("vit_small_patch16_224"), "vit_small_patch16_224", 384, 1,
        21_665_664, _KAIKO, stats=HALF, aliases=("kaiko_vits16",),
    ),
    Backbone(
        "kaiko_s8", _KAIKO_HUB.format("vit_small_patch8_224"), "vit_small_patch8_224", 384, 1,
        21_670_272, _KAIKO, stats=HALF, aliases=("kaiko_vits8",),
    ),
    Backbone(
        "kaiko_b16", _KAIKO_HUB.format("vit_base_patch16_224"), "vit_base_patch16_224", 768, 1,
        85_798_656, _KAIKO, stats=HALF, aliases=("kaiko_vitb16",),
    ),
    Backbone(
        "kaiko_b8", _KAIKO_HUB.format("vit_base_patch8_224"), "vit_base_patch8_224", 768, 1,
        85_807_872, _KAIKO, stats=HALF, aliases=("kaiko_vitb8",),
    ),
    Backbone(
        "kaiko_l14", _KAIKO_HUB.format("vit_large_patch14_reg4_dinov2"),
        "vit_large_patch14_reg4_dinov2", 1024, 5, 303_230_976, _KAIKO, stats=HALF,
        aliases=("kaiko_vitl14",),
    ),
    Backbone(
        "lunit_s16", "hf-hub:1aurent/vit_small_patch16_224.lunit_dino", "vit_small_patch16_224",
        384, 1, 21_665_664, _LUNIT, stats=LUNIT, aliases=("lunit_vits16",),
    ),
    Backbone(
        "lunit_s8", "hf-hub:1aurent/vit_small_patch8_224.lunit_dino", "vit_small_patch8_224",
        384, 1, 21_670_272, _LUNIT, stats=LUNIT, aliases=("lunit_vits8",),
    ),
    Backbone(
        "stainnet_b", "hf-hub:JWonderLand/StainNet-Base", "vit_base_patch16_224", 768, 1,
        85_798_656, "not stated", stats=HALF, aliases=("stainnet_base",),
    ),
    Backbone(
        "stainnet_s", "hf-hub:JWonderLand/StainNet", "vit_small_patch16_224", 384, 1, 21_665_664,
        "not stated", stats=HALF, aliases=("stainnet",),
    ),
    # natural images
    Backbone(
        "dinov2_vits14", _DINOV2.format("small_patch14"), "vit_small_patch14_dinov2", 384, 1,
        21_628_800, "Apache-2.0", precision="fp16", aliases=("dinov2_s14", "dinov2_s"),
    ),
    Backbone(
        "dinov2_vitb14", _DINOV2.format("base_patch14"), "vit_base_patch14_dinov2", 768, 1,
        85_724_928, "Apache-2.0", precision="fp16", aliases=("dinov2_b14", "dinov2_b"),
    ),
    Backbone(
        "dinov2_vitl14", _DINOV2.format("large_patch14"), "vit_large_patch14_dinov2", 1024, 1,
        303_227_904, "Apache-2.0", precision="fp16", aliases=("dinov2_l14", "dinov2_l"),
    ),
    Backbone(
        "dinov2_vitg14", _DINOV2.format("giant_patch14"), "vit_giant_patch14_dinov2", 1536, 1,
        1_134_769_664, "Apache-2.0", precision="fp16", aliases=("dinov2_g14", "dinov2_g"),
    ),
    Backbone(
        "dinov2_vits14_reg", _DINOV2.format("small_patch14_reg4"), "vit_small_patch14_reg4_dinov2",
        384, 5, 21_629_952, "Apache-2.0", precision="fp16", aliases=("dinov2_s14_reg",),
    ),
    Backbone(
        "dinov2_vitb14_reg", _DINOV2.format("base_patch14_reg4"), "vit_base_patch14_reg4_dinov2",
        768, 5, 85_727_232, "Apache-2.0", precision="fp16", aliases=("dinov2_b14_reg",),
    ),
    Backbone(
        "dinov2_vitl14_reg", _DINOV2.format("large_patch14_reg4"), "vit_large_patch14_reg4_dinov2",
        1024, 5, 303_230_976, "Apache-2.0", precision="fp16", aliases=("dinov2_l14_reg",),
    ),
    Backbone(
        "dinov2_vitg14_reg", _DINOV2.format("giant_patch14_reg4"), "vit_giant_patch14_reg4_dinov2",
        1536, 5, 1_134_774_272, "Apache-2.0", precision="fp16", aliases=("dinov2_g14_reg",),
    ),
    Backbone(
        "dinov3_s", _DINOV3.format("small"), "vit_small_patch16_dinov3", 384, 5, 21_586_944,
        "DINOv3", tile_px=256, precision="bf16", aliases=("dinov3_vits16",), kwargs=_TOKEN,
    ),
    Backbone(
        "dinov3_s_plus", _DINOV3.format("small_plus"), "vit_small_plus_patch16_dinov3", 384, 5,
        28_683_264, "DINOv3", tile_px=256, precision="bf16", aliases=("dinov3_vits16plus",),
        kwargs=_TOKEN,
    ),
    Backbone(
        "dinov3_b", _DINOV3.format("base"), "vit_base_patch16_dinov3", 768, 5, 85_641_216,
        "DINOv3", tile_px=256, precision="bf16", aliases=("dinov3_vitb16",), kwargs=_TOKEN,
    ),
    Backbone(
        "dinov3_l", _DINOV3.format("large"), "vit_large_patch16_dinov3", 1024, 5, 303_079_424,
        "DINOv3", tile_px=256, precision="bf16", aliases=("dinov3_vitl16",), kwargs=_TOKEN,
    ),
    Backbone(
        "dinov3_h_plus", _DINOV3.format("huge_plus"), "vit_huge_plus_patch16_dinov3", 1280, 5,
        840_509_440, "DINOv3", tile_px=256, precision="bf16", aliases=("dinov3_vith16plus",),
        kwargs=_TOKEN,
    ),
    Backbone(
        "dinov3_7b", _DINOV3.format("7b"), "vit_7b_patch16_dinov3", 4096, 5, 6_716_030_976,
        "DINOv3", tile_px=256, precision="bf16", aliases=("dinov3_vit7b16",), kwargs=_TOKEN,
    ),
    # no CLS token: learned attention only
    Backbone(
        "swin_t", "hf-hub:timm/swin_tiny_patch4_window7_224.ms_in1k",
        "swin_tiny_patch4_window7_224", 768, 0, 27_519_354, "MIT", feature="mean",
    ),
)  # fmt: skip

LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "conch": "its feature is a CoCa pooler's, which timm cannot build; conch_v1_5 has a row",
        "ctranspath": "a Swin behind a convolutional stem that timm lacks, whose batch norm would "
        "make a tile's feature depend on its chunk; swin_t is the Swin there is",
        "exaonepath": "an architecture of its own, on tiles normalised by Macenko's method",
        "genbio_pathfm": "it joins three one-channel passes and has no CLS attention over a tile",
        "musk": "a BEiT-3 of its own package, which timm cannot build",
        "plip": "a CLIP whose feature is a text-aligned projection, which no aggregator here reads",
        "rudolfv2": "an architecture that its publisher keeps in code of his own",
    }
)
"""Models without a row, and the reason."""
