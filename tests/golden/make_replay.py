"""Writes replay/*.safetensors: hand-made attention problems with their answers.

    python3 make_replay.py

Each file is one call on a paged cache in the project's replay format. Inputs are seeded by the
file's name; `out` and `lse` are computed in float64 from the values as stored. Needs numpy.
"""

import json
import pathlib
import zlib

import numpy as np

from reference import attend, encode, float8_bits, float8_table, decode, visibility, write_safetensors

FOLDER = pathlib.Path(__file__).parent / "replay"
TORCH = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def store(x, kind):
    """(dtype, stored, values) of cache or query rows in one of the contract's dtypes (not q8)."""
    if kind in TORCH:
        raw = encode(x, TORCH[kind])
        return TORCH[kind], raw, decode(TORCH[kind], raw)
    raw = float8_bits(x, kind)
    return "U8", raw, float8_table(kind)[raw]


def chain(n):
    """The tree that is a chain: causal."""
    return np.tril(np.ones((n, n), bool))


def tree(parents):
    """[n, n] visibility of nodes whose parents are given; -1 is the root's."""
    seen = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def problem(name, sequences, kind="gqa", heads=3, kv_heads=1, d=32, e=None, latent=32, rope=16, scale=None, mask="causal",
            window=None, softcap=None, dtype="f32", kv_dtype=None, page=16, causal=None, trees=None, words=None, sinks=None,
            alibi=None, spans=None, shared=0, spare=0, poison=False, edit=None, size=1.0):
    """One file. `sequences` are (queries, kv_len); `shared` leading pages are common to all rows.

    `spare` pages belong to nobody; `poison` puts NaN there and behind each kv_len. `edit` may
    change the random q, k and v before they are stored.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kv_dtype, e = kv_dtype or dtype, e or d
    mla = kind == "mla"
    if mla:
        kv_heads, d, e = 1, latent + rope, latent
    scale = d**-0.5 if scale is None else scale
    query_start = np.concatenate([[0], np.cumsum([n for n, _ in sequences])])
    kv_len = np.array([length for _, length in sequences])

    # pages in a shuffled order, the first `shared` of them in every row
    needed = [max(-(-length // page), 0) for length in kv_len]
    pages = shared + sum(max(n - shared, 0) for n in needed) + spare
    free = list(rng.permutation(pages))
    common = [free.pop() for _ in range(shared)]
    table = np.full((len(sequences), max(needed) + (1 if spare else 0)), -1)
    for row, count in enumerate(needed):
        ids = common[:count] + [free.pop() for _ in range(count - min(shared, count))]
        table[row, :count] = ids

    q = rng.normal(size=(query_start[-1], heads, d)) * size
    k = rng.normal(size=(pages, page, kv_heads, d)) * size
    v = rng.normal(size=(pages, page, kv_heads, e))
    if mla:
        v = k[..., :latent]
    if edit:
        q, k, v = edit(rng, q, k, v)
    live = np.zeros((pages, page), bool)
    for row, length in enumerate(kv_len):
        for at in range(length):
            live[table[row, at // page], at % page] = True
    if poison and kv_dtype != "q8":
        k, v = (np.where(live[..., None, None], x, np.nan) for x in (k, v))

    tensors = {}
    tensors["q"], q = (lambda s: (s[:2], s[2]))(store(q, dtype))
    if kv_dtype == "q8":
        for letter, x in (("k", k), ("v", v)):
            scales = (np.abs(x).max(-1) / 127).astype("<f4")
            codes = np.rint(x / scales[..., None]).astype("i1")
            if poison:
                scales = np.where(live[..., None], scales, np.nan).astype("<f4")
            tensors[f"{letter}_cache"], tensors[f"{letter}_scale"] = ("I8", codes), ("F32", scales)
            values = codes * scales[..., None].astype(np.float64)
            k, v = (values, v) if letter == "k" else (k, values)
    elif mla:
        dtype_name, raw, k = store(k[:, :, 0], kv_dtype)
        tensors["kv_cache"] = (dtype_name, raw)
        k, v = k[:, :, None], k[:, :, None, :latent]
    else:
        for letter, x in (("k", k), ("v", v)):
            dtype_name, raw, values = store(x, kv_dtype)
            tensors[f"{letter}_cache"] = (dtype_name, raw)
            k, v = (values, v) if letter == "k" else (k, values)
    tensors["page_table"], tensors["query_start"], tensors["kv_len"] = (("I32", np.asarray(x)) for x in (table, query_start, kv_len))
    if causal is not None:
        tensors["causal"] = ("I32", np.array(causal))
    if spans is not None:
        tensors["prefix_spans"] = ("I32", np.array(spans))
    if sinks is not None:
        sinks = (rng.normal(size=heads) if sinks is True else np.array(sinks)).astype("<f4")
        tensors["sinks"] = ("F32", sinks)
        sinks = sinks.astype(np.float64)
    if alibi:
        alibi = (2.0 ** (-8 * np.arange(1, heads + 1) / heads)).astype("<f4")
        tensors["alibi_slopes"] = ("F32", alibi)
        alibi = alibi.astype(np.float64)
    if mask == "tree":
        words = words or -(-max(n for n, _ in sequences) // 32)
        bits = np.zeros((query_start[-1], words), np.uint32)
        for row, seen in enumerate(trees):
            for i, j in zip(*np.nonzero(seen)):
                bits[query_start[row] + i, j // 32] |= np.uint32(1 << (j % 32))
        tensors["tree_mask"] = ("U32", bits)

    out, lse = np.zeros((query_start[-1], heads, e)), np.zeros((query_start[-1], heads))
    for row, (n, length) in enumerate(sequences):
        at = np.arange(length)
        keys, values = (x[table[row, at // page], at % page] for x in (k, v))
        seen = visibility(n, length, mask, window, causal=None if causal is None else bool(causal[row]),
                          tree=trees[row] if trees else None, spans=[s[1:] for s in spans or () if s[0] == row])
        rows = slice(query_start[row], query_start[row + 1])
        out[rows], lse[rows] = attend(q[rows], keys, values, seen, scale, softcap, alibi, sinks)
    assert np.isfinite(out).all() and not np.isnan(lse).any()
    tensors["out"], tensors["lse"] = ("F32", out.astype("<f4")), ("F32", lse.astype("<f4"))

    shape = {"latent_dim": latent, "rope_dim": rope} if mla else {"kv_heads": kv_heads, "head_dim": d, "value_dim": e}
    attention = {"kind": kind, "query_heads": heads, **shape, "scale": scale, "mask": mask,
                 "window": None if window is None else {"left": window[0], "right": window[1]},
                 "softcap": softcap, "dtype": dtype, "kv_dtype": kv_dtype, "page_size": page}
    tolerance = 1e-4 if dtype == kv_dtype == "f32" else 1e-2
    text = json.dumps({"format": 1, "attention": attention, "tolerance": {"atol": tolerance, "rtol": tolerance}})
    write_safetensors(FOLDER / f"{name}.safetensors", tensors, {"polyattn.problem": text})


def huge(rng, q, k, v):
    """Scores (after a scale of 0.25) that are multiples of 32 within about +-1e4: wide apart or exact ties."""
    q = rng.integers(-8, 9, q.shape) * 4.0
    k = rng.integers(-8, 9, k.shape) * 32.0
    return q, k, v


def main():
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    small = [(4, 20)]
    branches = tree([-1, 0, 0, 1, 1, 2, 5])

    # masks and dtypes
    for dtype in ("f32", "f16", "bf16"):
        problem(f"gqa-causal-{dtype}", [(5, 5), (1, 19)], dtype=dtype, heads=4, kv_heads=2)
    problem("gqa-bidirectional-f32", [(6, 21)], mask="bidirectional", heads=4, kv_heads=2)
    problem("gqa-bidirectional-f16", [(8, 40)], mask="bidirectional", dtype="f16", d=64)
    problem("gqa-per-sequence-causal-f32", [(5, 9), (5, 9), (3, 14)], mask="causal", causal=[1, 0, 0])
    problem("gqa-per-sequence-causal-window-f16", [(6, 12), (6, 12)], mask="bidirectional", causal=[0, 1], window=(2, 2), dtype="f16")
    problem("gqa-tree-f32", [(7, 20), (7, 7)], mask="tree", trees=[branches, branches])
    problem("gqa-tree-f16", [(7, 33), (1, 5), (3, 18)], mask="tree", trees=[branches, chain(1), tree([-1, 0, 0])], dtype="f16")
    problem("gqa-tree-two-words-f16", [(40, 45)], mask="tree", trees=[tree([-1] + [i // 3 for i in range(39)])], heads=2, kv_heads=1, dtype="f16")
    problem("gqa-tree-spare-words-f16", [(5, 12)], mask="tree", trees=[tree([-1, 0, 1, 1, 0])], words=2, dtype="f16")
    problem("gqa-tree-any-bits-f32", [(6, 10)], mask="tree", trees=[np.random.default_rng(5).random((6, 6)) < 0.5])
    problem("gqa-prefix-spans-f32", [(12, 12), (6, 20)], spans=[[0, 0, 4], [0, 7, 9], [1, 15, 18]])
    problem("gqa-prefix-spans-f16", [(10, 26)], spans=[[0, 12, 20]], dtype="f16")

    # windows
    problem("gqa-window-left-f32", [(3, 30)], window=(4, 0))
    problem("gqa-window-left-f16", [(5, 37)], window=(17, 0), dtype="f16")
    problem("gqa-window-left-only-null-right-f32", [(3, 30)], window=(4, None))
    problem("gqa-window-left-zero-f32", [(4, 9), (1, 17)], window=(0, 0))
    problem("gqa-window-both-f32", [(8, 25)], mask="bidirectional", window=(3, 2))
    problem("gqa-window-right-f32", [(8, 20)], mask="bidirectional", window=(None, 1))
    problem("gqa-window-past-start-f32", [(4, 6)], window=(100, 0))

    # logit changes
    problem("gqa-softcap-f32", small, softcap=2.0, size=2.0)
    problem("gqa-softcap-f16", small, softcap=20.0, dtype="f16", size=2.0)
    problem("gqa-sinks-f32", small, sinks=True)
    problem("gqa-sinks-f16", small, sinks=[3.0, -2.0, 0.5, -30.0], dtype="f16", heads=4, kv_heads=2)
    problem("gqa-alibi-f32", small, alibi=True)
    problem("gqa-alibi-bf16", small, alibi=True, dtype="bf16", heads=8, kv_heads=2)
    problem("gqa-alibi-bidirectional-f32", [(6, 14)], alibi=True, mask="bidirectional")
    problem("gqa-window-softcap-sinks-f32", [(6, 22), (1, 9)], window=(7, 0), softcap=5.0, sinks=True, size=2.0)
    problem("gqa-window-softcap-sinks-f16", [(6, 22), (1, 9)], window=(7, 0), softcap=5.0, sinks=True, size=2.0, dtype="f16")
    problem("gqa-alibi-window-f32", [(5, 24)], alibi=True, window=(6, 0))
    problem("gqa-softcap-alibi-sinks-f32", [(5, 24)], alibi=True, softcap=3.0, sinks=True, size=2.0)
    problem("gqa-tree-softcap-f32", [(7, 16)], mask="tree", trees=[branches], softcap=3.0, size=2.0)
    problem("gqa-tree-window-f32", [(7, 16)], mask="tree", trees=[branches], window=(5, 0))
    problem("gqa-huge-logits-f32", [(4, 20)], edit=huge, scale=0.25)
    problem("gqa-huge-logits-f16", [(4, 20)], edit=huge, scale=0.25, dtype="f16")
    problem("gqa-huge-logits-softcap-f32", [(4, 20)], edit=huge, scale=0.25, softcap=30.0)
    problem("gqa-odd-scale-f32", small, scale=0.3)

    # shapes
    problem("gqa-value-dim-smaller-f32", small, d=64, e=32)
    problem("gqa-value-dim-larger-f16", small, d=32, e=64, dtype="f16")
    problem("gqa-head-40-f32", small, d=40)
    problem("gqa-head-64-group-3-f32", small, d=64)
    problem("gqa-head-96-f16", small, heads=2, kv_heads=1, d=96, dtype="f16")
    problem("gqa-head-128-f16", small, heads=2, kv_heads=1, d=128, dtype="f16")
    problem("gqa-head-256-f16", [(2, 10)], d=256, heads=2, kv_heads=1, dtype="f16")
    problem("gqa-group-1-f32", small, heads=2, kv_heads=2)
    problem("gqa-group-4-f32", small, heads=4)
    problem("gqa-group-8-bf16", small, heads=16, kv_heads=2, dtype="bf16")

    # paging and batches
    problem("gqa-page-1-f32", [(3, 9), (1, 4)], page=1)
    problem("gqa-page-5-f32", [(3, 14), (2, 10)], page=5, heads=4, kv_heads=2)
    problem("gqa-page-24-f16", [(3, 50)], page=24, dtype="f16")
    problem("gqa-page-64-f16", [(3, 70)], page=64, dtype="f16", kv_heads=1)
    problem("gqa-lengths-f32", [(2, 15), (0, 12), (1, 1), (3, 17)], spare=1)
    problem("gqa-page-boundary-f32", [(1, 15), (1, 16), (1, 17), (2, 32), (3, 33)], heads=2, kv_heads=1)
    problem("gqa-empty-sequence-f16", [(0, 0), (2, 6), (0, 3)], dtype="f16")
    problem("gqa-mixed-decode-prefill-f32", [(1, 30), (10, 10), (1, 5), (5, 18)])
    problem("gqa-shared-pages-f32", [(1, 37), (3, 41), (2, 34)], shared=2)
    problem("gqa-shared-pages-f16", [(1, 37), (3, 41)], shared=2, dtype="f16")
    problem("gqa-poison-f32", [(3, 7), (1, 18)], poison=True, spare=2)
    problem("gqa-poison-f16", [(3, 7), (1, 18)], poison=True, spare=2, dtype="f16", heads=4, kv_heads=2)
    problem("gqa-poison-bidirectional-f16", [(8, 21)], poison=True, spare=2, dtype="f16", mask="bidirectional")

    # rows that see nothing: tree rows without bits and without context in reach
    nothing = branches.copy()
    nothing[[0, 3]] = False
    problem("gqa-empty-rows-f32", [(7, 7)], mask="tree", trees=[nothing])
    problem("gqa-empty-rows-sinks-f32", [(7, 7)], mask="tree", trees=[nothing], sinks=[1.5, -2.0, 0.0, 4.0], heads=4, kv_heads=2)
    problem("gqa-empty-rows-window-f16", [(7, 20)], mask="tree", trees=[nothing], window=(2, 0), dtype="f16")

    # cache dtypes apart from the queries'
    problem("gqa-q-f32-kv-f16", small, kv_dtype="f16")
    problem("gqa-q-f16-kv-bf16", small, dtype="f16", kv_dtype="bf16")
    problem("gqa-q8-f32", small, kv_dtype="q8", heads=4, kv_heads=2)
    problem("gqa-q8-f16", [(8, 21)], dtype="f16", kv_dtype="q8", mask="bidirectional", d=64)
    problem("gqa-q8-poison-f16", small, dtype="f16", kv_dtype="q8", poison=True, spare=2)
    problem("gqa-f8e4m3-f16", small, dtype="f16", kv_dtype="f8e4m3", heads=4, kv_heads=2)
    problem("gqa-f8e4m3-poison-f32", small, kv_dtype="f8e4m3", poison=True)
    problem("gqa-f8e5m2-f16", small, dtype="f16", kv_dtype="f8e5m2")

    # every feature under every mask in every kind of cache
    formats = [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("f16", "q8"), ("f32", "f8e4m3"), ("bf16", "f8e5m2")]
    features = {
        "window": {"window": (3, 1)}, "softcap": {"softcap": 3.0, "size": 2.0}, "sinks": {"sinks": True}, "alibi": {"alibi": True},
        "value-dim": {"e": 48}, "all": {"window": (5, 2), "softcap": 8.0, "sinks": True, "alibi": True, "e": 24},
    }
    for dtype, kv_dtype in formats:
        common = {"dtype": dtype, "kv_dtype": kv_dtype, "heads": 2, "kv_heads": 1, "page": 4, "spare": 1, "poison": True}
        for mask in ("causal", "bidirectional", "tree"):
            trees = {"trees": [tree([-1, 0, 0, 2]), chain(1)]} if mask == "tree" else {}
            for feature, settings in features.items():
                problem(f"matrix-{mask}-{feature}-{dtype}-{kv_dtype}", [(4, 9), (1, 6)], mask=mask, **common, **trees, **settings)
        problem(f"matrix-causal-spans-{dtype}-{kv_dtype}", [(6, 9), (2, 6)], spans=[[0, 2, 6], [1, 4, 5]], **common)
        problem(f"matrix-causal-sequences-{dtype}-{kv_dtype}", [(4, 9), (3, 6)], causal=[0, 1], **common)

    # latent attention
    mla = {"kind": "mla", "heads": 4}
    problem("mla-causal-f32", [(5, 5), (1, 19)], **mla)
    problem("mla-causal-f16", [(5, 9), (1, 19)], **mla, dtype="f16", latent=64, rope=8)
    problem("mla-bidirectional-f32", [(6, 18)], **mla, mask="bidirectional")
    problem("mla-bidirectional-f16", [(8, 24)], **mla, mask="bidirectional", dtype="f16")
    problem("mla-tree-f32", [(7, 20)], **mla, mask="tree", trees=[branches])
    problem("mla-tree-f16", [(7, 20)], **mla, mask="tree", trees=[branches], dtype="f16", latent=64, rope=8)
    problem("mla-window-f32", [(5, 24)], **mla, window=(6, 0))
    problem("mla-softcap-f32", small, **mla, softcap=2.0, size=2.0)
    problem("mla-scale-one-head-f32", small, kind="mla", heads=1, scale=0.2)
    problem("mla-poison-shared-f16", [(2, 37), (3, 41)], **mla, dtype="f16", poison=True, shared=2, spare=2)
    problem("mla-q-f32-kv-bf16", small, **mla, kv_dtype="bf16")
    files = list(FOLDER.glob("*.safetensors"))
    print(f"{len(files)} files, {sum(f.stat().st_size for f in files)} bytes")


if __name__ == "__main__":
    main()
