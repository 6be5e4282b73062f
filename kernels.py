"""Partial attention and merge: how can a softmax be computed in pieces?

For one query row and a set S of keys, with scores s_j = q·k_j·scale, the textbook has

    o(S) = Σ_j exp(s_j)·v_j / Σ_j exp(s_j)          lse(S) = ln Σ_j exp(s_j)

and for any partition of S into parts (each wherever it likes)

    lse = ln Σ_p exp(lse_p)                          o = Σ_p exp(lse_p − lse)·o_p

so a row's attention over a cache in pieces is a weighted mean of what the pieces return: the one
fact the pool rests on. `partial_attention` gives (o, lse) of rows over spans of a slab, `merge`
joins parts. Both subtract a maximum before exp (the textbook form overflows). An empty
part is written, too: as o = 0 and lse = −inf, never as NaN.

What is to be done is said by two tables: query rows by *reader* (rows that read the same spans),
and spans of KV by reader. Many readers may read the same spans, mostly a prefix that they share.
Where it pays, it is read once for all of them, as a *group*: so a row's attention is that of its
own reader merged with those of its groups.

    QueryRows ─┐ ┌─▶ members: rows by group ──▶ blocks: as many rows as a program takes ─┐
               ├─┤                                                                       ├─▶ pieces
    KVSpans ───┘ └─▶ stretches by group ──────▶ tiles: at most 64 rows of one stretch ───┘

A piece is a block over some of its tiles: a program takes a piece and a KV head. A block that is
longer than an even part of all tiles is cut into several: so a few long ones keep a GPU busy. Each
piece gives a partial result for each of its rows, and `merge` joins those of one row.

Two implementations: Triton, and PyTorch for CPUs and float64. Left out: Hopper's copy engine (TMA).
Notation: T rows · H query heads · Hkv KV heads · G = H / Hkv · D head dim · R readers ·
P partial rows.
"""

import math
import os
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: PyTorch serves
    triton = None

TILE = 64  # KV rows of a tile, at most
MIN_PIECE_TILES = 4  # of a block that is cut: fewer do not pay for another piece
# A program has a lane for each (row, head of a KV head). A dot takes 16 at least; 128 take up to
# 202 of 255 registers. On a CPU twice as many are a fifth faster, and more are not.
MIN_LANES = 16
MAX_LANES = 128
CPU_LANES = 256
# KV rows that PyTorch gathers at a time, so that they are still in the cache when they are used.
MAX_BATCH_KEYS = 1024
MIN_VIEW_KEYS = 256  # of a piece that PyTorch reads where it lies, and so by itself
AFTER_ALL = np.iinfo(np.int64).max  # a position that no query row sees: that of padding


# ── tables of integers ───────────────────────────────────────────────────────────────────────────
#
# A table is a NamedTuple of columns: arrays of one length, with an entry for each thing of one
# kind.

Column = np.ndarray


def select(table, chosen):
    """The chosen entries (indices or a mask) of every column."""
    return type(table)(*(None if column is None else column[chosen] for column in table))


def ranges(first, counts):
    """Concatenated `arange(first, first + count)`, without a loop: [n], [n] → [sum(counts)]."""
    first = np.asarray(first, np.int64)
    counts = np.asarray(counts, np.int64)
    offsets = first - (np.cumsum(counts) - counts)
    return np.arange(counts.sum()) + np.repeat(offsets, counts)


def starts(lengths):
    """Where each of consecutive stretches begins: [n] → [n]."""
    return np.cumsum(lengths) - lengths


def starts_in_groups(lengths, group):
    """Where each stretch begins within its group; group [n] ascends."""
    first = starts(lengths)
    return first - first[np.searchsorted(group, group)]


def split_lengths(lengths, size):
    """Cuts each length [n] into sections of `size`, the last one maybe shorter. Returns owner (the
    length it is of), offset in it, and length of each section: 3 × [sections]."""
    counts = -(-lengths // size)
    owner = np.repeat(np.arange(len(lengths)), counts)
    offset = ranges(np.zeros_like(counts), counts) * size
    return owner, offset, np.minimum(lengths[owner] - offset, size)


def to_device(arrays, device) -> list:
    """Integer arrays of the host as int64 tensors there, in one copy that nobody waits for. Each
    begins where 16 bytes divide: the kernel is compiled for such pointers."""
    sizes = np.array([array.size + array.size % 2 for array in arrays])
    flat = torch.zeros(sizes.sum(), dtype=torch.int64, pin_memory=is_cuda(device))
    for first, array in zip(starts(sizes), arrays):
        flat.numpy()[first : first + array.size] = array.ravel()
    parts = flat.to(device, non_blocking=True).split(sizes.tolist())
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays)]


