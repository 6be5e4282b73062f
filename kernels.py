"""Partial attention and merge: how can a softmax be computed in pieces?

For one query row and a set S of keys, with scores s_j = q·k_j·scale, the textbook has

    o(S) = Σ_j exp(s_j)·v_j / Σ_j exp(s_j)          lse(S) = ln Σ_j exp(s_j)

and for any partition of S into parts (each wherever it likes)

    lse = ln Σ_p exp(lse_p)                          o = Σ_p exp(lse_p − lse)·o_p

so a row's attention over a cache in pieces is a weighted mean of what the pieces return: the one
fact the pool rests on. `partial_attention` gives (o, lse) of rows over spans of a slab, `merge`
joins parts. Both subtract the running maximum before exp (the textbook form overflows); an empty
part is o = 0, lse = −inf: written always, and never a NaN.

    query rows ──┐ blocks: a few rows of one run          slab rows (one layer)
      run 0 ─────┼─▶ block 0 ─ tiles ──────────────────▶ [span][ ][span    ][ ]
      run 1 ─────┼─▶ block 1 ─ tiles ────────────────────────────────▶[span]
                 └─▶ …                                    a tile: at most 64 rows of a span

Two implementations: Triton, and PyTorch for CPUs and float64. Left out: TMA.
Notation: T rows · H query heads · Hkv KV heads · G = H / Hkv · D head dim · P partial rows.
"""

import math
import os
from functools import cached_property

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: PyTorch serves
    triton = None

TILE, PIECE = 64, 4  # KV rows a tile; tiles a piece at least
NEVER = np.iinfo(np.int64).max  # position of padding: after every row


def ranges(starts, counts):
    """Concatenated `arange(start, start + count)`, without a loop: [n], [n] → [sum(counts)]."""
    starts, counts = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)


def to_device(arrays, device) -> list:
    """Integer arrays of the host as int64 tensors there, in one copy that nobody waits for. (One
    for a kernel stands behind even sizes: kernels are compiled for pointers that 16 divides.)"""
    flat = torch.from_numpy(np.concatenate([x.ravel() for x in arrays], dtype=np.int64))
    flat = flat.pin_memory() if torch.device(device).type == "cuda" else flat
    parts = flat.to(device, non_blocking=True).split([x.size for x in arrays])
    return [part.view(x.shape) for part, x in zip(parts, arrays)]


