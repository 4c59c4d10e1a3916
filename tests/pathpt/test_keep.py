"""KEEP's layout: a tiny random model in its publisher's format gives what its parts give.

Without `transformers` only the messages are tested.
"""

import json
import math
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from tapfm import cli
from tapfm.pathpt.model import load_pathpt
from tapfm.pathpt.text.keep import load_keep
from tapfm.pathpt.text.prompts import ClassPrompts
from tapfm.pathpt.text.towers import TextError
from tests.cohorts import write_cohort

VISION = {"img_size": 32, "patch_size": 16, "hidden_size": 24, "num_layers": 2, "num_heads": 3,
          "init_values": 0.1, "num_classes": 0}  # fmt: skip
TEXT = {"vocab_size": 14, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 40, "max_position_embeddings": 64}  # fmt: skip
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "image", "of", "tumour", "##s",
              "normal", "tissue", "histopathology", "."]  # fmt: skip


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """Return the folder, and its parts as they were written."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("keep")
    torch.manual_seed(0)
    visual = timm.create_model(
        "vit_large_patch16_224", num_classes=0, img_size=32, patch_size=16, embed_dim=24, depth=2,
        num_heads=3, init_values=0.1,
    ).eval()  # fmt: skip
    head = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
    bert = transformers.BertModel(transformers.BertConfig(**TEXT)).eval()
    for module in (visual, head, bert):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    state = {f"visual.{k.replace('.gamma', '.weight')}": v for k, v in visual.state_dict().items()}
    state |= {f"visual_head.{k}": v for k, v in head.state_dict().items()}
    state |= {f"text.{k}": v for k, v in bert.state_dict().items()}
    state |= {"text.embeddings.position_ids": torch.arange(64)[None]}  # of older transformers
    state |= {"logit_scale": torch.tensor(math.log(1 / 0.04))}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = {"model_type": "keep", "vision_config": VISION, "text_config": TEXT,
              "projection_dim": 24}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder, visual, head, bert


@torch.no_grad()
def test_both_towers_give_what_their_parts_give(keep):
    folder, visual, head, bert = keep
    pair = load_keep(str(folder))
    assert pair.logit_scale == pytest.approx(25)
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in timm_imagenet())
    expected = F.normalize(head(visual((tiles / 255 - mean) / std)), dim=-1)
    torch.testing.assert_close(pair.encode_image(tiles), expected, rtol=1e-4, atol=1e-5)

    texts = ["An image of Tumours", "normal tissue"]
    rows = [[2, 1, 6, 7, 8, 9, 3], [2, 10, 11, 3, 0, 0, 0]]  # "an" is unknown; pieces; padding
    ids_BL = torch.tensor(rows)
    said = bert(input_ids=ids_BL, attention_mask=(ids_BL > 0).long()).pooler_output
    torch.testing.assert_close(pair.encode_text(texts), F.normalize(said, dim=-1))
    alone = pair.encode_text(texts[1:])
    torch.testing.assert_close(alone, pair.encode_text(texts)[1:], rtol=1e-4, atol=1e-6)


def test_prompts_learn_through_its_text_tower_and_dropout_stays_off(keep):
    pair = load_keep(str(keep[0])).train()
    prompts = ClassPrompts(["normal tissue", "tumour"], 24, pair.text, context=5)
    one, other = prompts(pair.text), prompts(pair.text)
    assert torch.equal(one, other)
    one[:, 0].sum().backward()
    assert (prompts.context_KnW.grad.abs().sum((1, 2)) > 0).all()
    assert not any(p.requires_grad for p in pair.parameters())


def test_a_question_is_answered_with_it(keep, tmp_path, capsys, monkeypatch):
    config = write_cohort(tmp_path)
    question = tmp_path / "question.yaml"
    tumours = [{"name": f"tumour {n}", "where": {"EGFR": n, "KRAS": 0}} for n in (0, 1)]
    asked = {"teacher": "keep", "weights": str(keep[0]), "templates": ["an image of {}"],
             "classes": [{"name": "normal tissue"}, *tumours],
             "shots": [1], "draws": 1, "context": 4, "epochs": 1}  # fmt: skip
    question.write_text(yaml.safe_dump(asked))
    given = ["--config", config, "--question", question, "--out", tmp_path / "out", "--drawn", 0]
    assert cli.main(["pathpt", *(str(each) for each in given)]) == 0
    assert "hf-hub:Astaxanthin/KEEP, licence MIT" in capsys.readouterr().err
    model = tmp_path / "out" / "1_shots" / "draw_0" / "pathpt.safetensors"
    *_, model_config, _ = load_pathpt(model)
    assert (model_config.towers["teacher"], model_config.dim) == ("keep", 24)

    # what is saved names tiles without the text tower, and so without `transformers`
    monkeypatch.setitem(sys.modules, "transformers", None)
    given = ["--model", model, "--out", tmp_path, "--workers", 0]
    slide = str(tmp_path / "slides" / "s12.tif")
    assert cli.main(["predict", slide, *(str(each) for each in given)]) == 0


def test_what_is_missing_is_named(keep, tmp_path):
    with pytest.raises(TextError, match=r"lacks config.json, model.safetensors, vocab.txt"):
        load_keep(str(tmp_path))
    for file in keep[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_head.2.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(TextError, match=r"its visual_head is not KEEP's: .*2.bias"):
        load_keep(str(tmp_path))


def test_nothing_is_downloaded_unasked():
    with pytest.raises(TextError, match="nothing is downloaded unasked"):
        load_keep(None)


def timm_imagenet():
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