def is_cuda(device) -> bool:
    return torch.device(device).type == "cuda"


# ── what is to be done ───────────────────────────────────────────────────────────────────────────


class QueryRows(NamedTuple):
    """An entry is a query row. By reader, one's by position."""
    reader: Column  # 0 to R − 1: rows of one reader read the same spans
    row: Column  # of q
    position: Column

    @classmethod
    def of_runs(cls, reader, first_row, rows, position):
        """Each of n runs is so many rows of a reader, consecutive in q and in position."""
        return cls(
            np.repeat(reader, rows), ranges(first_row, rows), ranges(position, rows)
        )


class KVSpans(NamedTuple):
    """An entry is a span that a reader reads: rows of k and v, which follow each other as their
    positions do. Positions of a reader's spans do not overlap; a row of k has the same position for
    all readers."""
    reader: Column
    first_row: Column  # of k and v
    length: Column
    position: Column  # of the first row


class Tiles(NamedTuple):
    """An entry is a tile: rows of k and v that a group reads, TILE at most once they are cut. By
    group, then position."""
    group: Column
    first_row: Column  # of k and v
    length: Column
    position: Column  # of the first row


class Members(NamedTuple):
    """An entry is a query row as a member of a group. By group, then reader, then position."""
    group: Column
    result: Column  # its index in QueryRows
    row: Column  # of q
    position: Column


class Blocks(NamedTuple):
    """An entry is a block: as many members of a group as a program takes. By group."""
    first_member: Column
    rows: Column  # how many members
    first_tile: Column  # what they see lies in tiles from here on,
    end_tile: Column  # up to the one before this


class Pieces(NamedTuple):
    """An entry is a piece: a block over some of its tiles, work for a program."""
    first_member: Column
    rows: Column  # how many members
    first_tile: Column
    end_tile: Column  # the one behind its last
    partial: Column  # number of the partial row that its first member gives


# ── groups: what is read once for all who want it ────────────────────────────────────────────────