def cut(lengths, size: int):
    """Cuts each length into pieces of at most `size`: [n] → of each piece the length that it is
    of, its offset in it, and its own length: 3 × [pieces]."""
    counts = -(-lengths // size)
    of = np.repeat(np.arange(len(lengths)), counts)
    offset = ranges(np.zeros_like(counts), counts) * size
    return of, offset, np.minimum(lengths[of] - offset, size)


class Work:
    """What `partial_attention` is to do: made on the host once per iteration, used by every layer.

    A *run* is consecutive query rows at consecutive positions that read the same spans; a *span* is
    consecutive slab rows at consecutive positions. Row t of a run sees the keys at positions up to
    its own. Partial row p belongs to the p-th row of the runs in order, so P = sum(rows).

    first, rows, position: [runs] first query row, rows, position of the first row.
    span_run (ascending), span_first, span_length, span_position: [spans] the run that reads it,
    first slab row, rows, position of the first row. A run without spans gives empty partials.
    programs: long blocks are cut into *pieces*, which are merged, until there are about so many.
    """
    def __init__(self, first, rows, position, span_run, span_first, span_length, span_position,
                 group: int, device="cpu", programs: int = 1):
        first, rows, position, span_run, span_first, span_length, span_position = (
            np.asarray(x, np.int64) for x in (
                first, rows, position, span_run, span_first, span_length, span_position))
        # Lanes of a tile are (row, head of the group): 16 at least, which is what a dot needs.
        longest = min(int(rows.max(initial=1)) * group, 128)
        self.lanes = max(16, 1 << (longest - 1).bit_length(), 1 << (group - 1).bit_length())

        # Spans → tiles, runs → blocks; a block reads its run's tiles, a piece some of them.
        span, offset, length = cut(span_length, TILE)
        tiles = np.stack((span_first[span] + offset, length, span_position[span] + offset), 1)
        none = np.zeros((2 - len(tiles) % 2, 3), np.int64)  # the kernel loads one ahead
        tiles = np.concatenate((tiles, none))  # an even number: what follows is aligned, too
        last_tile = np.cumsum(np.bincount(span_run[span], minlength=len(rows)))
        first_tile = np.concatenate(([0], last_tile))[:len(rows)]
        run, offset, height = cut(rows, self.lanes // group)
        begin, end = first_tile[run], last_tile[run]
        most = max(PIECE, -(-int((end - begin).sum()) // programs))
        block, before, _ = cut(np.maximum(end - begin, 1), most)
        partial = np.cumsum(height[block]) - height[block]
        pieces = np.stack(((first[run] + offset)[block], height[block], partial,
                           (position[run] + offset)[block], begin[block] + before,
                           np.minimum(end[block], begin[block] + before + most)), 1)
        self.num_rows, parts = int(height[block].sum()), np.zeros((0, 0), np.int64)
        if len(block) > len(height):
            count = np.bincount(block)
            of, at, _ = cut(height, 1)  # partial rows of a block's pieces follow each other
            number, start = np.arange(count.max()), partial[np.cumsum(count) - count]
            parts = (start[of] + at)[:, None] + number * height[of, None]
            parts = np.where(number < count[of, None], parts, -1)
        self._host = pieces, tiles
        self.blocks, self.tiles, self.parts = to_device((pieces, tiles, parts), device)

    @cached_property
    def padded(self) -> list:
        """The same work as gathers for PyTorch: blocks of like size padded to one shape, so that
        a batch of them is one matmul; blocks without keys are in none. Per batch: query rows
        [b, m], partial rows [b, m] (the last for padding), slab rows [b, n] (its first again for
        padding), what a row does not see [b, 1, m, n]."""
        (blocks, tiles), batches, alike = self._host, [], {}
        kv_before = np.concatenate(([0], np.cumsum(tiles[:, 1])))
        kv_rows, kv_positions = (ranges(tiles[:, i], tiles[:, 1]) for i in (0, 2))
        length = kv_before[blocks[:, 5]] - kv_before[blocks[:, 4]]
        for i, (m, n) in enumerate(zip(blocks[:, 1].tolist(), length.tolist())):
            if n:
                alike.setdefault(((m - 1).bit_length(), (n - 1).bit_length()), []).append(i)
        for chosen in (group[i:i + 64] for _, group in sorted(alike.items())
                       for i in range(0, len(group), 64)):  # bounds what a batch copies
            block, n = blocks[chosen], length[chosen]
            row, column = np.arange(block[:, 1].max()), np.arange(n.max())
            inside, valid = row < block[:, 1:2], column < n[:, None]
            source = kv_before[block[:, 4]][:, None] + column * valid
            at = np.where(valid, kv_positions[source], NEVER)
            batch = (np.where(inside, block[:, :1] + row, block[:, :1]),
                     np.where(inside, block[:, 2:3] + row, self.num_rows), kv_rows[source],
                     at[:, None, None] > (block[:, 3:4] + row)[:, None, :, None])
            batches.append([torch.from_numpy(x).to(self.blocks.device) for x in batch])
        return batches


def use_triton(x, backend: str) -> bool:
    """`auto`: Triton on a GPU, but for float64 and heads wider than shared memory has room for."""
    return backend == "triton" or (
        backend == "auto" and triton is not None and x.is_cuda and x.dtype != torch.float64
        and x.shape[-1] * x.element_size() <= 512)


def partial_attention(q, k, v, work: Work, scale: float, backend: str = "auto"):
    """Attention of query rows over spans of a slab, and its log-sum-exp (natural log).

    q [T, H, D], k and v [slab rows, Hkv, D] → o [P, H, D], lse [P, H], in float32 (float64 for
    float64 input). Every partial row is written; without a visible key it is o = 0, lse = −inf.
    What lies in slab rows outside the spans is never used, NaN included."""
    H, D, Hkv = q.shape[1], q.shape[2], k.shape[1]
    if use_triton(q, backend):
        o, lse = (torch.empty(work.num_rows, *shape, dtype=torch.float32, device=q.device)
                  for shape in ((H, D), (H,)))
        if work.num_rows:
            _partial_attention_kernel[len(work.blocks), Hkv](
                q.contiguous(), k, v, work.blocks, work.tiles, o, lse, scale,
                **attention_config(work.lanes, H, Hkv, D, k.element_size()))
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.zeros(work.num_rows + 1, H, D, dtype=wide, device=q.device)  # + 1: for padding
        lse = torch.full((work.num_rows + 1, H), -math.inf, dtype=wide, device=q.device)
        for rows, partials, kv_rows, hidden in work.padded:
            (b, m), n = rows.shape, kv_rows.shape[1]
            query = q[rows].view(b, m, Hkv, -1, D).permute(2, 0, 3, 1, 4).to(wide) * scale
            key, value = (x.flatten(1).index_select(0, kv_rows.flatten()).view(b, n, Hkv, D)
                          .permute(2, 0, 1, 3).to(wide) for x in (k, v))  # [Hkv, b, n, D]
            s = (query.reshape(Hkv, b, -1, D) @ key.mT).view(Hkv, b, -1, m, n)
            s.masked_fill_(hidden, -math.inf)  # [Hkv, b, G, m, n]
            top = s.amax(-1, keepdim=True)
            p = s.sub_(torch.where(top == -math.inf, 0, top)).exp_()
            total = p.sum(-1, keepdim=True)  # the maximum gives 1
            out = (p.flatten(2, 3) @ value).view(Hkv, b, -1, m, D) / total.clamp(min=1)
            o[partials] = out.permute(1, 3, 0, 2, 4).reshape(b, m, H, D)
            lse[partials] = (top + total.log()).permute(1, 3, 0, 2, 4).reshape(b, m, H)
        o, lse = o[:-1], lse[:-1]
    return merge(o, lse, work.parts, backend) if len(work.parts) else (o, lse)


def merge(o, lse, parts, backend: str = "auto"):
    """Joins the parts of each row in one pass (pairwise merging rounds more often).

    o [P, H, D], lse [P, H], parts [rows, max_parts], −1 where a row has fewer parts → o
    [rows, H, D], lse [rows, H], of the input's type. o is not read where its lse is −inf. Rows
    whose parts are all empty, or that have none, come out empty: o = 0, lse = −inf."""
    (rows, num_parts), (_, H, D) = parts.shape, o.shape
    if use_triton(o, backend):
        out, out_lse = o.new_empty(rows, H, D), lse.new_empty(rows, H)
        if rows:
            _merge_kernel[rows,](o.contiguous(), lse.contiguous(), parts.contiguous(), out, out_lse,
                                 num_parts, H=H, D=D, HPAD=triton.next_power_of_2(H),
                                 DPAD=triton.next_power_of_2(D))
        return out, out_lse
    if not o.shape[0] or not num_parts:
        return o.new_zeros(rows, H, D), lse.new_full((rows, H), -math.inf)
    index = parts.clamp(min=0).long()
    part = lse[index].masked_fill((parts < 0)[:, :, None], -math.inf)  # [rows, max_parts, H]
    top = part.amax(1, keepdim=True)
    weight = torch.exp(part - torch.where(top == -math.inf, 0, top))
    total = weight.sum(1)  # [rows, H]
    seen = o[index].masked_fill((part == -math.inf)[..., None], 0)
    out = (weight[..., None] * seen).sum(1) / total.clamp(min=1)[..., None]
    return out, top[:, 0] + total.log()


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    LN2 = tl.constexpr(0.6931471805599453)

    @triton.jit
    def _tile(Tiles, t):
        """First slab row, length and position of a tile."""
        return tl.load(Tiles + t * 3), tl.load(Tiles + t * 3 + 1), tl.load(Tiles + t * 3 + 2)

    @triton.jit
    def _partial_attention_kernel(Q, K, V, Blocks, Tiles, O, LSE, scale, H: tl.constexpr,
                                  HKV: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
                                  N: tl.constexpr, DPAD: tl.constexpr, UPCAST: tl.constexpr):
        """One program: a block of rows × one KV head. Its M lanes are (row, head of the group)."""
        G: tl.constexpr = H // HKV
        block = Blocks + tl.program_id(0) * 6
        head = tl.program_id(1)
        first, rows, partial = tl.load(block), tl.load(block + 1), tl.load(block + 2)
        lane, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, DPAD)
        row, query_head = lane // G, head * G + lane % G
        live = row < rows
        position = tl.load(block + 3) + row
        at = ((first + row) * H + query_head)[:, None] * D + d[None, :]  # int64: slabs are long
        q = tl.load(Q + at, mask=live[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:  # the interpreter has no 16-bit arithmetic
            q = q.to(tl.float32)
        # Scores in powers of two: exp2 is the hardware's instruction.
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DPAD], tl.float32)
        begin = tl.load(block + 4)
        kv_first, length, kv_position = _tile(Tiles, begin)
        for t in range(begin, tl.load(block + 5)):
            inside = n < length
            kv_at = ((kv_first + n) * HKV + head)[:, None] * D + d[None, :]
            mask = inside[:, None] & (d < D)[None, :]  # masks V too: 0 × NaN is NaN
            k = tl.load(K + kv_at, mask=mask, other=0.0)
            v = tl.load(V + kv_at, mask=mask, other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            seen = tl.minimum(position + 1 - kv_position, length).to(tl.int32)  # of this tile
            s = tl.where(n[None, :] < seen[:, None], s, -float("inf"))
            new = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(s - safe[:, None])
            shrink = tl.exp2(top - safe)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            top = new
            # A tile ahead: addresses that wait for a load would cost K and V half their stages.
            kv_first, length, kv_position = _tile(Tiles, t + 1)
        divisor = tl.where(total == 0.0, 1.0, total)
        o = acc / divisor[:, None]
        lse = (top + tl.log2(divisor)) * LN2  # an empty part: top is −inf, and so is this
        out = (partial + row) * H + query_head
        tl.store(O + out[:, None] * D + d[None, :], o, mask=live[:, None] & (d < D)[None, :])
        tl.store(LSE + out, lse, mask=live)

    @triton.jit
    def _merge_kernel(O, LSE, Parts, Out, OutLSE, max_parts,
                      H: tl.constexpr, D: tl.constexpr, HPAD: tl.constexpr, DPAD: tl.constexpr):
        """One program: one row, all heads. The textbook's weighted mean, with a running maximum."""
        row = tl.program_id(0).to(tl.int64)
        h, d = tl.arange(0, HPAD), tl.arange(0, DPAD)
        heads = h < H
        mask = heads[:, None] & (d < D)[None, :]
        top = tl.full([HPAD], -float("inf"), tl.float32)
        total = tl.zeros([HPAD], tl.float32)
        acc = tl.zeros([HPAD, DPAD], tl.float32)
        for i in range(max_parts):
            part = tl.load(Parts + row * max_parts + i).to(tl.int64)
            lse = tl.load(LSE + tl.maximum(part, 0) * H + h, mask=heads, other=-float("inf"))
            lse = tl.where(part >= 0, lse, -float("inf"))
            full = lse > -float("inf")  # o of an empty part may be anything
            o = tl.load(O + (part * H + h)[:, None] * D + d[None, :],
                        mask=mask & full[:, None], other=0.0).to(tl.float32)
            new = tl.maximum(top, lse)
            safe = tl.where(new == -float("inf"), 0.0, new)
            weight, shrink = tl.exp(lse - safe), tl.exp(top - safe)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + o * weight[:, None]
            top = new
        divisor = tl.where(total == 0.0, 1.0, total)
        out = acc / divisor[:, None]
        lse = top + tl.log(divisor)
        tl.store(Out + (row * H + h)[:, None] * D + d[None, :], out, mask=mask)
        tl.store(OutLSE + row * H + h, lse, mask=heads)


def attention_config(lanes: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> dict:
    """Compile-time arguments and launch options of `_partial_attention_kernel`: 16 lanes are
    decode, more are prefill. Of s stages, s − 1 tiles of K and V lie in shared memory (one more
    where wgmma reads them), besides the lanes' q and p: an A100 has 163 KB, an H100 227."""
    width = max(16, triton.next_power_of_2(head_dim))
    room = 163 * 1024 - lanes * (width + TILE) * itemsize
    stages = min(3, 1 + max(1, room // (2 * TILE * width * itemsize)))
    return dict(H=heads, HKV=kv_heads, D=head_dim, M=lanes, N=TILE, DPAD=width, num_stages=stages,
                num_warps=8 if lanes > 16 else 4, UPCAST=os.environ.get("TRITON_INTERPRET") == "1")


if __name__ == "__main__":  # a check and a small benchmark, on whatever device there is
    import sys
    os.execv(sys.executable, [sys.executable, os.path.dirname(os.path.abspath(__file__))
                              + "/bench/kernels.py", "--small", *sys.argv[1:]])
