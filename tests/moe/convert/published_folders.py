"""Writes folders as they are published, with random tensors, by numpy alone and independently.

Nothing of the converter is used: names and shapes are written out here from the published models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]
DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def dense_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a Phi3ForCausalLM of these config.json values."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], head_dim(config)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        shapes[f"{prefix}.self_attn.qkv_proj.weight"] = ((heads + 2 * groups) * head, width)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (width, heads * head)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * inner, width)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, inner)
    shapes["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def moe_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a PhimoeForCausalLM, as save_pretrained writes them."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], head_dim(config)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
        for name, rows, columns in (
            ("q", heads * head, width), ("k", groups * head, width), ("v", groups * head, width),
            ("o", width, heads * head),
        ):  # fmt: skip
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, columns)
            if config["attention_bias"]:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        experts = f"{prefix}.block_sparse_moe"
        shapes[f"{experts}.gate.weight"] = (config["num_local_experts"], width)
        for expert in range(config["num_local_experts"]):
            shapes[f"{experts}.experts.{expert}.w1.weight"] = (inner, width)
            shapes[f"{experts}.experts.{expert}.w2.weight"] = (width, inner)
            shapes[f"{experts}.experts.{expert}.w3.weight"] = (inner, width)
    shapes |= {f"model.norm.{kind}": (width,) for kind in ("weight", "bias")}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    if config["lm_head_bias"]:
        shapes["lm_head.bias"] = (config["vocab_size"],)
    return shapes


def small_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a Phi3SmallForCausalLM."""
    width, inner, head = config["hidden_size"], config["ff_intermediate_size"], head_dim(config)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("input_layernorm", width, 0), ("post_attention_layernorm", width, 0),
            ("self_attn.query_key_value", (heads + 2 * groups) * head, width),
            ("self_attn.dense", width, heads * head),
            ("mlp.up_proj", 2 * inner, width), ("mlp.down_proj", width, inner),
        ):  # fmt: skip
            shapes[f"{prefix}.{name}.weight"] = (rows, columns) if columns else (rows,)
            shapes[f"{prefix}.{name}.bias"] = (rows,)
    return shapes | {f"model.final_layernorm.{kind}": (width,) for kind in ("weight", "bias")}


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "phi3": dense_shapes, "phimoe": moe_shapes, "grinmoe": moe_shapes, "phi3small": small_shapes,
}  # fmt: skip


def random_tensors(shapes: Shapes, *, dtype: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """Small normal numbers; BF16 as the upper halves of float32, in uint16."""
    generator = np.random.default_rng(seed)
    made = {}
    for key, shape in shapes.items():
        values = (0.3 * generator.standard_normal(shape)).astype(np.float32)
        if dtype == "BF16":
            made[key] = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            made[key] = values.astype(DTYPES[dtype])
    return made


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file; uint16 arrays are BF16."""
    names = {np.dtype(np.uint16): "BF16", np.dtype(np.float16): "F16",
             np.dtype(np.float32): "F32", np.dtype(np.float64): "F64",
             np.dtype(np.int64): "I64"}  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }  # fmt: skip
    write_raw(path, json.dumps(header).encode(), b"".join(t.tobytes() for t in tensors.values()))


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    num_shards: int = 1,
) -> Path:
    """config.json and the tensors, in one file or dealt round to shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if num_shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[shard::num_shards]}
        write_file(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(type, shape, bytes) of every tensor of every *.safetensors file, read by hand."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for key, entry in json.loads(raw[8:start]).items():
            if key != "__metadata__":
                assert key not in found
                first, end = entry["data_offsets"]
                found[key] = (
                    entry["dtype"],
                    tuple(entry["shape"]),
                    raw[start + first : start + end],
                )
    return found


ROPE = {"original_max_position_embeddings": 32, "max_position_embeddings": 64}
LONG = {
    "type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}  # fmt: skip
_DENSE = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "max_position_embeddings": 64, "original_max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "attention_bias": False, "sliding_window": None,
    "rope_scaling": None, "torch_dtype": "float32",
}  # fmt: skip
_MOE = {
    **{key: value for key, value in _DENSE.items() if key != "original_max_position_embeddings"},
    "model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"], "num_key_value_heads": 2,
    "attention_bias": True, "lm_head_bias": True, "num_local_experts": 4, "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "router_aux_loss_coef": 0.0,
}  # fmt: skip
_SMALL = {
    "model_type": "phi3small", "architectures": ["Phi3SmallForCausalLM"], "vocab_size": 96,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "ff_intermediate_size": 24, "hidden_act": "gegelu", "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True, "ff_dim_multiplier": None, "layer_norm_epsilon": 1e-5,
    "rope_embedding_base": 1e6, "rope_position_scale": 1.0, "embedding_dropout_prob": 0.1,
    "ffn_dropout_prob": 0.1, "attention_dropout_prob": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "mup_use_scaling": True, "mup_attn_multiplier": 1.0, "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0, "blocksparse_block_size": 8,
    "blocksparse_triton_kernel_block_size": 8, "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 2, "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2, "max_position_embeddings": 64, "rope_scaling": None,
    "dummy_token_indices": [90, 91], "torch_dtype": "float32",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "phi3 mha": {**_DENSE, "num_key_value_heads": 4},
    "phi3 gqa window": {**_DENSE, "num_key_value_heads": 2, "sliding_window": 7},
    "phi3 tied": {**_DENSE, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "phi3 longrope": {**_DENSE, **ROPE, "num_key_value_heads": 2, "rope_scaling": LONG},
    "phimoe": {
        **_MOE, "max_position_embeddings": 64, "rope_scaling": {
            **LONG, "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 32,
        },
    },
    "grin": {**_MOE, "model_type": "grinmoe", "architectures": ["GRIN-MoE"], "sliding_window": 7},
    "phi3small": _SMALL,
}  # fmt: skip
