"""How near are the kernels to the hardware's limit? Decode, prefill and merge, each beside a peer.

    python bench/kernels.py                      # all shapes (a GPU), or a check of tiny ones (CPU)
    python bench/kernels.py --models llama-3.1-8b --segments 512 --json kernels.json
    python kernels.py                            # a few shapes of one model: --small

Every line is checked against float64 before it is timed. KV lies in random segments of a slab
twice what is read, the L2 cache is flushed between runs, and times are medians.

    decode     batch × context: TB/s of KV, its share of a copy's bandwidth in this very run
    prefill    a chunk of rows over a prefix: TFLOP/s
    merge      rows × parts: TB/s of what it reads and writes, its share of a copy's

The peer is PyTorch's `scaled_dot_product_attention` over a contiguous cache, its best case, and
flash-attn where it is installed. `x_` is its time over ours: above 1 we are faster, although what
we return is float32. Without a GPU the kernels run in Triton's interpreter; nothing is timed.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, as the next line does

from torch.nn.attention.bias import causal_lower_right  # noqa: E402

import kernels  # noqa: E402
from kernels import Work, merge, partial_attention  # noqa: E402

# Query heads, KV heads, head dim.
MODELS = {"llama-3.1-8b": (32, 8, 128), "llama-2-7b": (32, 32, 128), "llama-3-70b": (64, 8, 128),
          "tiny": (4, 2, 16)}
DEVICE, LIMIT = "cuda" if GPU else "cpu", 3e-2  # of a relative error in 16 bits, peaky logits


def median_ms(run) -> float | None:
    """Between runs the L2 cache is flushed (triton.testing)."""
    if not GPU:
        return None
    from triton.testing import do_bench
    return do_bench(run, warmup=20, rep=100, return_mode="median")


def copy_bandwidth() -> float | None:
    """B/s of a copy, read and written bytes together."""
    if not GPU:
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e3


def problem(shape, batch: int, rows: int, context: int, C: int, dtype):
    """`batch` sequences of `context` tokens, the last `rows` of each queries, in random segments:
    q, slab k and v, the work, and of each sequence its slab rows."""
    H, Hkv, D = shape
    per = -(-context // C)
    slots = torch.randperm(2 * batch * per)[:batch * per].numpy().reshape(batch, per)
    sizes = (batch * rows, H), (2 * batch * per * C, Hkv), (2 * batch * per * C, Hkv)
    q, k, v = (torch.randn(n, heads, D, device=DEVICE, dtype=dtype) for n, heads in sizes)
    first = np.arange(batch) * rows
    length = np.minimum(context - np.arange(per) * C, C)
    spans = (np.repeat(np.arange(batch), per), slots.ravel() * C, np.tile(length, batch),
             np.tile(np.arange(per) * C, batch))
    processors = torch.cuda.get_device_properties(0).multi_processor_count if GPU else 16
    work = Work(first, np.full(batch, rows), np.full(batch, context - rows), *spans,
                group=H // Hkv, device=DEVICE, programs=-(-4 * processors // Hkv))
    at = (slots[:, :, None] * C + np.arange(C)).reshape(batch, -1)[:, :context]
    return 2 * q, k, v, work, torch.from_numpy(at).to(DEVICE)


def check(q, k, v, at, rows: int, o, scale: float) -> float:
    """Relative error of o against float64, over the first and last row of some sequences."""
    batch, context = at.shape
    H, Hkv, worst = q.shape[1], k.shape[1], 0.0
    for b in {0, batch // 2, batch - 1}:
        for row in {0, rows - 1}:
            seen = at[b, :context - rows + row + 1]
            query = q[b * rows + row].double().view(Hkv, H // Hkv, -1)
            s = torch.einsum("kgd,nkd->kgn", query, k[seen].double()) * scale
            expected = torch.einsum("kgn,nkd->kgd", s.softmax(-1), v[seen].double()).flatten(0, 1)
            found = o[b * rows + row].double()
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


def peers(q, k, v, at, batch: int, rows: int, scale: float) -> dict:
    """Ours to beat, over K and V made contiguous: name → what to run."""
    k, v = k[at], v[at]  # [batch, context, Hkv, D]
    query = q.view(batch, rows, *q.shape[1:])
    by_head = [x.transpose(1, 2).contiguous() for x in (query, k, v)]
    mask = causal_lower_right(rows, k.shape[1]) if rows > 1 else None
    out = {"sdpa": lambda: F.scaled_dot_product_attention(
        *by_head, attn_mask=mask, scale=scale, enable_gqa=True)}
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache
        out["flash-attn"] = lambda: flash_attn_with_kvcache(query, k, v, softmax_scale=scale,
                                                            causal=True)
    return out


def attention(name: str, batch: int, rows: int, context: int, C: int, dtype, copy) -> dict:
    """A line of the table. Raises ValueError if a result is wrong."""
    H, Hkv, D = shape = MODELS[name]
    q, k, v, work, at = problem(shape, batch, rows, context, C, dtype)
    scale = 1 / math.sqrt(D)
    run = lambda: partial_attention(q, k, v, work, scale, "triton")
    error = check(q, k, v, at, rows, run()[0], scale)
    if not error < LIMIT:
        raise ValueError(f"{name}: batch {batch}, {rows} rows, context {context}, segments of {C}: "
                         f"relative error {error:.2g}; less than {LIMIT} is expected")
    line = dict(kind="decode" if rows == 1 else "prefill", model=name, batch=batch, rows=rows,
                context=context, segment=C, error=error)
    if ms := median_ms(run):
        bytes = 2 * batch * context * Hkv * D * k.element_size()
        flops = 4 * H * D * batch * rows * (context - rows / 2)
        line |= dict(ms=ms, TBs=bytes / ms / 1e9, TFLOPs=flops / ms / 1e9,
                     of_copy=bytes / ms * 1e3 / copy)
        line |= {f"x_{peer}": median_ms(other) / ms
                 for peer, other in peers(q, k, v, at, batch, rows, scale).items()}
    return line


def merging(name: str, rows: int, parts: int, copy) -> dict:
    H, _, D = MODELS[name]
    o = torch.randn(rows * parts, H, D, device=DEVICE)
    lse = 8 * torch.randn(rows * parts, H, device=DEVICE)
    table = torch.randperm(rows * parts, device=DEVICE).view(rows, parts)
    table[1::2, 0] = -1  # ragged: every second row has a part less
    run = lambda: merge(o, lse, table, "triton")
    weight = lse[table].double().masked_fill((table < 0)[..., None], -math.inf).softmax(1)
    expected = (weight[..., None] * o[table].double()).sum(1)
    error = float((run()[0].double() - expected).norm() / expected.norm())
    if not error < 1e-5:
        raise ValueError(f"{name}: merge of {rows} rows, {parts} parts: relative error {error:.2g}")
    line = dict(kind="merge", model=name, rows=rows, parts=parts, error=error)
    if ms := median_ms(run):
        bytes = (int((table >= 0).sum()) + rows) * H * (D + 1) * 4
        line |= dict(ms=ms, TBs=bytes / ms / 1e9, of_copy=bytes / ms * 1e3 / copy)
    return line


def cases(options):
    """What is run: arguments of `attention` or `merging`, behind the model's name."""
    for name in options.models[:1] if options.small else options.models:
        H, Hkv, D = MODELS[name]
        if not GPU:  # tiny, but with ends of segments, tiles and pieces
            yield from ((name, *x) for x in ((3, 1, 300, 128), (1, 1, 700, 512), (2, 20, 150, 32)))
            yield from ((name, 5, 2), (name, 9, 6))
            continue
        room = torch.cuda.mem_get_info()[0] / 6  # twice in the slab, once contiguous, and to spare
        for C in options.segments[:1] if options.small else options.segments:
            for batch in (1, 64) if options.small else (1, 4, 16, 64, 256):
                for context in (16_384,) if options.small else (4096, 16_384, 65_536, 131_072):
                    if batch * context * 4 * Hkv * D <= min(room, 12e9):
                        yield name, batch, 1, context, C
            yield from ((name, 1, 2048, 2048 + n, C) for n in (0, 8192, 32_768, 131_072))
        yield from ((name, rows, parts) for rows in (64, 1024, 8192) for parts in (2, 4, 8))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Benchmark the kernels.")
    parser.print_usage = lambda *_: None  # an error is one line
    add = parser.add_argument
    add("--models", help=f"of {', '.join(MODELS)}, by commas; default: all, tiny on a CPU")
    add("--segments", default="128,512,2048", help="tokens of a segment")
    add("--dtype", choices=("bfloat16", "float16"), help="default bfloat16 (CPU: float16)")
    add("--small", action="store_true", help="a few shapes of the first model")
    add("--json", type=argparse.FileType("w"), help="a file for the lines")
    options = parser.parse_args(arguments)
    if kernels.triton is None:
        parser.error("Triton is not installed; it is what is measured")
    options.models = (options.models or ",".join([*MODELS][:-1] if GPU else ["tiny"])).split(",")
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"--models {unknown[0]}: {', '.join(MODELS)} are there")
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", options.segments):
        parser.error(f"--segments {options.segments}: positive numbers by commas are expected")
    options.segments = [int(n) for n in options.segments.split(",")]
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype or ("bfloat16" if GPU else "float16"))
    copy, lines = copy_bandwidth(), []
    print(f"copy: {copy / 1e12:.2f} TB/s on {torch.cuda.get_device_name()}" if GPU else
          "no GPU: tiny shapes through the interpreter, checked and not timed", flush=True)
    for name, *case in cases(options):
        try:
            lines.append(attention(name, *case, dtype, copy) if len(case) == 4
                         else merging(name, *case, copy))
        except (ValueError, torch.OutOfMemoryError) as error:
            return print(f"bench/kernels.py: {error}", file=sys.stderr) or 1
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}"
                        if isinstance(value, str) else f"{key} {value:,}"
                        for key, value in lines[-1].items()), flush=True)
        if options.json:  # after every line: a later one may not fit
            options.json.seek(0)
            json.dump(dict(device=torch.cuda.get_device_name() if GPU else "cpu", copy=copy,
                           torch=torch.__version__, triton=kernels.triton.__version__,
                           lines=lines), options.json, indent=1)
            options.json.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
