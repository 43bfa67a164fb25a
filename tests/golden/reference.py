"""Independent references in numpy, shared by the make_*.py scripts of this folder.

What is here: reading and writing safetensors, the number formats numpy lacks, attention, a decoder
of the Llama / Qwen2 / Qwen3 family, the DFlash drafter, and SmolLM2 from its GGUF file.
Everything is written for plainness and not for speed; models run in float32 or float64 by choice.

Needs numpy; SmolLM2 also needs the packages `gguf` and `tokenizers`.
"""

import json
import struct

import numpy as np

# ---- number formats ---------------------------------------------------------------------------

RAW = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "I8": "i1", "U8": "u1"}


def bf16_bits(x):
    """Rounds to bfloat16, half to even, and gives the bits as u16. NaN stays NaN."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4").astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype("<u2")


def float8_table(kind):
    """All 256 values. f8e4m3 is the OCP form: no infinities, 0x7f and 0xff are NaN."""
    exponent_bits, mantissa_bits = {"f8e4m3": (4, 3), "f8e5m2": (5, 2)}[kind]
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = (code & 0x7F) >> mantissa_bits
        mantissa = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        value = 2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa
        if kind == "f8e4m3" and code & 0x7F == 0x7F:
            value = np.nan
        if kind == "f8e5m2" and exponent == 31:
            value = np.nan if mantissa else np.inf
        values.append(sign * value)
    return np.array(values)


def float8_bits(x, kind):
    """The nearest finite code; NaN becomes the format's NaN."""
    table = float8_table(kind)
    finite = np.where(np.isfinite(table), table, 1e30)
    codes = np.abs(np.nan_to_num(x)[..., None] - finite).argmin(-1)
    return np.where(np.isnan(x), 0x7F, codes).astype("u1")


def encode(x, dtype):
    """Floats to the stored form of a safetensors dtype."""
    return bf16_bits(x) if dtype == "BF16" else np.asarray(x).astype(RAW[dtype])


def decode(dtype, raw, to=np.float64):
    """The stored form back to floats."""
    if dtype == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    return raw.astype(to)


# ---- safetensors ------------------------------------------------------------------------------


