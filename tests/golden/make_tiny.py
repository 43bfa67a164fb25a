"""Writes tiny/<family>/: tiny random Hugging Face checkpoints with tokenizer and golden outputs.

    python3 make_tiny.py [family ...]

config.json, model.safetensors (llama3-scaled: two shards and an index), tokenizer.json,
tokenizer_config.json, and golden.json: logits' arg max and top 5 at each of 20 positions and 16 greedy
tokens with margins, in float64 from the weights as stored. Needs numpy and tokenizers.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from reference import Decoder, DeepseekV2, decode, encode, greedy, margin, write_safetensors

FOLDER = pathlib.Path(__file__).parent / "tiny"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "i n", "a n", "Ġ the", "Ġ a", "e r", "o n", "Ġ t", "r e", "an d", "Ġ and", "in g", "Ġ w", "o u"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "The water and the 12 wandering tests."
USER = "What is in the water?"
CHAT = f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"  # the template's answer, written out
COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "rope_theta": 10000.0, "rope_scaling": None,
    "vocab_size": 288, "bos_token_id": 0, "eos_token_id": 2, "use_cache": True, "attention_dropout": 0.0, "initializer_range": 0.02,
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "tie_word_embeddings": False,
              "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "intermediate_size": 72, "vocab_size": 274},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", "tie_word_embeddings": True,
              "num_hidden_layers": 3, "num_key_value_heads": 1, "intermediate_size": 64, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float16", "tie_word_embeddings": True,
              "attention_bias": False, "head_dim": 32, "intermediate_size": 72, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False},
    "llama3-scaled": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": True,
                      "attention_bias": False, "mlp_bias": False, "head_dim": 16, "rope_theta": 500.0,
                      "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                       "original_max_position_embeddings": 64}},
}
DEEPSEEK = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24,
            "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 24, "q_lora_rank": None, "attention_bias": False, "tie_word_embeddings": True, "vocab_size": 274,
            "n_routed_experts": None, "n_shared_experts": None}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 1,
           "moe_layer_freq": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "scoring_func": "softmax", "topk_method": "greedy"}
FAMILIES |= {
    "deepseek": DEEPSEEK | {"torch_dtype": "float32"},
    # With everything that V2-Lite does not have: the queries' own latent, groups; and with its YaRN.
    "deepseek-moe": DEEPSEEK | EXPERTS | {
        "torch_dtype": "bfloat16", "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "rope_theta": 100.0,
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 4, "beta_slow": 1,
                         "mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek-moe-normed": DEEPSEEK | EXPERTS | {"torch_dtype": "float16", "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_shared_experts": None,
                                              "num_hidden_layers": 1, "first_k_dense_replace": 0},
}
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tokenizer(folder):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIALS + letters + [merge.replace(" ", "") for merge in MERGES])}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[0],
              "add_bos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 512, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return tokenizer


def deepseek_shapes(c):
    h, heads = c["hidden_size"], c["num_attention_heads"]
    q, latent = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]), c["kv_lora_rank"]
    swiglu = lambda at, inter: ((f"{at}{name}_proj.weight", (h, inter) if name == "down" else (inter, h)) for name in ("gate", "up", "down"))
    yield "model.embed_tokens.weight", (c["vocab_size"], h)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (h,)
        if c["q_lora_rank"] is None:
            yield at + "self_attn.q_proj.weight", (q, h)
        else:
            yield at + "self_attn.q_a_proj.weight", (c["q_lora_rank"], h)
            yield at + "self_attn.q_a_layernorm.weight", (c["q_lora_rank"],)
            yield at + "self_attn.q_b_proj.weight", (q, c["q_lora_rank"])
        yield at + "self_attn.kv_a_proj_with_mqa.weight", (latent + c["qk_rope_head_dim"], h)
        yield at + "self_attn.kv_a_layernorm.weight", (latent,)
        yield at + "self_attn.kv_b_proj.weight", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent)
        yield at + "self_attn.o_proj.weight", (h, heads * c["v_head_dim"])
        yield at + "post_attention_layernorm.weight", (h,)
        if not c["n_routed_experts"] or layer < c["first_k_dense_replace"]:
            yield from swiglu(at + "mlp.", c["intermediate_size"])
            continue
        yield at + "mlp.gate.weight", (c["n_routed_experts"], h)
        if c["n_shared_experts"]:
            yield from swiglu(at + "mlp.shared_experts.", c["n_shared_experts"] * c["moe_intermediate_size"])
        for expert in range(c["n_routed_experts"]):
            yield from swiglu(f"{at}mlp.experts.{expert}.", c["moe_intermediate_size"])
    yield "model.norm.weight", (h,)


def shapes(c):
    h, inter = c["hidden_size"], c["intermediate_size"]
    d = c.get("head_dim", h // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    yield "model.embed_tokens.weight", (c["vocab_size"], h)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (h,)
        for name, shape in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
            yield f"{at}self_attn.{name}_proj.weight", shape
            if c["model_type"] == "qwen2" and name != "o":
                yield f"{at}self_attn.{name}_proj.bias", shape[:1]
        if c["model_type"] == "qwen3":
            yield at + "self_attn.q_norm.weight", (d,)
            yield at + "self_attn.k_norm.weight", (d,)
        yield at + "post_attention_layernorm.weight", (h,)
        for name, shape in (("gate", (inter, h)), ("up", (inter, h)), ("down", (h, inter))):
            yield f"{at}mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (h,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], h)


def family(name, overrides, seed):
    config = COMMON | overrides
    rng = np.random.default_rng(seed)
    dtype, stored = STORED[config["torch_dtype"]], {}
    deepseek = config["model_type"] == "deepseek_v2"
    for tensor, shape in deepseek_shapes(config) if deepseek else shapes(config):
        x = rng.normal(size=shape) * (1.8 * shape[-1] ** -0.5 if len(shape) == 2 else 0.3)
        stored[tensor] = (dtype, encode(x + (1 if "norm" in tensor else 0), dtype))
    folder = FOLDER / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if name == "llama3-scaled":
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        where = {tensor: shards["layers.1." in tensor or "model.norm" in tensor] for tensor in stored}
        for shard in shards:
            write_safetensors(folder / shard, {t: x for t, x in stored.items() if where[t] == shard}, {"format": "pt"})
        index = {"metadata": {"total_size": sum(raw.nbytes for _, raw in stored.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    else:
        write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})

    tokenizer = write_tokenizer(folder)
    make = lambda: (DeepseekV2 if deepseek else Decoder)(config, {tensor.removeprefix("model."): decode(*x) for tensor, x in stored.items()})
    ids = rng.integers(0, config["vocab_size"], 20).tolist()
    logits = make()(ids)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    tokens, margins = greedy(make(), ids, 16)
    golden = {
        "ids": ids, "argmax": best[:, 0].tolist(), "margins": [round(margin(row), 5) for row in logits], "top5_ids": best.tolist(),
        "top5_logits": np.take_along_axis(logits, best, -1).round(5).tolist(),
        "greedy": tokens, "greedy_margins": [round(m, 5) for m in margins],
        "text": TEXT, "text_ids": tokenizer.encode(TEXT).ids,
        "chat_user": USER, "chat_text": CHAT, "chat_ids": tokenizer.encode(CHAT).ids,
    }
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    print(name, "greedy", tokens, "smallest margins", min(golden["margins"]), min(margins))


def main():
    wanted = sys.argv[1:] or list(FAMILIES)
    for seed, (name, overrides) in enumerate(FAMILIES.items()):
        if name in wanted:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            family(name, overrides, 200 + seed)


if __name__ == "__main__":
    main()
