"""Small random twins of the files in which slide encoders are published, tensor by tensor."""

import json

import torch
from torch import nn

MODULES = {
    "titan": """
class Twin(PreTrainedModel):
    config_class = TwinConfig
    def __init__(self, config):
        super().__init__(config)
        self.last = torch.nn.Linear(config.features + 2, config.numbers)
        self.post_init()
    def encode_slide_from_patch_features(self, patch_features, patch_coords, patch_size_lv0):
        assert patch_coords.dtype == torch.int64
        places = (patch_coords // patch_size_lv0).to(patch_features)
        return self.last(torch.cat([patch_features, places], dim=-1)).tanh().mean(1)
""",
    "prism": """
class Twin(PreTrainedModel):
    config_class = TwinConfig
    def __init__(self, config):
        super().__init__(config)
        self.last = torch.nn.Linear(config.features, config.numbers)
        self.post_init()
    def slide_representations(self, tile_embeddings, tile_mask=None):
        latents = self.last(tile_embeddings).tanh()
        return {"image_embedding": latents.mean(1), "image_latents": latents}
""",
    "care": """
class Twin(PreTrainedModel):
    config_class = TwinConfig
    def __init__(self, config):
        super().__init__(config)
        self.last = torch.nn.Linear(config.features + 2, config.numbers)
        self.post_init()
    def forward(self, features, counts, coords):
        assert counts.tolist() == [features.shape[1]]
        joined = torch.cat([features, coords.to(features)], dim=-1)
        return SimpleNamespace(wsi_embedding=self.last(joined).tanh().mean(1), aux_loss=0)
""",
}
HEAD = """
from types import SimpleNamespace
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TwinConfig(PretrainedConfig):
    model_type = "KEY_twin"
    def __init__(self, features=1, numbers=1, **more):
        super().__init__(**more)
        self.features, self.numbers = features, numbers
"""


def write_shipped(folder, row, *, failing=False):
    """A folder with config, code and weights, as transformers saves a model of one's own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {
        "architectures": ["Twin"], "model_type": f"{row.key}_twin", "features": row.tile_dim,
        "numbers": row.dim, "torch_dtype": "float32",
        "auto_map": {"AutoConfig": "modeling_twin.TwinConfig", "AutoModel": "modeling_twin.Twin"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    code = HEAD.replace("KEY", row.key) + MODULES[row.key]
    (folder / "modeling_twin.py").write_text("import no_such_package\n" * failing + code)
    torch.manual_seed(1)
    last = nn.Linear(row.tile_dim + 2 * row.coords, row.dim)
    save_file(
        {f"last.{k}": v.detach().clone() for k, v in last.state_dict().items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    return last


def write_madeleine(folder, dim=512, width=512, heads=4, units=512, parallel=True):
    """Madeleine's folder: settings, and a state dict as a run on several cards saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    state = {}

    def put(name, *shape):
        state[f"{name}.weight"] = torch.randn(*shape) / shape[-1] ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0]) / 4

    for n, out, into in ((0, width, dim), (4, width, width), (8, width * heads, width)):
        put(f"wsi_embedders.pre_attn.{n}", out, into)
        put(f"wsi_embedders.pre_attn.{n + 1}", out)
    for h in range(heads):
        for name in ("attention_a.0", "attention_b.0"):
            put(f"wsi_embedders.attn.{h}.{name}", units, width)
        put(f"wsi_embedders.attn.{h}.attention_c", 1, units)
    put("projector", width, width * heads)
    put("token_projector", 8, width * heads)
    settings = {"wsi_encoder": "abmil", "activation": "softmax", "n_heads": heads,
                "patch_embedding_dim": dim, "wsi_encoder_hidden_dim": width}  # fmt: skip
    (folder / "model_config.json").write_text(json.dumps(settings))
    named = {f"module.{k}" if parallel else k: v for k, v in state.items()}
    torch.save(named, folder / "model.pt")
    return state


def write_moozy(path, dim=384, width=24, heads=12, layers=2, registers=4, qk_norm=False):
    """moozy.pt: both state dicts and their settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)

    def transformer(layers, registers, token, scaled, qk_norm):
        state = {token: torch.randn(1, 1, width)}
        if registers:
            state["register_tokens"] = torch.randn(1, registers, width)
        shapes = {"norm1": (width,), "norm2": (width,), "q_proj": (width, width),
                  "k_proj": (width, width), "v_proj": (width, width), "out_proj": (width, width),
                  "fc1": (4 * width, width), "fc2": (width, 4 * width)}  # fmt: skip
        if qk_norm:
            shapes |= {"q_norm": (width // heads,), "k_norm": (width // heads,)}
        for n in range(layers):
            for name, shape in shapes.items():
                state[f"blocks.{n}.{name}.weight"] = torch.randn(*shape) / shape[-1] ** 0.5
                state[f"blocks.{n}.{name}.bias"] = torch.randn(shape[0]) / 4
            if scaled:
                state[f"blocks.{n}.ls_attn.gamma"] = torch.rand(width)
                state[f"blocks.{n}.ls_mlp.gamma"] = torch.rand(width)
        state["norm.weight"], state["norm.bias"] = torch.rand(width), torch.randn(width)
        return state

    slide = transformer(layers, registers, "cls_token", False, qk_norm)
    slide["input_proj.0.weight"] = torch.randn(width, dim) / dim**0.5
    slide["input_proj.0.bias"] = torch.randn(width) / 4
    slide["mask_token"] = torch.zeros(1, 1, width)
    slide["pos_bias.slopes"] = -torch.rand(heads, 1)
    for n in range(layers):  # the same module in every block, saved again with each
        slide[f"blocks.{n}.pos_bias.slopes"] = slide["pos_bias.slopes"]
    sizes = {"d_model": width, "dim_feedforward": 4 * width}
    payload = {
        "teacher_slide_encoder": slide,
        "case_transformer": transformer(1, 0, "case_token", True, False),
        "slide_encoder_config": {**sizes, "feat_dim": dim, "n_layers": layers, "n_heads": heads,
            "num_registers": registers, "learnable_alibi": False, "qk_norm": qk_norm,
            "layerscale_enabled": False, "layerscale_init": 0.0, "dropout": 0.1,
            "attn_dropout": 0.0, "layer_drop": 0.1},
        "case_transformer_config": {**sizes, "num_layers": 1, "num_heads": heads,
            "dropout": 0.1, "layerscale_init": 1e-5, "layer_drop": 0.0, "qk_norm": False,
            "num_registers": 0},
    }  # fmt: skip
    torch.save(payload, path)
    return payload