def write_safetensors(path, tensors, metadata=None):
    """tensors: name -> (dtype, stored array). Larger items come first, so all stay aligned."""
    header, offset, parts = {}, 0, []
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, raw) in sorted(tensors.items(), key=lambda item: (-np.dtype(RAW[item[1][0]]).itemsize, item[0])):
        data = np.ascontiguousarray(raw, RAW[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(raw.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(parts))


def read_safetensors(path):
    """name -> (dtype, stored array), and the metadata."""
    with open(path, "rb") as file:
        blob = file.read()
    size = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + size + at for at in entry["data_offsets"])
        tensors[name] = (entry["dtype"], np.frombuffer(blob[start:end], RAW[entry["dtype"]]).reshape(entry["shape"]))
    return tensors, metadata


def load_weights(path, to=np.float64):
    return {name: decode(dtype, raw, to) for name, (dtype, raw) in read_safetensors(path)[0].items()}


# ---- attention --------------------------------------------------------------------------------


def visibility(n, length, mask, window=None, causal=None, tree=None, spans=()):
    """[n, length] booleans: which key a query row sees. `window` is (left, right), None unbounded.

    `causal` (True, False or None) overrides the mask for the sequence; `tree` is [n, n] booleans;
    `spans` are (first, last) key positions that see each other both ways over a causal mask.
    """
    p = (length - n + np.arange(n))[:, None]
    key = np.arange(length)[None, :]
    if causal is not None:
        mask = "causal" if causal else "bidirectional"
    if mask == "tree":
        seen = np.zeros((n, length), bool)
        seen[:, : length - n] = True
        seen[:, length - n :] = tree
    elif mask == "causal":
        seen = key <= p
        for first, last in spans:
            seen = seen | ((p >= first) & (p <= last) & (key >= first) & (key <= last))
    else:
        seen = np.ones((n, length), bool)
    left, right = window or (None, None)
    if left is not None:
        seen = seen & (key >= p - left)
    if right is not None:
        seen = seen & (key <= p + right)
    return seen


def attend(q, k, v, seen, scale, softcap=None, slopes=None, sinks=None):
    """q [n, heads, d], k [L, kv_heads, d], v [L, kv_heads, e] -> out [n, heads, e], lse [n, heads].

    The order is scale, softcap, ALiBi, mask. A sink is one more logit in the denominator.
    """
    n, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    k = np.repeat(k, heads // kv_heads, axis=1).transpose(1, 2, 0)
    v = np.repeat(v, heads // kv_heads, axis=1).transpose(1, 0, 2)
    logits = (q.transpose(1, 0, 2) @ k) * q.dtype.type(scale)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    if slopes is not None:
        distance = np.arange(length)[None, :] - (length - n + np.arange(n))[:, None]
        logits = logits + slopes[:, None, None] * distance
    logits = np.where(seen, logits, -np.inf)
    top = logits.max(-1, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None])
    safe = np.where(np.isfinite(top), top, 0)
    weights = np.exp(logits - safe[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + np.exp(sinks[:, None] - safe)
    with np.errstate(divide="ignore"):
        lse = safe + np.log(total)
    out = (weights @ v) / np.where(total == 0, 1, total)[..., None]
    return out.transpose(1, 0, 2), lse.T


# ---- network parts ----------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(eps)) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rope_frequencies(dim, theta, scaling=None):
    inverse = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type"))
    if kind in (None, "default"):
        return inverse
    if kind == "linear":
        return inverse / scaling["factor"]
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind} is not known here")
    length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * inverse / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * inverse / scaling["factor"] + smooth * inverse


def rope(x, positions, inverse, interleaved=False):
    """x [n, heads, d]. Half-split pairs (i, i + d/2), or neighbours (2i, 2i + 1) if interleaved."""
    angle = np.asarray(positions, np.float64)[:, None, None] * inverse
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    a, b = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        return np.stack([a, b], -1).reshape(x.shape)
    return np.concatenate([a, b], -1)


class Cache:
    """Keys and values of one layer; `length` rows are valid."""

    def __init__(self):
        self.k = self.v = None
        self.length = 0

    def put(self, k, v):
        end = self.length + len(k)
        if self.k is None or end > len(self.k):
            grow = lambda old, new: np.concatenate([old[: self.length] if old is not None else new[:0], np.zeros((max(64, end), *new.shape[1:]), new.dtype)])
            self.k, self.v = grow(self.k, k), grow(self.v, v)
        self.k[self.length : end], self.v[self.length : end] = k, v
        self.length = end
        return self.k[:end], self.v[:end]


class Network:
    """What target and drafter share. `weights` has the names of the checkpoint, without a prefix."""

    def __init__(self, config, weights, interleaved=False):
        self.config, self.weights, self.interleaved = config, weights, interleaved
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        self.layers = config["num_hidden_layers"]
        self.inverse = rope_frequencies(self.head_dim, config.get("rope_theta", 10000.0), config.get("rope_scaling"))
        self.caches = [Cache() for _ in range(self.layers)]

    def linear(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def norm(self, x, name):
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def project(self, x, layer, which, heads, positions=None):
        """q, k or v rows [n, heads, d]: normed per head where the model has it, and rotated (not v)."""
        name = f"layers.{layer}.self_attn.{which}"
        y = self.linear(x, name + "_proj").reshape(len(x), heads, self.head_dim)
        if which != "v":
            if name + "_norm.weight" in self.weights:
                y = self.norm(y, name + "_norm")
            y = rope(y, positions, self.inverse, self.interleaved)
        return y

    def block(self, x, layer, positions, mask, window=None):
        """One decoder layer; its keys and values are added to the cache before it attends."""
        h = self.norm(x, f"layers.{layer}.input_layernorm")
        q = self.project(h, layer, "q", self.heads, positions)
        k, v = self.caches[layer].put(
            self.project(h, layer, "k", self.kv_heads, positions), self.project(h, layer, "v", self.kv_heads)
        )
        out, _ = attend(q, k, v, visibility(len(x), len(k), mask, window), self.head_dim**-0.5)
        x = x + self.linear(out.reshape(len(x), -1), f"layers.{layer}.self_attn.o_proj")
        h = self.norm(x, f"layers.{layer}.post_attention_layernorm")
        mlp = f"layers.{layer}.mlp."
        return x + self.linear(silu(self.linear(h, mlp + "gate_proj")) * self.linear(h, mlp + "up_proj"), mlp + "down_proj")

    @property
    def length(self):
        return self.caches[0].length

    def crop(self, length):
        for cache in self.caches:
            cache.length = length


class Decoder(Network):
    """A causal target. Call it with the next token ids; `taps` are 0-based layers, output side."""

    def __call__(self, ids, taps=()):
        x = self.weights["embed_tokens.weight"][np.asarray(ids)]
        positions = self.length + np.arange(len(ids))
        tapped = {}
        for layer in range(self.layers):
            x = self.block(x, layer, positions, "causal")
            tapped[layer] = x
        logits = self.head(self.norm(x, "norm"))
        return (logits, np.concatenate([tapped[tap] for tap in taps], -1)) if taps else logits

    def head(self, x):
        return x @ self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"]).T


class DeepseekV2:
    """A causal target with latent attention and experts, as published (arXiv 2405.04434 and the model's own code).

    Nothing is absorbed: keys and values of every head are made of the latents, and what is cached are those. Experts
    are a loop over the tokens.
    """

    def __init__(self, config, weights):
        self.config, self.weights = config, weights
        self.heads, self.eps = config["num_attention_heads"], config["rms_norm_eps"]
        self.nope, self.rope_dim, self.value_dim = (config[f] for f in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        self.inverse, self.scale = self.rotation()
        self.caches = [Cache() for _ in range(config["num_hidden_layers"])]

    def rotation(self):
        """Angles by position, and the factor of the logits; YaRN changes both."""
        dim, base, s = self.rope_dim, self.config["rope_theta"], self.config.get("rope_scaling")
        plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        scale = (self.nope + self.rope_dim) ** -0.5
        if not s:
            return plain, scale
        assert s["type"] == "yarn" and s["mscale"] == s["mscale_all_dim"]
        pair = lambda turns: dim * np.log(s["original_max_position_embeddings"] / (turns * 2 * np.pi)) / (2 * np.log(base))
        low, high = max(np.floor(pair(s["beta_fast"])), 0), min(np.ceil(pair(s["beta_slow"])), dim - 1)
        keep = 1 - np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        mscale = 0.1 * s["mscale_all_dim"] * np.log(s["factor"]) + 1
        return plain / s["factor"] * (1 - keep) + plain * keep, scale * mscale * mscale

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T

    def norm(self, x, name):
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def attention(self, x, layer, positions):
        at, n = f"layers.{layer}.self_attn.", len(x)
        h = self.norm(x, f"layers.{layer}.input_layernorm")
        if self.config["q_lora_rank"] is None:
            q = self.linear(h, at + "q_proj")
        else:
            q = self.linear(self.norm(self.linear(h, at + "q_a_proj"), at + "q_a_layernorm"), at + "q_b_proj")
        q = q.reshape(n, self.heads, self.nope + self.rope_dim)
        q_rope = rope(q[..., self.nope :], positions, self.inverse, interleaved=True)
        down = self.linear(h, at + "kv_a_proj_with_mqa")
        latent = self.norm(down[:, : self.config["kv_lora_rank"]], at + "kv_a_layernorm")
        k_rope = rope(down[:, None, self.config["kv_lora_rank"] :], positions, self.inverse, interleaved=True)
        up = self.linear(latent, at + "kv_b_proj").reshape(n, self.heads, self.nope + self.value_dim)
        k = np.concatenate([up[..., : self.nope], np.repeat(k_rope, self.heads, 1)], -1)
        k, v = self.caches[layer].put(k, up[..., self.nope :])
        seen = visibility(n, len(k), "causal")
        out, _ = attend(np.concatenate([q[..., : self.nope], q_rope], -1), k, v, seen, self.scale)
        return self.linear(out.reshape(n, -1), at + "o_proj")

    def swiglu(self, x, name):
        return self.linear(silu(self.linear(x, name + "gate_proj")) * self.linear(x, name + "up_proj"), name + "down_proj")

    def experts(self, h, at):
        c = self.config
        scores = self.linear(h, at + "gate")
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = np.zeros_like(h)
        for row, share in enumerate(shares):
            open_to = share.copy()
            if c["topk_method"] == "group_limited_greedy":
                groups = share.reshape(c["n_group"], -1)
                best = np.argsort(-groups.max(-1), kind="stable")[: c["topk_group"]]
                closed = np.setdiff1d(np.arange(c["n_group"]), best)
                open_to.reshape(c["n_group"], -1)[closed] = -1
            chosen = np.argsort(-open_to, kind="stable")[: c["num_experts_per_tok"]]
            weights = share[chosen]
            weights = weights / weights.sum() if c["norm_topk_prob"] else weights * c["routed_scaling_factor"]
            for expert, weight in zip(chosen, weights):
                out[row] += weight * self.swiglu(h[row : row + 1], f"{at}experts.{expert}.")[0]
        return out + self.swiglu(h, at + "shared_experts.") if c["n_shared_experts"] else out

    def __call__(self, ids):
        c = self.config
        x = self.weights["embed_tokens.weight"][np.asarray(ids)]
        positions = self.caches[0].length + np.arange(len(ids))
        for layer in range(c["num_hidden_layers"]):
            x = x + self.attention(x, layer, positions)
            h, at = self.norm(x, f"layers.{layer}.post_attention_layernorm"), f"layers.{layer}.mlp."
            sparse = c.get("n_routed_experts") and layer >= c["first_k_dense_replace"]
            x = x + (self.experts(h, at) if sparse else self.swiglu(h, at))
        return self.norm(x, "norm") @ self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"]).T


class DFlash(Network):
    """The drafter. `inject` adds context rows, `draft` runs a block and drops its rows again."""

    def layer_mask(self, layer):
        c, dflash = self.config, self.config["dflash_config"]
        kinds = c.get("layer_types")
        sliding = bool(kinds) and kinds[layer] == "sliding_attention"
        if c.get("is_causal") is not None:
            causal = c["is_causal"]
        elif dflash.get("causal") is not None:
            causal = dflash["causal"]
        else:
            causal = sliding
        w = c["sliding_window"] - 1 if sliding else None
        return ("causal", (w, 0) if sliding else None) if causal else ("bidirectional", (w, w) if sliding else None)

    def inject(self, features):
        """features [n, taps * target hidden] of the next n positions; gives C and each layer's k, v."""
        context = self.norm(self.linear(features, "fc"), "hidden_norm")
        positions = self.length + np.arange(len(features))
        rows = []
        for layer, cache in enumerate(self.caches):
            rows.append((self.project(context, layer, "k", self.kv_heads, positions), self.project(context, layer, "v", self.kv_heads)))
            cache.put(*rows[-1])
        return context, rows

    def draft(self, anchor, embed, width=None):
        """Block ids, each layer's output, and the final normed rows, for a block at the cache's end."""
        start = self.length
        ids = [anchor] + [self.config["dflash_config"]["mask_token_id"]] * ((width or self.config["block_size"]) - 1)
        x, outputs = embed[ids], []
        for layer in range(self.layers):
            x = self.block(x, layer, start + np.arange(len(ids)), *self.layer_mask(layer))
            outputs.append(x)
        self.crop(start)
        return ids, outputs, self.norm(x, "norm")


# ---- SmolLM2 from its GGUF file ----------------------------------------------------------------


class SmolLM2:
    """The dequantised model in float32 and its tokenizer. Rotary pairs stay interleaved, as stored."""

    def __init__(self, path):
        from gguf import GGUFReader
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        reader = GGUFReader(path)
        field = lambda key: reader.fields[key].contents()
        tokens, merges = field("tokenizer.ggml.tokens"), [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
        self.tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens([AddedToken(t, special=True) for t in tokens[:17]])
        self.config = {
            "num_hidden_layers": field("llama.block_count"),
            "hidden_size": field("llama.embedding_length"),
            "num_attention_heads": field("llama.attention.head_count"),
            "num_key_value_heads": field("llama.attention.head_count_kv"),
            "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": field("llama.rope.freq_base"),
        }
        names = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        names |= {f"attn_{a}": f"self_attn.{b}_proj" for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))}
        names |= {f"ffn_{a}": f"mlp.{a}_proj" for a in ("gate", "up", "down")}
        self.weights = {}
        for tensor in reader.tensors:
            parts = tensor.name.split(".")
            name = f"layers.{parts[1]}.{names[parts[2]]}" if parts[0] == "blk" else names[parts[0]]
            shape = [int(n) for n in reversed(tensor.shape)]
            self.weights[name + ".weight"] = self.dequantise(tensor.tensor_type.name, tensor.data).reshape(shape)

    @staticmethod
    def dequantise(kind, data):
        data = np.ascontiguousarray(data).view(np.uint8)
        if kind == "F32":
            return data.view("<f4").copy()
        if kind == "Q8_0":
            block = data.reshape(-1, 34)
            return block[:, :2].copy().view("<f2").astype(np.float32) * block[:, 2:].copy().view(np.int8)
        if kind == "Q4_1":
            block = data.reshape(-1, 20)
            scale, low = (block[:, at : at + 2].copy().view("<f2").astype(np.float32) for at in (0, 2))
            nibbles = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], 1)
            return nibbles * scale + low
        raise ValueError(f"tensor type {kind} is not known here")

    def decoder(self):
        return Decoder(self.config, self.weights, interleaved=True)

    def encode(self, text):
        """Plain text: special tokens in it are not parsed."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def chat(self, user):
        """The chat template for one user message, with the template's own system message."""
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        start, end, newline = [1], [2], self.encode("\n")
        turn = lambda role, text: start + self.encode(f"{role}\n{text}") + end + newline
        return turn("system", system) + turn("user", user) + start + self.encode("assistant\n")


def margin(logits):
    """Best minus second logit of one row."""
    second, best = np.partition(logits, -2)[-2:]
    return float(best - second)


def greedy(decoder, prompt, count, stop=()):
    """Token by token with a cache: ids and margins."""
    row, ids, margins = decoder(prompt)[-1], [], []
    while True:
        ids.append(int(row.argmax()))
        margins.append(margin(row))
        if len(ids) == count or ids[-1] in stop:
            return ids, margins
        row = decoder(ids[-1:])[-1]
