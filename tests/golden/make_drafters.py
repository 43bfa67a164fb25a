"""Writes medusa/, eagle/ and mtp/: tiny random drafters with the tensors of every pass.

    python3 make_drafters.py

Each case has config.json and model.safetensors in the checkpoint format of its method, and golden.safetensors with
inputs and outputs of two consecutive steps, computed in float64 from the weights as stored. Nothing is kept from one
step to the next: the second runs over all rows again, from true hidden states, as if no draft had been there. Needs
numpy.
"""

import json
import pathlib
import shutil

import numpy as np

from reference import Network, attend, decode, encode, rms_norm, silu, visibility, write_safetensors

FOLDER = pathlib.Path(__file__).parent
VOCAB, HIDDEN, CHAIN = 101, 32, 4
ROWS = {"step1": 9, "step2": 12}  # committed positions: the second step accepted two drafts and the anchor
LAYER = {
    "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": VOCAB,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def layer_shapes(at, c, width, input_norm=True, qk_norm=False, bias=False):
    h, inter, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    for name, shape in (("q", (q, width)), ("k", (kv, width)), ("v", (kv, width)), ("o", (h, q))):
        yield f"{at}self_attn.{name}_proj.weight", shape
        if bias and name != "o":
            yield f"{at}self_attn.{name}_proj.bias", shape[:1]
    if qk_norm:
        yield at + "self_attn.q_norm.weight", (d,)
        yield at + "self_attn.k_norm.weight", (d,)
    if input_norm:
        yield at + "input_layernorm.weight", (h,)
    yield at + "post_attention_layernorm.weight", (h,)
    for name, shape in (("gate", (inter, h)), ("up", (inter, h)), ("down", (h, inter))):
        yield f"{at}mlp.{name}_proj.weight", shape


class Extrapolating(Network):
    """One layer over rows that pair the hidden state at p with the token at p + 1. `at` is where its weights are."""

    def __init__(self, config, weights, at):
        names = {name.replace(at, "layers.0.", 1) if name.startswith(at) else name: value for name, value in weights.items()}
        super().__init__(config | {"num_hidden_layers": 1}, names)

    def run(self, x, residual):
        """The layer over all rows at once: x is what attention takes, behind its norm."""
        positions = np.arange(len(x))
        q = self.project(x, 0, "q", self.heads, positions)
        k = self.project(x, 0, "k", self.kv_heads, positions)
        v = self.project(x, 0, "v", self.kv_heads)
        out, _ = attend(q, k, v, visibility(len(x), len(x), "causal"), self.head_dim**-0.5)
        y = residual + self.linear(out.reshape(len(x), -1), "layers.0.self_attn.o_proj")
        h = self.norm(y, "layers.0.post_attention_layernorm")
        gated = silu(self.linear(h, "layers.0.mlp.gate_proj")) * self.linear(h, "layers.0.mlp.up_proj")
        return y + self.linear(gated, "layers.0.mlp.down_proj")

    def chain(self, features, tokens, embed, count):
        """features [P, taps · H] and tokens [P + 1]: hidden states, logits and ids of a chain of `count`."""
        states, tokens = list(self.fuse(features)), list(tokens)
        hidden, logits, drafts = [], [], []
        for _ in range(count):
            embedded = embed[tokens[1 : len(states) + 1]]
            out = self.rows(embedded, np.array(states))[-1]
            normed = self.final(out)
            hidden.append(out)
            logits.append(self.head(normed, embed))
            drafts.append(self.target_id(int(logits[-1].argmax())))
            states.append(self.onward(out, normed))
            tokens.append(drafts[-1])
        return np.array(hidden), np.array(logits), drafts

    def fuse(self, features):
        return features

    def final(self, out):
        return self.norm(out, "norm")

    def head(self, normed, embed):
        return normed @ embed.T

    def target_id(self, draft_id):
        return draft_id

    def onward(self, out, normed):
        return out


class Eagle1(Extrapolating):
    """No norm before the layer's attention, none before the target's head."""

    def rows(self, embedded, states):
        x = self.linear(np.concatenate([embedded, states], -1), "fc")
        return self.run(x, x)

    def final(self, out):
        return out


class Eagle3(Extrapolating):
    def fuse(self, features):
        return features @ self.weights["fc.weight"].T

    def rows(self, embedded, states):
        normed = self.norm(states, "layers.0.hidden_norm")
        x = np.concatenate([self.norm(embedded, "layers.0.input_layernorm"), normed], -1)
        return self.run(x, normed if self.config.get("norm_before_residual") else states)

    def head(self, normed, embed):
        return normed @ self.weights["lm_head.weight"].T if "lm_head.weight" in self.weights else normed @ embed.T

    def target_id(self, draft_id):
        return draft_id + int(self.weights["d2t"][draft_id]) if "d2t" in self.weights else draft_id


class DeepSeekMtp(Extrapolating):
    """The row at position 0 has no embedding; the layer's output goes on before its norm."""

    def rows(self, embedded, states):
        embedded = np.where(np.arange(len(embedded))[:, None] == 0, 0, embedded)
        both = [self.norm(embedded, "layers.0.enorm"), self.norm(states, "layers.0.hnorm")]
        x = self.linear(np.concatenate(both, -1), "layers.0.eh_proj")
        return self.run(self.norm(x, "layers.0.input_layernorm"), x)

    def final(self, out):
        return self.norm(out, "layers.0.shared_head.norm")


class QwenMtp(Extrapolating):
    """The normed output goes on."""

    def rows(self, embedded, states):
        both = [self.norm(embedded, "mtp.pre_fc_norm_embedding"), self.norm(states, "mtp.pre_fc_norm_hidden")]
        x = self.linear(np.concatenate(both, -1), "mtp.fc")
        return self.run(self.norm(x, "layers.0.input_layernorm"), x)

    def final(self, out):
        return self.norm(out, "mtp.norm")

    def onward(self, out, normed):
        return normed


def random_weights(shapes, dtype, rng):
    stored = {}
    for tensor, shape in shapes:
        x = rng.normal(size=shape) * (1.5 * shape[-1] ** -0.5 if len(shape) == 2 else 0.2)
        norm = len(shape) == 1 and not tensor.endswith("bias")
        stored[tensor] = (dtype, encode(x + norm, dtype))
    return stored


def write(folder, config, stored, golden):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
    write_safetensors(folder / "golden.safetensors", golden)


def extrapolating(method, name, kind, at, config, shapes, taps, seed, maps=None, size=1.0):
    """A case of a drafter that extrapolates hidden states; `maps` are tensors of whole numbers, `size` that of inputs."""
    rng = np.random.default_rng(seed)
    stored = random_weights(shapes, STORED[config["torch_dtype"]], rng) | (maps or {})
    model = kind(config, {tensor: decode(*value) for tensor, value in stored.items()}, at)
    last = max(ROWS.values())
    embed = encode(rng.normal(size=(VOCAB, HIDDEN)) * size, "F32")
    features = encode(rng.normal(size=(last, taps * HIDDEN)) * 2 * size, "F32")
    tokens = rng.integers(0, VOCAB, last + 1)
    golden = {"embed": ("F32", embed), "features": ("F32", features), "tokens": ("I32", encode(tokens, "I32"))}
    embed, features = embed.astype(np.float64), features.astype(np.float64)
    for step, rows in ROWS.items():
        hidden, logits, drafts = model.chain(features[:rows], tokens[: rows + 1], embed, CHAIN)
        golden |= {f"{step}.{key}": ("F32", encode(x, "F32")) for key, x in (("hidden", hidden), ("logits", logits))}
        golden[f"{step}.drafts"] = ("I32", encode(drafts, "I32"))
        ordered = np.sort(logits, -1)
        print(method, name, step, "drafts", drafts, "smallest margin", (ordered[:, -1] - ordered[:, -2]).min())
    write(FOLDER / method / name, config, stored, golden)


def medusa(name, heads, blocks, dtype, seed):
    rng = np.random.default_rng(seed)
    shapes = []
    for head in range(heads):
        for block in range(blocks):
            shapes += [(f"{head}.{block}.linear.weight", (HIDDEN, HIDDEN)), (f"{head}.{block}.linear.bias", (HIDDEN,))]
        shapes.append((f"{head}.{blocks}.weight", (VOCAB, HIDDEN)))
    stored = random_weights(shapes, STORED[dtype], rng)
    weights = {tensor: decode(*value) for tensor, value in stored.items()}
    features = encode(rng.normal(size=(max(ROWS.values()), HIDDEN)) * 2, "F32")
    tokens = rng.integers(0, VOCAB, len(features) + 1)
    golden = {"embed": ("F32", encode(rng.normal(size=(VOCAB, HIDDEN)), "F32"))}
    golden |= {"features": ("F32", features), "tokens": ("I32", encode(tokens, "I32"))}
    for step, rows in ROWS.items():
        logits = []
        for head in range(heads):
            x = features[rows - 1].astype(np.float64)
            for block in range(blocks):
                at = f"{head}.{block}.linear."
                x = x + silu(weights[at + "weight"] @ x + weights[at + "bias"])
            logits.append(weights[f"{head}.{blocks}.weight"] @ x)
        logits = np.array(logits)
        golden[f"{step}.logits"] = ("F32", encode(logits, "F32"))
        golden[f"{step}.drafts"] = ("I32", encode(logits.argmax(-1), "I32"))
        print("medusa", name, step, "drafts", logits.argmax(-1).tolist())
    config = {"medusa_num_heads": heads, "medusa_num_layers": blocks, "hidden_size": HIDDEN, "vocab_size": VOCAB}
    write(FOLDER / "medusa" / name, config, stored, golden)


def eagle():
    dims = LAYER | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    # Nothing is normed before this attention, so inputs are small: large scores would magnify rounding.
    for name, dtype, bias, seed in (("eagle1", "float32", True, 300), ("eagle1-bf16", "bfloat16", False, 301)):
        shapes = [("fc.weight", (HIDDEN, 2 * HIDDEN))] + [("fc.bias", (HIDDEN,))] * bias
        shapes += layer_shapes("layers.0.", dims, HIDDEN, input_norm=False)
        extrapolating("eagle", name, Eagle1, "layers.0.", dims | {"torch_dtype": dtype, "bias": bias}, shapes, 1, seed, size=0.25)

    dims = LAYER | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    taps = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5], "use_aux_hidden_state": True}}
    draft = 53
    kept = np.sort(np.random.default_rng(7).choice(VOCAB, draft, replace=False))
    seen = np.zeros(VOCAB, np.uint8)
    seen[kept] = 1
    # The released tensor is of booleans; nobody reads it.
    maps = {"d2t": ("I64", encode(kept - np.arange(draft), "I64")), "t2d": ("U8", seen)}
    for name, at, dtype, own, flag, seed in (
        ("eagle3", "midlayer.", "float32", True, False, 313),
        ("eagle3-f16", "layers.0.", "float16", False, True, 311),
    ):
        config = dims | {"torch_dtype": dtype, "draft_vocab_size": draft if own else VOCAB, "norm_before_residual": flag} | (taps if own else {})
        shapes = [("fc.weight", (HIDDEN, 3 * HIDDEN)), ("norm.weight", (HIDDEN,))] + [("lm_head.weight", (draft, HIDDEN))] * own
        shapes += list(layer_shapes(at, config, 2 * HIDDEN)) + [(at + "hidden_norm.weight", (HIDDEN,))]
        extrapolating("eagle", name, Eagle3, at, config, shapes, 3, seed, maps if own else None)


