"""KEEP, a vision-language model of pathology (MIT licence), read from its publisher's files.

    config.json          sizes of both towers
    model.safetensors    visual.* (timm's ViT-L/16), visual_head.* (Linear, GELU, Linear), text.*
                         (BERT), logit_scale (a logarithm)
    vocab.txt            of the text tower; tokenizer_config.json beside it

The text tower is `transformers`' BERT, which must be installed for it (`pip install transformers`);
its pooled output is the text's vector. Nothing is downloaded unasked: give the folder, or `hub`.

Source: huggingface.co/Astaxanthin/KEEP, its config and file layout (licence MIT); Zhou et al. 2024
    (arXiv 2412.13126).
Differs: tiles are read at 224 px and 0.5 microns per pixel, never resized.

Shapes: B texts, L tokens, W width, d joint width.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tapfm.encoders.backbones import Encoder, build, load_state
from tapfm.encoders.checkpoints import read_weights
from tapfm.encoders.registry import Backbone
from tapfm.pathpt.text.towers import TextError, VisionLanguage

REPOSITORY = "Astaxanthin/KEEP"
FILES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json")
LONGEST = 256  # tokens at which its publisher truncates texts
_SIZES = (  # timm's argument, KEEP's key, the published value
    ("patch_size", "patch_size", 16),
    ("embed_dim", "hidden_size", 1024),
    ("depth", "num_layers", 24),
    ("num_heads", "num_heads", 16),
    ("init_values", "init_values", 1e-5),
)


class BertText(nn.Module):
    """KEEP's text tower behind the interface of `tapfm.pathpt.text.towers`."""

    longest = LONGEST

    def __init__(self, bert: nn.Module, tokenizer: Any):
        super().__init__()
        self.bert, self.tokenizer, self.width = bert, tokenizer, bert.config.hidden_size
        self.pad, self.first, self.last = (
            tokenizer.pad_token_id,
            (tokenizer.cls_token_id,),
            (tokenizer.sep_token_id,),
        )

    def ids(self, text: str) -> list[int]:
        """Return word pieces; a word without known pieces becomes [UNK]."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def table(self, ids: Tensor) -> Tensor:
        """Return word vectors, before positions are added."""
        return self.bert.embeddings.word_embeddings(ids)

    def forward(self, x_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the pooled output (B, d)."""
        return self.bert(inputs_embeds=x_BLW, attention_mask=mask_BL.long()).pooler_output


def load_keep(weights: str | None, text: bool = True) -> VisionLanguage:
    """Return KEEP from a folder with its files, or from the publisher.

    Args:
        weights: the folder, or `hub`.
        text: whether to load its text tower, which needs `transformers`.

    Raises:
        TextError: no folder, files missing, or `transformers` is not installed.
        BackboneError: the weights are not KEEP's.
    """
    folder = _folder(weights)
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    row = Backbone(
        "keep", f"hf-hub:{REPOSITORY}", "vit_large_patch16_224", vision["hidden_size"], 1, 0, "MIT",
        tile_px=vision["img_size"],
        kwargs={ours: vision.get(theirs, value) for ours, theirs, value in _SIZES},
    )  # fmt: skip
    print(f"{row.key}: {row.terms}", file=sys.stderr)
    state = read_weights(row, str(folder))
    vit = build(row)
    load_state(vit, row, {_timms(key): v for key, v in _below(state, "visual.").items()})
    width = config["projection_dim"]
    head = nn.Sequential(nn.Linear(row.width, width), nn.GELU(), nn.Linear(width, width))
    _fill(head, _below(state, "visual_head."), folder, "visual_head")
    tower = _text(folder, config["text_config"], state) if text else None
    scale = math.exp(float(state["logit_scale"]))
    return VisionLanguage("keep", Encoder(vit, row), head, tower, scale)


def _text(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BertText:
    try:
        from transformers import BertConfig, BertModel, BertTokenizerFast
    except ImportError as error:
        raise TextError(
            "keep: its text tower is a BERT of `transformers`, which is not installed. "
            "Run: pip install transformers"
        ) from error
    bert = BertModel(BertConfig(**config), add_pooling_layer=True)
    _fill(bert, _below(state, "text."), folder, "text")
    settings = folder / "tokenizer_config.json"
    lower = json.loads(settings.read_text()).get("do_lower_case", True)
    # the constructor takes the file in transformers 4 and its content in 5: this reads both
    return BertText(bert, BertTokenizerFast.from_pretrained(folder, do_lower_case=lower))


def _folder(weights: str | None) -> Path:
    if weights == "hub":
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(REPOSITORY, allow_patterns=list(FILES)))
        except Exception as error:  # many undocumented kinds
            why = str(error).strip().partition("\n")[0]
            raise TextError(
                f"keep: {REPOSITORY} cannot be fetched ({type(error).__name__}: {why}). Give a "
                "folder with its files instead."
            ) from error
    if weights is None:
        raise TextError(
            "keep: no weights given, and nothing is downloaded unasked. Give the folder that holds "
            f"{', '.join(FILES)} of huggingface.co/{REPOSITORY}, or `hub` to fetch them."
        )
    missing = [name for name in FILES if not (Path(weights) / name).is_file()]
    if missing:
        raise TextError(
            f"keep: {weights} lacks {', '.join(missing)}. Put the files of "
            f"huggingface.co/{REPOSITORY} there."
        )
    return Path(weights)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _timms(key: str) -> str:
    """Return timm's name of a key: KEEP names layer scales weight, timm gamma."""
    return key.replace("ls1.weight", "ls1.gamma").replace("ls2.weight", "ls2.gamma")


def _fill(module: nn.Module, state: dict[str, Tensor], folder: Path, part: str) -> None:
    """Load strictly, except for position ids, which only older files have."""
    state = {k: v.to(torch.float32) for k, v in state.items() if not k.endswith("position_ids")}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise TextError(
            f"keep: {folder}: its {part} is not KEEP's: "
            f"{' '.join(str(error).split())[:300]}. Fetch the files of "
            f"huggingface.co/{REPOSITORY} again."
        ) from error
