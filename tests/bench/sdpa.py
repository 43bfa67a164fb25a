"""PyTorch's scaled_dot_product_attention, each of its backends, on the shapes of `polyattn bench kernels --list --json`.

    polyattn bench kernels --list --json > shapes.json
    python sdpa.py shapes.json --shape llama3-8b/decode --shape llama3-8b/verify > sdpa.json

Standard output is one JSON document with the rows of `peers --json`. Times are medians by CUDA events round many calls;
calls take turns on copies of small caches, so that each reads from memory. Masks are causal and aligned at the bottom
right. Some rows of every answer are compared with float64.
"""

import argparse
import datetime
import fnmatch
import json
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COLD_BYTES = 256 << 20
MOST_COPIES = 16


def random(shape, device):
    """Uniform over the odd 128ths between -2 and 2, as the Rust benches have it."""
    codes = torch.randint(0, 256, shape, device=device, dtype=torch.int16)
    return (codes * 2 - 255).to(torch.float16) / 128


def together(device, calls, call):
    """Seconds of one of `calls` calls: by CUDA events (None without CUDA) and by the wall clock."""
    cuda = device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
    start = time.perf_counter()
    if cuda:
        events[0].record()
    for turn in range(calls):
        call(turn)
    if cuda:
        events[1].record()
        torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / calls
    return (events[0].elapsed_time(events[1]) / 1e3 / calls if cuda else None), wall


def measure(device, call, budget):
    together(device, 1, call)
    gpu, wall = together(device, 1, call)
    once = gpu or wall
    calls = max(1, min(1000, round(5e-3 / max(once, 1e-7))))
    together(device, calls, call)
    repetitions = max(1, min(15, int(budget / (max(once, wall) * calls))))
    times = [together(device, calls, call) for _ in range(repetitions)]
    by_gpu = [gpu for gpu, _ in times if gpu is not None]
    return {
        "microseconds": statistics.median(by_gpu) * 1e6 if by_gpu else None,
        "wall_microseconds": statistics.median(wall for _, wall in times) * 1e6,
        "calls": calls,
        "repetitions": repetitions,
    }


def agreement(shape, q, k, v, out):
    """Some rows against float64."""
    batch, rows, length = shape["batch"], shape["query_rows"], shape["context"]
    group = shape["query_heads"] // shape["kv_heads"]
    largest = difference = expected = 0.0
    places = [(0, 0, 0), (batch - 1, rows - 1, shape["query_heads"] - 1), (batch // 2, rows // 2, 1)]
    for sequence, row, head in places:
        seen = length - rows + row + 1
        keys, values = (t[sequence, head // group, :seen].double() for t in (k, v))
        weights = torch.softmax(keys @ q[sequence, head, row].double() * shape["scale"], dim=0)
        want, got = weights @ values, out[sequence, head, row].double()
        largest = max(largest, (got - want).abs().max().item())
        difference += (got - want).square().sum().item()
        expected += want.square().sum().item()
    error = (difference / expected) ** 0.5
    return {"max_abs_err": largest, "rel_l2": error, "within_tolerance": error <= 1e-2 and largest <= 2e-2}


def bench(shape, device, names, budget):
    batch, rows, length = shape["batch"], shape["query_rows"], shape["context"]
    heads, kv_heads = shape["query_heads"], shape["kv_heads"]
    group = heads // kv_heads
    q = random((batch, heads, rows, shape["query_dim"]), device)
    k = random((batch, kv_heads, length, shape["query_dim"]), device)
    bytes_ = 2 * k.numel() * 2
    copies = max(1, min(MOST_COPIES, -(-COLD_BYTES // bytes_))) if device.type == "cuda" else 1
    ks = [k] + [random(k.shape, device) for _ in range(copies - 1)]
    if shape["kind"] == "mla":
        # The value is the latent, with which the key's row begins.
        vs = [k[..., : shape["output_dim"]] for k in ks]
    else:
        vs = [random((batch, kv_heads, length, shape["output_dim"]), device) for _ in ks]
    for name in names:
        # Flash and efficient know the alignment by name; the others take a mask.
        causal, mask = rows > 1 and rows == length, None
        if 1 < rows < length:
            mask = causal_lower_right(rows, length)
            if name in ("cudnn", "math"):
                mask = torch.ones(rows, length, dtype=torch.bool, device=device).tril(length - rows)
        keys, values, gqa, note = ks, vs, group > 1, ""
        try:
            if name == "efficient" and group > 1:
                keys, values = ([t.repeat_interleave(group, dim=1) for t in ts] for ts in (ks, vs))
                gqa, note = False, " (heads repeated)"

            def call(turn):
                at = turn % copies
                return scaled_dot_product_attention(
                    q, keys[at], values[at], attn_mask=mask, is_causal=causal, scale=shape["scale"], enable_gqa=gqa
                )

            with torch.inference_mode(), sdpa_kernel(BACKENDS[name]):
                row = agreement(shape, q, ks[0], vs[0], call(0))
                row.update(measure(device, call, budget))
            row.update(contestant=f"torch-{name}{note}", error=None)
        except RuntimeError as error:
            row = {"contestant": f"torch-{name}", "error": str(error).splitlines()[0]}
        yield row
        keys = values = None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", help="the output of 'polyattn bench kernels --list --json'")
    parser.add_argument("--shape", action="append", default=[], help="part of a name, * for anything")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="one of them; all without")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=0.25)
    args = parser.parse_args()
    device = torch.device(args.device)
    with open(args.shapes) as file:
        shapes = json.load(file)
    wanted = [
        shape
        for shape in shapes
        if not args.shape or any(fnmatch.fnmatch(shape["shape"], f"*{pattern}*") for pattern in args.shape)
    ]
    measured, skipped = [], []
    for shape in wanted:
        print(shape["shape"], file=sys.stderr)
        if shape["softcap"] or shape["sinks"] or shape["window"]:
            skipped.append({"shape": shape["shape"], "reason": "no softcap, sinks or windows in SDPA"})
            continue
        rows = list(bench(shape, device, args.backend or list(BACKENDS), args.seconds))
        measured.append({**shape, "rows": rows})
        for row in rows:
            time_ = row.get("microseconds") or row.get("wall_microseconds")
            what = row["error"] or f"{time_:.1f} µs, {shape['bytes'] / time_ / 1e3:.0f} GB/s"
            print(f"  {row['contestant']}: {what}", file=sys.stderr)
    answer = {
        "command": " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "shapes": measured,
        "skipped": skipped,
    }
    json.dump(answer, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