def mtp():
    """The checkpoint is the target's; its own layers are left out here."""
    layers = 6
    dims = LAYER | {"num_hidden_layers": layers}
    config = dims | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "float32", "num_nextn_predict_layers": 1}
    at = f"model.layers.{layers}."
    shapes = [(f"{at}{name}.weight", (HIDDEN,)) for name in ("enorm", "hnorm", "shared_head.norm")]
    shapes += [(at + "eh_proj.weight", (HIDDEN, 2 * HIDDEN)), *layer_shapes(at, config, HIDDEN, bias=True)]
    extrapolating("mtp", "deepseek", DeepSeekMtp, at, config, shapes, 1, 320)

    config = dims | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float16", "mtp_num_hidden_layers": 1}
    at = "mtp.layers.0."
    shapes = [(f"mtp.{name}.weight", (HIDDEN,)) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")]
    shapes += [("mtp.fc.weight", (HIDDEN, 2 * HIDDEN)), *layer_shapes(at, config, HIDDEN, qk_norm=True)]
    extrapolating("mtp", "qwen", QwenMtp, at, config, shapes, 1, 324)


def main():
    for method in ("medusa", "eagle", "mtp"):
        shutil.rmtree(FOLDER / method, ignore_errors=True)
    medusa("one-block", 3, 1, "float32", 330)
    medusa("two-blocks-f16", 4, 2, "float16", 331)
    eagle()
    mtp()


if __name__ == "__main__":
    main()
