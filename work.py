"""Who reads which keys, and in which programs? The attention of an iteration, as tables (numpy).

What is to be done is said by two: query rows by *reader* (rows that read the same spans), and spans
of KV by reader. Many readers may read the same spans, mostly a prefix that they share. Where it
pays, it is read once for all of them, as a *group*: so a row's attention is that of its own reader
merged with those of its groups.

    QueryRows ─┐ ┌─▶ members: rows by group ──▶ blocks: as many rows as a program takes ─┐
               ├─┤                                                                       ├─▶ pieces
    KVSpans ───┘ └─▶ stretches by group ──────▶ tiles: at most 64 rows of one stretch ───┘

A piece is a block over some of its tiles: a program takes a piece and a KV head. Long blocks are
cut into several, evenly: so a few of them keep a GPU busy. A piece has an *output* for each of its
rows; kernels.py says where it goes.

Notation: T rows · H query heads · Hkv KV heads · G = H / Hkv · R readers.
"""

import os
import sys
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch

TILE = 64  # KV rows of a tile, at most
# What a piece costs besides its tiles, in tiles. The longest block is not cut below that.
PIECE_COST = 4
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
    counts = np.asarray(counts, np.int64)
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + (np.asarray(first, np.int64) - ends + counts).repeat(counts)


def starts(lengths):
    """Where each of consecutive stretches begins: [n] → [n]."""
    return lengths.cumsum() - lengths


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


def cut_evenly(lengths, counts):
    """Cuts each length [n] into so many sections, which differ by 1 at most. Returns owner (the
    length it is of), offset in it, and length of each section: 3 × [sections]."""
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = ranges(np.zeros_like(counts), counts)
    offset = number * lengths[owner] // counts[owner]
    end = (number + 1) * lengths[owner] // counts[owner]
    return owner, offset, end - offset


def to_device(arrays, device) -> list:
    """Integer arrays of the host as int64 tensors there, in one copy that nobody waits for. Each
    begins where 16 bytes divide: the kernel is compiled for such pointers."""
    sizes = np.array([array.size + array.size % 2 for array in arrays])
    flat = torch.zeros(sizes.sum(), dtype=torch.int64, pin_memory=is_cuda(device))
    for first, array in zip(starts(sizes), arrays):
        flat.numpy()[first : first + array.size] = array.ravel()
    parts = flat.to(device, non_blocking=True).split(sizes.tolist())
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays)]


def tables_to_device(tables, device) -> list:
    """The same for tables (NamedTuples of arrays): the same tables, of tensors."""
    tensors = iter(to_device([*chain.from_iterable(tables)], device))
    return [type(table)(*islice(tensors, len(table))) for table in tables]


def is_cuda(device) -> bool:
    return torch.device(device).type == "cuda"


# ── what is to be done ───────────────────────────────────────────────────────────────────────────


class AtOnce(NamedTuple):
    """How many run at once on a device: programs; or pieces, each of which is a program for each KV
    head. One at a time, as on a CPU, gains nothing by cuts."""
    few_lanes: int = 1
    many_lanes: int = 1


class QueryRows(NamedTuple):
    """An entry is a query row. By reader, one's by position."""
    reader: Column  # 0 to R − 1: rows of one reader read the same spans
    row: Column  # of q, and of the results
    position: Column

    @classmethod
    def of_runs(cls, reader, first_row, rows, position):
        """Each of n runs is so many rows of a reader, consecutive in q and in position."""
        return cls(
            np.repeat(reader, rows), ranges(first_row, rows), ranges(position, rows)
        )


class KVSpans(NamedTuple):
    """An entry is a span that a reader reads: slab rows, which follow each other as their positions
    do. Positions of a reader's spans do not overlap; a slab row has the same position for all
    readers."""
    reader: Column
    first_row: Column  # of the slab
    length: Column
    position: Column  # of the first row


class Tiles(NamedTuple):
    """An entry is a tile: slab rows that a group reads; at most TILE each, once they are cut. By
    group, then position."""
    group: Column
    first_row: Column  # of the slab
    length: Column
    position: Column  # of the first row


class Members(NamedTuple):
    """An entry is a query row as a member of a group. By group, then reader, then position."""
    group: Column
    row: Column  # of q
    position: Column


class Blocks(NamedTuple):
    """An entry is a block: as many members of a group as a program takes. By group."""
    first_member: Column
    rows: Column  # how many members
    first_tile: Column  # what they see lies in tiles from here on,
    end_tile: Column  # up to the one before this
    # All tiles before this one are whole, and all of the rows see all of them.
    first_masked: Column


