"""Writes dflash/<case>/: tiny random DFlash drafters with the tensors of every stage.

    python3 make_dflash.py

Each case has config.json and model.safetensors in the released checkpoint format, and
golden.safetensors with inputs and stage outputs of two consecutive steps, computed in float64 from
the weights as stored. Needs numpy.
"""

import json
import pathlib
import shutil

import numpy as np

from reference import DFlash, decode, encode, write_safetensors

FOLDER = pathlib.Path(__file__).parent / "dflash"
PROMPT, ACCEPTED_ROWS = 11, 3
SEEDS = (100, 100, 118)  # chosen so that a block's drafts differ from each other
COMMON = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_scaling": None, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "use_cache": True, "head_dim": 32, "attention_bias": False, "sliding_window": None, "use_sliding_window": False,
}
CASES = {
    # three layers, all full and non-causal
    "full": {
        "dtype": "float32", "block_size": 8, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "num_target_layers": 6, "rope_theta": 10000.0, "vocab_size": 101,
        "layer_types": ["full_attention"] * 3, "dflash_config": {"mask_token_id": 7, "target_layer_ids": [1, 2, 3]},
    },
    # one sliding layer (causal, the current token is one of its 6 places) and one full layer, bf16 weights
    "sliding-bf16": {
        "dtype": "bfloat16", "block_size": 8, "hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_target_layers": 8, "rope_theta": 1000000.0, "vocab_size": 97,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "use_sliding_window": True,
        "dflash_config": {"mask_token_id": 96, "target_layer_ids": [1, 5]},
    },
    # all layers causal by `dflash_config.causal`, biases in the attention, 16-bit weights
    "causal-bias-f16": {
        "dtype": "float16", "block_size": 10, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_target_layers": 4, "rope_theta": 10000.0, "vocab_size": 101,
        "attention_bias": True, "dflash_config": {"mask_token_id": 3, "target_layer_ids": [2], "causal": True},
    },
}


def shapes(c):
    h, inter = c["hidden_size"], c["intermediate_size"]
    q, kv = (c[key] * c["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    yield "fc.weight", (h, len(c["dflash_config"]["target_layer_ids"]) * h)
    yield "hidden_norm.weight", (h,)
    for layer in range(c["num_hidden_layers"]):
        at = f"layers.{layer}."
        for name, shape in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
            yield f"{at}self_attn.{name}_proj.weight", shape
            if c["attention_bias"]:
                yield f"{at}self_attn.{name}_proj.bias", shape[:1]
        for name in ("q_norm", "k_norm"):
            yield f"{at}self_attn.{name}.weight", (c["head_dim"],)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (h,)
        for name, shape in (("gate", (inter, h)), ("up", (inter, h)), ("down", (h, inter))):
            yield f"{at}mlp.{name}_proj.weight", shape
    yield "norm.weight", (h,)


def case(name, overrides, seed):
    config = {**COMMON, **overrides}
    rng = np.random.default_rng(seed)
    dtype = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[config["dtype"]]
    stored = {}
    for tensor, shape in shapes(config):
        x = rng.normal(size=shape) * (1.5 * shape[-1] ** -0.5 if len(shape) == 2 else 0.2)
        stored[tensor] = (dtype, encode(x + (1 if "norm" in tensor else 0), dtype))
    folder = FOLDER / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})

    model = DFlash(config, {tensor: decode(*value) for tensor, value in stored.items()})
    width = stored["fc.weight"][1].shape[1]
    embed = encode(rng.normal(size=(config["vocab_size"], config["hidden_size"])), "F32")
    golden = {"embed": ("F32", embed)}
    embed = embed.astype(np.float64)
    for step, rows in ((1, PROMPT), (2, ACCEPTED_ROWS)):
        features = encode(rng.normal(size=(rows, width)) * 3, "F32")
        anchor = int(rng.integers(config["vocab_size"]))
        first = model.length
        context, injected = model.inject(features.astype(np.float64))
        ids, outputs, final = model.draft(anchor, embed)
        logits = final @ embed.T
        result = {"features": features, "context": context, "hidden": final, "logits": logits}
        for layer, (k, v) in enumerate(injected):
            result |= {f"k_ctx.{layer}": k, f"v_ctx.{layer}": v, f"layer.{layer}": outputs[layer]}
        golden |= {f"step{step}.{key}": ("F32", encode(x, "F32")) for key, x in result.items()}
        numbers = {"anchor": [anchor], "first": [first], "block_ids": ids, "drafts": logits[1:].argmax(-1)}
        golden |= {f"step{step}.{key}": ("I32", encode(x, "I32")) for key, x in numbers.items()}
        ordered = np.sort(logits[1:], -1)
        print(name, step, "drafts", numbers["drafts"].tolist(), "smallest margin", (ordered[:, -1] - ordered[:, -2]).min())
    write_safetensors(folder / "golden.safetensors", golden)


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    for seed, (name, overrides) in zip(SEEDS, CASES.items()):
        case(name, overrides, seed)


if __name__ == "__main__":
    main()