def saves_bytes(readers, rows, tokens, max_rows, partial_tokens):
    """Whether sets of readers, with so many rows and tokens that they all read, read them once.

    Each reader would have a block of its own; together they fill fewer. It costs each row a partial
    more, which weighs like reading `partial_tokens` tokens, and a piece, for which MIN_PIECE_TILES
    are the least that pays."""
    reads_saved = readers - -(-rows // max_rows)
    return reads_saved * tokens > rows * partial_tokens + MIN_PIECE_TILES * TILE


def can_be_shared(rows, spans, max_rows):
    """[spans] what a reader can read with others: all of its rows see all of it. One with rows for
    a whole block would gain little by it, and pay for each of them."""
    num_rows = np.bincount(rows.reader)
    first_position = rows.position[starts(num_rows)]
    seen = spans.position + spans.length - 1 <= first_position[spans.reader]
    return seen & (num_rows < max_rows)[spans.reader]


def number_alike(table):
    """Numbers the rows of a bool table so that equal rows have one number: [rows]; and an example
    of each: [numbers]."""
    first_of = {}
    rows = enumerate(np.packbits(table, 1))
    first = [first_of.setdefault(bits.tobytes(), row) for row, bits in rows]
    example, number = np.unique(np.array(first, np.int64), return_inverse=True)
    return number, example


def find_sets(spans, shareable, R):
    """The sets of readers that read the same: [sets, R] whether a reader is in it; [spans] the set
    that reads the span of an entry, −1: its reader reads it alone; [spans] whether the entry is the
    first of a span that a set reads. shareable: [spans] bool."""
    candidate = np.flatnonzero(shareable)
    # Spans that begin in one row are the same if their length is, too.
    key = spans.first_row * (spans.length.max(initial=0) + 1) + spans.length
    _, span, num_readers = np.unique(
        key[candidate], return_inverse=True, return_counts=True
    )
    entry = candidate[num_readers[span] > 1]
    _, first, span = np.unique(key[entry], return_index=True, return_inverse=True)
    reads = np.zeros((len(first), R), bool)
    reads[span, spans.reader[entry]] = True
    set_of_span, example = number_alike(reads)
    set_of_entry = np.full(len(shareable), -1)
    set_of_entry[entry] = set_of_span[span]
    is_first = np.zeros(len(shareable), bool)
    is_first[entry[first]] = True
    return reads[example], set_of_entry, is_first


def form_groups(rows, spans, max_rows, partial_tokens, share):
    """→ Members of the groups, and what they read, in stretches that are not cut yet (Tiles). The
    first R groups are a reader each, with what it reads alone. The others are sets of readers."""
    num_rows = np.bincount(rows.reader)
    R = len(num_rows)
    shareable = can_be_shared(rows, spans, max_rows) & share
    readers, set_of_entry, is_first = find_sets(spans, shareable, R)
    once = np.flatnonzero(is_first)
    tokens = np.bincount(set_of_entry[once], spans.length[once], len(readers))
    set_rows = readers @ num_rows
    pays = saves_bytes(readers.sum(1), set_rows, tokens, max_rows, partial_tokens)
    group_of_set = R - 1 + np.cumsum(pays)
    # A span that a group reads has one entry, in place of one for each of its readers.
    shared = np.flatnonzero(set_of_entry >= 0)
    shared = shared[pays[set_of_entry[shared]]]
    group = spans.reader.copy()
    group[shared] = group_of_set[set_of_entry[shared]]
    kept = np.ones(len(group), bool)
    kept[shared] = is_first[shared]
    stretches = select(Tiles(group, *spans[1:]), kept)
    stretches = select(stretches, np.lexsort((stretches.position, stretches.group)))
    readers = np.concatenate((np.eye(R, dtype=bool), readers[pays]))
    return list_members(rows, num_rows, readers), stretches


def list_members(rows, num_rows, readers) -> Members:
    """All rows of the readers of each group; readers [groups, R] bool."""
    group, reader = np.nonzero(readers)
    result = ranges(starts(num_rows)[reader], num_rows[reader])
    group = np.repeat(group, num_rows[reader])
    return Members(group, result, rows.row[result], rows.position[result])


# ── tiles, blocks and pieces: what fits the hardware ─────────────────────────────────────────────


def cut_tiles(stretches) -> Tiles:
    """Stretches that are adjacent, in the slab and in position, are joined; then all are cut."""
    group, first_row, length, position = stretches
    goes_on = group[1:] == group[:-1]
    goes_on &= first_row[1:] == (first_row + length)[:-1]
    goes_on &= position[1:] == (position + length)[:-1]
    begins = np.flatnonzero(np.append(True, ~goes_on)[: len(group)])
    stretch, offset, length = split_lengths(np.add.reduceat(length, begins), TILE)
    begins = begins[stretch]
    return Tiles(
        group[begins], first_row[begins] + offset, length, position[begins] + offset
    )


def cut_blocks(members, tiles, max_rows) -> Blocks:
    """Blocks of at most so many rows, and the tiles up to the last that a row of theirs sees: a
    group's tiles are by position, and no row of a block sees more than its last one (those of
    several readers see all). Blocks that see nothing are left out."""
    num_members = np.bincount(members.group)
    group, offset, rows = split_lengths(num_members, max_rows)
    first_member = starts(num_members)[group] + offset
    last_position = members.position[first_member + rows - 1]
    end_of_group = 1 + max(members.position.max(initial=0), tiles.position.max(initial=0))
    place = tiles.group * end_of_group + tiles.position
    first_tile = np.searchsorted(tiles.group, group)
    end_tile = np.searchsorted(place, group * end_of_group + last_position, side="right")
    blocks = Blocks(first_member, rows, first_tile, end_tile)
    return select(blocks, end_tile > first_tile)


def cut_pieces(blocks, wanted_pieces) -> Pieces:
    """Pieces, about as many as are wanted where long blocks can be cut. Those of a block follow
    each other."""
    num_tiles = blocks.end_tile - blocks.first_tile
    max_tiles = max(MIN_PIECE_TILES, -(-int(num_tiles.sum()) // wanted_pieces))
    block, offset, length = split_lengths(num_tiles, max_tiles)
    first_member, rows, first_tile, _ = select(blocks, block)
    first_tile = first_tile + offset
    return Pieces(first_member, rows, first_tile, first_tile + length, starts(rows))


def partials_of_rows(members, pieces, num_rows) -> Column:
    """The partial rows that `merge` is to join for each query row: [P, the most that one has], −1
    where it has fewer; [0, 0] if each has just the one of its own number."""
    member = ranges(pieces.first_member, pieces.rows)
    result = members.result[member]  # [partial rows]
    if np.array_equal(result, np.arange(num_rows)):
        return np.zeros((0, 0), np.int64)
    count = np.bincount(result, minlength=num_rows)
    order = np.argsort(result, kind="stable")
    row, number, _ = split_lengths(count, 1)
    parts = np.full((num_rows, count.max(initial=0)), -1, np.int64)
    parts[row, number] = order
    return parts


class Launch(NamedTuple):
    """Pieces for programs of so many lanes. One launch of the kernel does them."""
    lanes: int
    pieces: torch.Tensor  # [pieces, 5] the columns of Pieces


class Batch(NamedTuple):
    """b pieces padded to m query rows and n KV rows, for PyTorch. Their rows are gathered a head at
    a time: row r of head h of q is row r · H + h of its [T · H, D], and so on. Padding repeats the
    first row of its own piece: another's might be NaN, and 0 × NaN is NaN."""
    query_rows: torch.Tensor  # [Hkv · b, G · m] of q's [T · H, D]
    # [Hkv · b, n] of the slab's [slab rows · Hkv, D]; or a stretch of the slab as a slice.
    kv_rows: torch.Tensor | slice
    # [Hkv · b, G · m] of o's [(P + 1) · H, D]: row P is for what padding gives.
    partial_rows: torch.Tensor
    # [b, 1, m, n] what a query row does not see, the same for all heads; None: it sees all.
    hidden: torch.Tensor | None


class Work:
    """What `partial_attention` is to do: made on the host in each iteration, used by every layer.

    A row sees the keys of its reader's spans at positions up to its own, and has one result;
    without keys it is empty. Pieces write *partial rows*: one for each row, or more where a row
    reads in groups or a block was cut; then `parts` says how they are merged. rows: QueryRows,
    spans: KVSpans, in the orders that these say (they are not checked). num_heads, num_kv_heads and
    dtype: of q and the slabs. wanted_pieces: about how many, if long blocks can be cut.
    share=False: each reader reads for itself. max_lanes: of a program."""
    def __init__(
        self,
        rows,
        spans,
        num_heads,
        num_kv_heads,
        dtype=torch.float32,
        device="cpu",
        wanted_pieces=1,
        share=True,
        max_lanes=MAX_LANES,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.heads_per_kv = num_heads // num_kv_heads
        max_rows = rows_of_a_block(self.heads_per_kv, max_lanes)
        # A partial row has H·D values in float32 at least, which are written and read again; a
        # token 2·Hkv·D in `dtype`.
        wide = torch.promote_types(dtype, torch.float32)
        partial_tokens = self.heads_per_kv * wide.itemsize / dtype.itemsize
        members, stretches = form_groups(rows, spans, max_rows, partial_tokens, share)
        tiles = cut_tiles(stretches)
        blocks = cut_blocks(members, tiles, max_rows)
        pieces = cut_pieces(blocks, wanted_pieces)
        self.num_results = len(rows.row)
        parts = partials_of_rows(members, pieces, self.num_results)
        self.num_partials = int(pieces.rows.sum())
        self._host = members, pieces, tiles
        # The kernel loads a tile ahead: there is an empty one behind the last.
        tile_rows = np.append(np.stack(tiles, 1), np.zeros((1, len(tiles)), np.int64), 0)
        lanes, by_lanes = zip(*self._split_by_lanes(pieces))
        self.members, self.tiles, self.parts, *on_device = to_device(
            [np.stack(members, 1), tile_rows, parts, *by_lanes], device
        )
        self.launches = list(map(Launch, lanes, on_device))

    def _split_by_lanes(self, pieces):
        """Pieces with few rows have a launch of their own: in a program with more lanes these would
        idle. Lanes are a power of two, with room for all heads of a row."""
        lanes = pieces.rows * self.heads_per_kv
        most = next_power_of_2(max(MIN_LANES, int(lanes.max(initial=0))))
        few = lanes <= MIN_LANES
        for lanes, chosen in (MIN_LANES, few), (most, ~few):
            yield lanes, np.stack(select(pieces, chosen), 1)

    @cached_property
    def batches(self) -> list[Batch]:
        """The same work for PyTorch, in batches: each is one matmul."""
        _, pieces, tiles = self._host
        keys_before = np.concatenate(([0], np.cumsum(tiles.length)))
        first_key = keys_before[pieces.first_tile]
        num_keys = keys_before[pieces.end_tile] - first_key
        return [
            self._batch(chosen, first_key[chosen], num_keys[chosen])
            for chosen in self._alike(num_keys)
        ]

    @cached_property
    def _keys(self):
        """[keys] slab row and position of each key of the tiles, one tile after another."""
        _, _, tiles = self._host
        return ranges(tiles.first_row, tiles.length), ranges(tiles.position, tiles.length)

    def _alike(self, num_keys):
        """Yields pieces [b, 1] that make a batch: of like size, between the same powers of two, and
        with so few keys that the cache holds them. A long stretch of the slab is one by itself: it
        need not be gathered."""
        _, pieces, tiles = self._host
        end = tiles.first_row + tiles.length
        stretch = np.cumsum(np.append(0, tiles.first_row[1:] != end[:-1]))
        is_stretch = stretch[pieces.first_tile] == stretch[pieces.end_tile - 1]
        is_view = is_stretch & (num_keys >= MIN_VIEW_KEYS)
        alike = {}
        sizes = zip(pieces.rows.tolist(), num_keys.tolist(), is_view.tolist())
        for piece, (m, n, alone) in enumerate(sizes):
            size = (m - 1).bit_length(), (n - 1).bit_length(), piece if alone else -1
            alike.setdefault(size, []).append(piece)
        for (_, bits, _), same in sorted(alike.items()):
            most = max(1, MAX_BATCH_KEYS >> bits)
            for start in range(0, len(same), most):
                yield np.array(same[start : start + most])[:, None]

    def _batch(self, chosen, first_key, num_keys) -> Batch:
        """Of the chosen pieces, with their keys, which count through the tiles; all [b, 1]."""
        members, pieces, _ = self._host
        _, rows, _, _, partial = select(pieces, chosen)
        row = np.arange(rows.max())
        is_row = row < rows
        member = pieces.first_member[chosen] + row * is_row
        number = np.arange(num_keys.max())
        is_key = number < num_keys
        key = first_key + number * is_key
        kv_rows, kv_position = (column[key] for column in self._keys)
        kv_position = np.where(is_key, kv_position, AFTER_ALL)
        hidden = kv_position[:, None, None] > members.position[member][:, None, :, None]
        partial_row = np.where(is_row, partial + row, self.num_partials)
        arrays = [
            self._by_head(members.row[member], self.num_heads),
            self._by_head(kv_rows, self.num_kv_heads),
            self._by_head(partial_row, self.num_heads),
            hidden,
        ]
        batch = Batch(*(torch.from_numpy(x).to(self.tiles.device) for x in arrays))
        if not hidden.any():
            batch = batch._replace(hidden=None)
        if len(kv_rows) == 1 and (np.diff(kv_rows[0]) == 1).all():
            batch = batch._replace(kv_rows=slice(kv_rows[0, 0], kv_rows[0, -1] + 1))
        return batch

    def _by_head(self, rows, num_heads):
        """Rows [b, m] of something with so many heads → [Hkv · b, heads of a KV head · m] rows of a
        head each."""
        b, _ = rows.shape
        head = np.arange(num_heads).reshape(self.num_kv_heads, 1, -1, 1)
        return (rows[:, None] * num_heads + head).reshape(self.num_kv_heads * b, -1)


def rows_of_a_block(heads_per_kv, max_lanes) -> int:
    """At most; one row has all its lanes, even if these are more."""
    return max(1, max_lanes // heads_per_kv)


def next_power_of_2(n) -> int:
    return 1 << (n - 1).bit_length()


def check_grid(x, y=1):
    """Raises ValueError for more programs than CUDA launches at once."""
    if x >= 2**31 or y >= 2**16:
        raise ValueError(f"{x:,} × {y:,} programs, a GPU takes 2**31 - 1 × 65,535")


# ── partial attention ────────────────────────────────────────────────────────────────────────────


def suits_triton(x) -> bool:
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def partial_attention(q, k, v, work, scale, backend: str = "auto"):
    """Attention of query rows over spans of a slab, and its log-sum-exp (natural log).

    q [T, H, D], k and v [slab rows, Hkv, D] → o [rows, H, D], lse [rows, H] for the rows of work,
    in float32 (float64 for float64 input). Every result is written; without a visible key it is
    o = 0, lse = −inf. What lies in slab rows outside the spans is never used, NaN included (one
    inside a reader's spans may reach all of its rows). backend `auto`: Triton on a GPU, but for
    float64 and for heads over 512 bytes, of which shared memory does not hold two tiles."""
    use_triton = backend == "triton"
    if backend == "auto":
        use_triton = suits_triton(q) and q.shape[-1] * q.element_size() <= 512
    attend = _attend_with_triton if use_triton else _attend_with_torch
    o, lse = attend(q, k, v, work, scale)
    if not len(work.parts):
        return o, lse
    return merge(o, lse, work.parts, backend)


def _attend_with_triton(q, k, v, work, scale):
    _, H, D = q.shape
    Hkv = k.shape[1]
    o = torch.empty(work.num_partials, H, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(work.num_partials, H, dtype=torch.float32, device=q.device)
    for lanes, pieces in work.launches:
        if not len(pieces):
            continue
        check_grid(len(pieces), Hkv)
        config = attention_config(lanes, H, Hkv, D, k.element_size())
        _partial_attention_kernel[len(pieces), Hkv](
            q.contiguous(),
            k,
            v,
            work.members,
            pieces,
            work.tiles,
            o,
            lse,
            scale,
            **config,
        )
    return o, lse


def _attend_with_torch(q, k, v, work, scale):
    """A batch of padded pieces at a time, in float32 at least."""
    _, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    query = (q.to(wide) * scale).view(-1, D)
    # One row more than there are, for what padding gives.
    o = query.new_empty(work.num_partials + 1, H, D)
    lse = query.new_empty(work.num_partials + 1, H)
    for batch in work.batches:
        rows = batch.partial_rows.flatten()
        batch_o, batch_lse = _attend_batch(query, k, v, batch)
        o.view(-1, D).index_copy_(0, rows, batch_o.view(-1, D))
        lse.view(-1).index_copy_(0, rows, batch_lse.flatten())
    return o[:-1], lse[:-1]


def _attend_batch(query, k, v, batch):
    """→ o [Hkv · b, G · m, D], lse [Hkv · b, G · m, 1] of a padded batch; query [T · H, D] is
    scaled."""
    _, Hkv, D = k.shape

    def read(slab):  # [slab rows, Hkv, D] → [Hkv · b, n, D]
        if isinstance(batch.kv_rows, slice):
            return slab[batch.kv_rows].transpose(0, 1).to(query.dtype)
        return gather(slab.view(-1, D), batch.kv_rows).to(query.dtype)

    s = gather(query, batch.query_rows) @ read(k).mT  # [Hkv · b, G · m, n]
    if batch.hidden is not None:
        b, _, m, n = batch.hidden.shape
        s.view(Hkv, b, -1, m, n).masked_fill_(batch.hidden, -math.inf)
    # A row that sees nothing has a maximum of −inf, and p = 0.
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top.clamp(min=torch.finfo(s.dtype).min)).exp_()
    # At least 1 with a visible key, as the maximum gives 1. Without one it is 0.
    total = p.sum(-1, keepdim=True)
    return (p @ read(v)).div_(total.clamp(min=1)), top + total.log()


def gather(x, rows):
    """Rows of x [n, D] by a table of their numbers [i, j] → [i, j, D]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, -1)


# ── merge ────────────────────────────────────────────────────────────────────────────────────────


def merge(o, lse, parts, backend: str = "auto"):
    """Joins the parts of each row in one pass (pairwise merging rounds more often).

    o [P, H, D], lse [P, H], parts [rows, max_parts], −1 where a row has fewer parts → o
    [rows, H, D], lse [rows, H], of the input's type. o is not read where its lse is −inf. Rows
    whose parts are all empty, or that have none, come out empty: o = 0, lse = −inf."""
    if backend == "triton" or backend == "auto" and suits_triton(o):
        return _merge_with_triton(o, lse, parts)
    return _merge_with_torch(o, lse, parts)


def _merge_with_triton(o, lse, parts):
    rows, max_parts = parts.shape
    _, H, D = o.shape
    out = o.new_empty(rows, H, D)
    out_lse = lse.new_empty(rows, H)
    if rows:
        check_grid(rows)
        _merge_kernel[rows,](
            o.contiguous(),
            lse.contiguous(),
            parts.contiguous(),
            out,
            out_lse,
            max_parts,
            H=H,
            D=D,
            HPAD=next_power_of_2(H),
            DPAD=next_power_of_2(D),
        )
    return out, out_lse


def _merge_with_torch(o, lse, parts):
    rows, max_parts = parts.shape
    num_partials, H, D = o.shape
    if not num_partials or not max_parts:
        return o.new_zeros(rows, H, D), lse.new_full((rows, H), -math.inf)
    index = parts.clamp(min=0).long()
    absent = (parts < 0)[:, :, None]
    part_lse = lse[index].masked_fill(absent, -math.inf)  # [rows, max_parts, H]
    top = part_lse.amax(1, keepdim=True)
    weight = torch.exp(part_lse - torch.where(top == -math.inf, 0, top))
    total = weight.sum(1)  # [rows, H]; 0 without a part, else 1 at least
    part_o = o[index].masked_fill((part_lse == -math.inf)[..., None], 0)
    out = (weight[..., None] * part_o).sum(1) / total.clamp(min=1)[..., None]
    return out, top[:, 0] + total.log()


def warm_up(num_heads, num_kv_heads, head_dim, dtype, device):
    """Compiles all that can be launched for such heads: else a request waits for it, for seconds.
    Attention has a variant for each number of lanes, merge has one."""
    rows = 1
    q = torch.zeros(MAX_LANES, num_heads, head_dim, dtype=dtype, device=device)
    kv = torch.zeros(MIN_LANES, num_kv_heads, head_dim, dtype=dtype, device=device)
    while rows <= rows_of_a_block(num_heads // num_kv_heads, MAX_LANES):
        number = np.arange(rows)
        work = Work(
            QueryRows(0 * number, number, number),
            KVSpans(*np.array([[0], [0], [1], [0]])),
            num_heads,
            num_kv_heads,
            dtype,
            device,
        )
        o, lse = partial_attention(q, kv, kv, work, 1.0)
        rows *= 2
    merge(o, lse, torch.zeros(1, 2, dtype=torch.int64, device=device))


# ── the kernels ──────────────────────────────────────────────────────────────────────────────────


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    LN2 = tl.constexpr(0.6931471805599453)

    def _column(table, name):
        """A column of a table, by the name that the host has for it."""
        return tl.constexpr(table._fields.index(name))

    TILE_COLUMNS = tl.constexpr(len(Tiles._fields))
    TILE_FIRST_ROW = _column(Tiles, "first_row")
    TILE_LENGTH = _column(Tiles, "length")
    TILE_POSITION = _column(Tiles, "position")
    MEMBER_COLUMNS = tl.constexpr(len(Members._fields))
    MEMBER_ROW = _column(Members, "row")
    MEMBER_POSITION = _column(Members, "position")
    PIECE_COLUMNS = tl.constexpr(len(Pieces._fields))
    PIECE_FIRST_MEMBER = _column(Pieces, "first_member")
    PIECE_ROWS = _column(Pieces, "rows")
    PIECE_FIRST_TILE = _column(Pieces, "first_tile")
    PIECE_END_TILE = _column(Pieces, "end_tile")
    PIECE_PARTIAL = _column(Pieces, "partial")

    @triton.jit
    def _load_tile(Tiles, t):
        """First slab row, length and position of a tile."""
        tile = Tiles + t * TILE_COLUMNS
        first_row = tl.load(tile + TILE_FIRST_ROW)
        length = tl.load(tile + TILE_LENGTH)
        return first_row, length, tl.load(tile + TILE_POSITION)

    @triton.jit
    def _load_rows(X, at, mask, UPCAST: tl.constexpr):
        x = tl.load(X + at, mask=mask, other=0.0)
        if UPCAST:  # the interpreter has no 16-bit arithmetic
            x = x.to(tl.float32)
        return x

    @triton.jit
    def _add_tile(s, v, top, total, acc):
        """Softmax, a tile at a time: sums so far shrink by what the maximum has grown. Scores are
        in powers of two: exp2 is the hardware's instruction."""
        new_top = tl.maximum(top, tl.max(s, 1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(p, 1)
        pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        return new_top, total, acc * shrink[:, None] + pv

    @triton.jit
    def _partial_attention_kernel(
        Q,
        K,
        V,
        Members,
        Pieces,
        Tiles,
        O,
        LSE,
        scale,
        H: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
        DPAD: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """One program: a piece × one KV head. Its M lanes are (row, query head of that KV head)."""
        G: tl.constexpr = H // HKV
        piece = Pieces + tl.program_id(0) * PIECE_COLUMNS
        head = tl.program_id(1)
        lane = tl.arange(0, M)
        n = tl.arange(0, N)
        d = tl.arange(0, DPAD)[None, :]
        row = lane // G
        query_head = head * G + lane % G
        is_row = row < tl.load(piece + PIECE_ROWS)
        q_mask = is_row[:, None] & (d < D)
        member = Members + (tl.load(piece + PIECE_FIRST_MEMBER) + row) * MEMBER_COLUMNS
        position = tl.load(member + MEMBER_POSITION, mask=is_row, other=0)
        # int64, as all offsets: slabs are long.
        q_row = tl.load(member + MEMBER_ROW, mask=is_row, other=0)
        q_at = (q_row * H + query_head)[:, None] * D + d
        q = _load_rows(Q, q_at, q_mask, UPCAST)
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DPAD], tl.float32)
        first_tile = tl.load(piece + PIECE_FIRST_TILE)
        kv_first, length, kv_position = _load_tile(Tiles, first_tile)
        for t in range(first_tile, tl.load(piece + PIECE_END_TILE)):
            kv_at = ((kv_first + n) * HKV + head)[:, None] * D + d
            kv_mask = (n < length)[:, None] & (d < D)  # of V, too: 0 × NaN is NaN
            k = _load_rows(K, kv_at, kv_mask, UPCAST)
            v = _load_rows(V, kv_at, kv_mask, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            # As int32: counts of keys of this tile that a row sees.
            visible = tl.minimum(position + 1 - kv_position, length).to(tl.int32)
            s = tl.where(n[None, :] < visible[:, None], s, -float("inf"))
            top, total, acc = _add_tile(s, v, top, total, acc)
            # A tile ahead: addresses that wait for a load would cost K and V half their stages.
            kv_first, length, kv_position = _load_tile(Tiles, t + 1)
        divisor = tl.where(total == 0.0, 1.0, total)
        o = acc / divisor[:, None]
        lse = (top + tl.log2(divisor)) * LN2  # an empty part: top is −inf, and so is this
        out = (tl.load(piece + PIECE_PARTIAL) + row) * H + query_head
        tl.store(O + (out[:, None] * D + d), o, mask=q_mask)
        tl.store(LSE + out, lse, mask=is_row)

    @triton.jit(do_not_specialize=["max_parts"])
    def _merge_kernel(
        O,
        LSE,
        Parts,
        Out,
        OutLSE,
        max_parts,
        H: tl.constexpr,
        D: tl.constexpr,
        HPAD: tl.constexpr,
        DPAD: tl.constexpr,
    ):
        """One program: one row, all heads. The textbook's weighted mean, with a running maximum."""
        row = tl.program_id(0).to(tl.int64)
        h = tl.arange(0, HPAD)
        d = tl.arange(0, DPAD)
        is_head = h < H
        mask = is_head[:, None] & (d < D)[None, :]
        top = tl.full([HPAD], -float("inf"), tl.float32)
        total = tl.zeros([HPAD], tl.float32)
        acc = tl.zeros([HPAD, DPAD], tl.float32)
        for i in range(max_parts):
            part = tl.load(Parts + row * max_parts + i).to(tl.int64)
            lse = tl.load(
                LSE + (tl.maximum(part, 0) * H + h), mask=is_head, other=-float("inf")
            )
            lse = tl.where(part >= 0, lse, -float("inf"))
            full = lse > -float("inf")  # o of an empty part may be anything
            o = tl.load(
                O + ((part * H + h)[:, None] * D + d[None, :]),
                mask=mask & full[:, None],
                other=0.0,
            ).to(tl.float32)
            new_top = tl.maximum(top, lse)
            safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            weight = tl.exp(lse - safe_top)
            shrink = tl.exp(top - safe_top)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + o * weight[:, None]
            top = new_top
        divisor = tl.where(total == 0.0, 1.0, total)
        out = acc / divisor[:, None]
        lse = top + tl.log(divisor)
        tl.store(Out + ((row * H + h)[:, None] * D + d[None, :]), out, mask=mask)
        tl.store(OutLSE + (row * H + h), lse, mask=is_head)


def attention_config(lanes, heads, kv_heads, head_dim, itemsize) -> dict:
    """Compile-time arguments and launch options of `_partial_attention_kernel`: 16 lanes are
    decode, more are prefill. Of s stages, s − 1 tiles of K and V lie in shared memory (one more
    where wgmma reads them), besides the lanes' q and p: an A100 has 163 KB, an H100 227."""
    width = max(16, next_power_of_2(head_dim))
    room = 163 * 1024 - lanes * (width + TILE) * itemsize
    tiles_in_room = max(1, room // (2 * TILE * width * itemsize))
    return dict(
        H=heads,
        HKV=kv_heads,
        D=head_dim,
        M=lanes,
        N=TILE,
        DPAD=width,
        UPCAST=os.environ.get("TRITON_INTERPRET") == "1",
        num_stages=min(3, 1 + tiles_in_room),
        num_warps=8 if lanes > MIN_LANES else 4,
    )


if __name__ == "__main__":  # a check and a small benchmark, on whatever device there is
    import sys

    benchmark = os.path.dirname(os.path.abspath(__file__)) + "/bench/kernel_speed.py"
    os.execv(sys.executable, [sys.executable, benchmark, "--small", *sys.argv[1:]])