class Pieces(NamedTuple):
    """An entry is a piece: a block over some of its tiles, work for a program."""
    first_member: Column
    rows: Column  # how many members
    first_tile: Column
    end_tile: Column  # the one behind its last
    first_masked: Column  # from here on tiles are masked
    first_output: Column  # index of what its first member gives in `WorkTables.numbers`


# ── groups: what is read once for all who want it ────────────────────────────────────────────────


def saves_bytes(readers, rows, tokens, max_rows, partial_tokens):
    """Whether to read the tokens that sets of readers share once for all rows of a set.

    Alone, each reader has a block; together, they fill fewer. In return each row has a partial row
    more, which weighs like reading `partial_tokens` tokens, and there is one more piece."""
    reads_saved = readers - -(-rows // max_rows)
    return reads_saved * tokens > rows * partial_tokens + PIECE_COST * TILE


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
    set_of_entry = np.full(len(shareable), -1)
    is_first = np.zeros(len(shareable), bool)
    # Spans that begin in one row are the same if their length is, too.
    key = spans.first_row * (spans.length.max(initial=0) + 1) + spans.length
    _, span, num_readers = np.unique(
        key[candidate], return_inverse=True, return_counts=True
    )
    entry = candidate[num_readers[span] > 1]
    if not len(entry):
        return np.zeros((0, R), bool), set_of_entry, is_first
    _, first, span = np.unique(key[entry], return_index=True, return_inverse=True)
    reads = np.zeros((len(first), R), bool)
    reads[span, spans.reader[entry]] = True
    set_of_span, example = number_alike(reads)
    set_of_entry[entry] = set_of_span[span]
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
    number = ranges(starts(num_rows)[reader], num_rows[reader])
    group = np.repeat(group, num_rows[reader])
    return Members(group, rows.row[number], rows.position[number])


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
    end_of_group = 1 + max(members.position.max(initial=0), tiles.position.max(initial=0))
    place = tiles.group * end_of_group + tiles.position

    def tiles_before(position):
        return np.searchsorted(place, group * end_of_group + position)

    first_tile = np.searchsorted(tiles.group, group)
    end_tile = tiles_before(members.position[first_member + rows - 1] + 1)
    # A tile is masked for a row that does not see its end, and if it is short.
    seen_by_all = tiles_before(members.position[first_member] - TILE + 2)
    short = np.append(np.flatnonzero(tiles.length < TILE), len(tiles.length))
    first_short = short[np.searchsorted(short, first_tile)]
    first_masked = np.maximum(np.minimum(seen_by_all, first_short), first_tile)
    blocks = Blocks(first_member, rows, first_tile, end_tile, first_masked)
    return select(blocks, end_tile > first_tile)


def choose_piece_tiles(num_tiles, resident) -> int:
    """The most tiles of a piece, for blocks of so many. `resident` pieces run at once, and time
    goes by in waves of them: a last wave that is nearly empty takes as long as a full one."""
    longest = int(num_tiles.max(initial=1))
    if resident <= 1:
        return longest
    total = int(num_tiles.sum())
    # Cuts into so many waves gain nothing any more.
    most_cuts = min(longest // PIECE_COST, 4 * resident * longest // max(1, total) + 1)
    piece_tiles = -(-longest // np.arange(1, max(1, most_cuts) + 1))
    pieces = (-(-num_tiles // piece_tiles[:, None])).sum(1)
    longest_time = piece_tiles + PIECE_COST
    waves = -(-(total + pieces * PIECE_COST) // (resident * longest_time))
    return int(piece_tiles[np.argmin(waves * longest_time)])


def cut_pieces(blocks, has_many_lanes, resident) -> Pieces:
    """Pieces of blocks, those with few lanes first, of either the longest first: so the last to
    begin are short. Those of one block differ by a tile at most: of as many, the longest is then
    shortest. resident: AtOnce, of pieces."""
    num_tiles = blocks.end_tile - blocks.first_tile
    counts = np.zeros_like(num_tiles)
    for alike, at_once in (
        (~has_many_lanes, resident.few_lanes),
        (has_many_lanes, resident.many_lanes),
    ):
        counts[alike] = -(-num_tiles[alike] // choose_piece_tiles(num_tiles[alike], at_once))
    block, offset, length = cut_evenly(num_tiles, counts)
    order = np.lexsort((-length, has_many_lanes[block]))
    first_member, rows, first_tile, _, first_masked = select(blocks, block[order])
    first_tile = first_tile + offset[order]
    end_tile = first_tile + length[order]
    first_masked = np.clip(first_masked, first_tile, end_tile)
    return Pieces(first_member, rows, first_tile, end_tile, first_masked, starts(rows))


class Batch(NamedTuple):
    """b pieces padded to m query rows and n slab rows, for PyTorch. Their rows are gathered a head
    at a time: row r of head h of q is row r · H + h of its [T · H, D], and so on. Padding repeats
    the first row of its own piece: another's might be NaN, and 0 × NaN is NaN."""
    query_rows: torch.Tensor  # [Hkv · b, G · m] of q's [T · H, D]
    # [Hkv · b, n] keys, of the slab's [slab rows · 2 · Hkv, D] (a row's values lie Hkv behind its
    # keys); or a stretch of the slab as a slice.
    kv_rows: torch.Tensor | slice
    # [Hkv · b, G · m] of the outputs' [(T + P + 1) · H, D]: the last row is for what padding gives.
    target_rows: torch.Tensor
    # [b, 1, m, n] what a query row does not see, the same for all heads; None: it sees all.
    hidden: torch.Tensor | None


class WorkTables(NamedTuple):
    """What a kernel reads of a Work."""
    members: torch.Tensor  # [members, columns of Members]
    tiles: torch.Tensor  # [tiles + 1, columns of Tiles]
    numbers: torch.Tensor  # [outputs] which result or partial row each is: see kernels.Outputs
    few: torch.Tensor  # [pieces, columns of Pieces] with at most MIN_LANES lanes
    many: torch.Tensor  # and with more: in programs with more lanes the others' would idle


class Work:
    """What is to be done over one slab: made on the host in each iteration, used by every layer.

    A row sees the keys of its reader's spans at positions up to its own. Each piece gives an output
    for each of its rows, so a row has several if it reads in several groups, or its block was cut.
    It can be done once there are kernels.Outputs for it. rows: QueryRows, spans: KVSpans, in the
    orders that these say (they are not checked). num_heads, num_kv_heads and dtype: of q and the
    slab. resident: AtOnce, pieces: long blocks are cut for them. share=False: each reader reads for
    itself. max_lanes: of a program."""
    def __init__(
        self,
        rows,
        spans,
        num_heads,
        num_kv_heads,
        dtype=torch.float32,
        resident=AtOnce(),
        share=True,
        max_lanes=MAX_LANES,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.dtype = dtype
        heads_per_kv = num_heads // num_kv_heads
        max_rows = rows_of_a_block(heads_per_kv, max_lanes)
        # A partial row has H·D values in float32 at least, which are written and read again; a
        # token 2·Hkv·D in `dtype`.
        wide = torch.promote_types(dtype, torch.float32)
        partial_tokens = heads_per_kv * wide.itemsize / dtype.itemsize
        members, stretches = form_groups(rows, spans, max_rows, partial_tokens, share)
        tiles = cut_tiles(stretches)
        blocks = cut_blocks(members, tiles, max_rows)
        pieces = cut_pieces(blocks, blocks.rows * heads_per_kv > MIN_LANES, resident)
        self.members = members
        self.tiles = tiles
        self.pieces = pieces
        # Lanes are a power of two, with room for all heads of a row.
        lanes = pieces.rows * heads_per_kv
        self.num_few = int((lanes <= MIN_LANES).sum())
        self.many_lanes = next_power_of_2(max(MIN_LANES, int(lanes.max(initial=0))))
        # [outputs] the row of q of each.
        self.output_rows = members.row[ranges(pieces.first_member, pieces.rows)]

    def number_outputs(self, numbers, num_outputs) -> WorkTables:
        """numbers: [outputs] see WorkTables, of so many in all. → What is to be sent to the device,
        and to be kept as `tables`."""
        self.numbers = numbers
        self.for_padding = num_outputs
        pieces = np.stack(self.pieces, 1)
        # The kernel loads a tile ahead: there is an empty one behind the last.
        tiles = np.append(np.stack(self.tiles, 1), np.zeros((1, len(Tiles._fields)), np.int64), 0)
        few, many = np.split(pieces, [self.num_few])
        return WorkTables(np.stack(self.members, 1), tiles, numbers, few, many)

    @cached_property
    def batches(self) -> list[Batch]:
        """The same work for PyTorch, in batches: each is one matmul."""
        keys_before = np.concatenate(([0], np.cumsum(self.tiles.length)))
        first_key = keys_before[self.pieces.first_tile]
        num_keys = keys_before[self.pieces.end_tile] - first_key
        return [
            self._batch(chosen, first_key[chosen], num_keys[chosen])
            for chosen in self._alike(num_keys)
        ]

    @cached_property
    def _keys(self):
        """[keys] slab row and position of each key of the tiles, one tile after another."""
        tiles = self.tiles
        return ranges(tiles.first_row, tiles.length), ranges(tiles.position, tiles.length)

    def _alike(self, num_keys):
        """Yields pieces [b, 1] that make a batch: of like size, between the same powers of two, and
        with so few keys that the cache holds them. A long stretch of the slab is one by itself: it
        need not be gathered."""
        tiles = self.tiles
        pieces = self.pieces
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
        pieces = select(self.pieces, chosen)
        row = np.arange(pieces.rows.max())
        is_row = row < pieces.rows
        member = pieces.first_member + row * is_row
        number = np.arange(num_keys.max())
        is_key = number < num_keys
        key = first_key + number * is_key
        kv_rows, kv_position = (column[key] for column in self._keys)
        kv_position = np.where(is_key, kv_position, AFTER_ALL)
        hidden = is_hidden(self.members.position[member], kv_position)
        target = self.numbers[pieces.first_output + row * is_row]
        target = np.where(is_row, target, self.for_padding)
        arrays = [
            self._by_head(self.members.row[member], self.num_heads, self.num_heads),
            self._by_head(kv_rows, 2 * self.num_kv_heads, self.num_kv_heads),
            self._by_head(target, self.num_heads, self.num_heads),
            hidden,
        ]
        batch = Batch(*(torch.from_numpy(x).to(self.tables.members.device) for x in arrays))
        if not hidden.any():
            batch = batch._replace(hidden=None)
        if len(kv_rows) == 1 and (np.diff(kv_rows[0]) == 1).all():
            batch = batch._replace(kv_rows=slice(kv_rows[0, 0], kv_rows[0, -1] + 1))
        return batch

    def _by_head(self, rows, row_heads, heads):
        """Rows [b, m] of something with so many heads, of which the first `heads` are wanted →
        [Hkv · b, wanted heads of a KV head · m] rows of a head each."""
        b, _ = rows.shape
        head = np.arange(heads).reshape(self.num_kv_heads, 1, -1, 1)
        return (rows[:, None] * row_heads + head).reshape(self.num_kv_heads * b, -1)


def is_hidden(position, kv_position):
    """The causal rule: [b, 1, m, n] whether a query row, at its position [b, m], does not see a
    key, at its own [b, n]. (The same for all heads.)"""
    return kv_position[:, None, None] > position[:, None, :, None]


def rows_of_a_block(heads_per_kv, max_lanes) -> int:
    """At most; one row has all its lanes, even if these are more."""
    return max(1, max_lanes // heads_per_kv)


def next_power_of_2(n) -> int:
    return 1 << (n - 1).bit_length()


# ── the lesson, run ──────────────────────────────────────────────────────────────────────────────


def show_cuts():
    """The tables of three decodes that read a prefix of 192 tokens, and some of their own."""
    reader = np.arange(3)
    rows = QueryRows(reader, row=reader, position=np.array([211, 204, 231]))
    spans = KVSpans(
        reader=np.repeat(reader, 2),
        first_row=np.array([0, 256, 0, 320, 0, 384]),
        length=np.array([192, 20, 192, 13, 192, 40]),
        position=np.array([0, 192] * 3),
    )
    work = Work(rows, spans, num_heads=8, num_kv_heads=2)
    print("Three requests decode a row each behind a prefix of 192 tokens. Each is a reader.\n")
    show(
        spans,
        "spans: what each reader reads",
        "length rows of the slab from first_row on; position: of the first one, in the request",
    )
    show(
        work.members,
        "members: which rows of q are in which group",
        "groups 0 to 2: a reader each, with what it reads alone; group 3: those who share",
    )
    show(
        work.tiles,
        f"tiles: what a group reads, cut into {TILE} rows of the slab at most",
        "the other columns are those of spans",
    )
    show(
        work.pieces,
        "pieces: what a program takes of a group, once for each KV head",
        "its rows: members from first_member on. Its tiles: from first_tile up to the one before",
        "end_tile, with a mask from first_masked on. Its outputs, one a row: from first_output on",
    )
    alone = spans.length.sum()
    once = work.tiles.length.sum()
    outputs = len(work.output_rows) // 3
    print(f"{once} slab rows are read; {alone} if each reader read for itself.")
    print(f"Each row has {outputs} partial results, which kernels.py merges.")
    print("Next: balancer.py, who decides in which slots, and where, segments lie.")


def show(table, title, *columns):
    """A table, with a title and what its columns are."""
    print(title)
    for line in columns:
        print(f"  {line}")
    print("".join(f"{name:>14}" for name in table._fields))
    for entry in zip(*table):
        print("".join(f"{value:>14}" for value in entry))
    print()


def run_lesson(show, *arguments):
    """Runs the lesson at a module's end. A terminal may lack characters, and who reads the output
    may leave early, as `head` does."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        show(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_lesson(show_cuts)
