"""Draws the README's figures: what a pool is, its ideas, and a request's life.

    python bench/lesson.py

writes them into bench/figures, or where `--output` says. Bytes in them are those that a TokenLake
counts with for Llama-3.1-8B in bf16; names of functions are the code's. bench/svg.py says what the
colours mean.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from options import Parser, file_name, run_main  # noqa: E402
from pool import LakeConfig  # noqa: E402
from simulate import MODELS, segment_tokens  # noqa: E402
from svg import WIDTH, Figure  # noqa: E402
from tokenlake import TokenLake  # noqa: E402
from work import MAX_LANES, rows_of_a_block  # noqa: E402

LLAMA = MODELS["llama-3.1-8b"]
C = segment_tokens("llama-3.1-8b")
OF = "Llama-3.1-8B in bf16, one layer"
INSTANCES = 3
LAKE = TokenLake(list(range(INSTANCES)), LLAMA, LakeConfig(C), dtype=torch.bfloat16)
ROW = LAKE.query_bytes  # a row's query, and its result
QUERY = LLAMA.num_heads * LLAMA.head_dim * torch.bfloat16.itemsize
RESULT = ROW - QUERY
SEGMENT = C * LAKE.kv_bytes
# With so many rows, shipping them is as many bytes as pulling a segment.
EVEN_ROWS = SEGMENT / ROW
BLOCK = rows_of_a_block(LLAMA.num_heads // LLAMA.num_kv_heads, MAX_LANES)

MARGIN = 16
RIGHT = WIDTH - MARGIN


def size(count) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def columns(number, width):
    """Where so many columns of a width begin, spread from margin to margin."""
    gap = (RIGHT - MARGIN - number * width) / (number - 1)
    return [MARGIN + i * (width + gap) for i in range(number)]


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────

PROMPT = 9  # segments of the prompt that is drawn
HOLDER = 186  # width of an instance
SLOTS = 5, 2  # in a row, and rows
SLOT = 30, 22  # width, height
PITCH = 32, 25  # from slot to slot


def draw_pool() -> Figure:
    figure = Figure(
        "A pool of KV caches",
        f"A long prompt of {PROMPT} segments is striped over the slabs of {INSTANCES} instances. "
        "The query row of a decode, which instance 1 computes, travels to the homes of all "
        "segments; results, O and LSE, come back and are merged. Below, to scale: of "
        f"{OF}, a segment of {C} tokens has {SEGMENT:,} bytes, a row's query and result {ROW:,}.",
        424,
    )
    holders = columns(INSTANCES, HOLDER)
    stripe(figure, holders)
    for instance, x in enumerate(holders):
        draw_slab(figure, instance, x)
    travel(figure, holders)
    compare_bytes(figure)
    return figure


def stripe(figure, holders):
    """The prompt, and the home of each of its segments."""
    width = 34
    first = (WIDTH - PROMPT * width) / 2
    said = f"a long prompt: segments of {C} tokens"
    figure.text(WIDTH / 2, 22, said, "head", "middle")
    for segment in range(PROMPT):
        x = first + segment * width
        figure.box(x + 1, 32, width - 2, 24, str(segment), "kv", "small")
        column, instance = divmod(segment, INSTANCES)
        end = holders[instance] + INSET + column * PITCH[0] + SLOT[0] / 2, 117
        figure.curve((x + width / 2, 58), end, "kv thin")
    figure.cells([(MARGIN, 14)], 20, 15, "kv")
    figure.text(44, 26, "segment of this prompt", "small")
    figure.cells([(MARGIN, 35)], 20, 15, "faint")
    figure.text(44, 47, "segment of other prompts", "small")
    figure.cells([(MARGIN, 56)], 20, 15, "faint hollow dashed")
    figure.text(44, 68, "free slot", "small")
    said = "Striped: the home of each is\none instance after that of\nthe segment before."
    figure.text(558, 26, said, "small")


def draw_slab(figure, instance, x):
    """An instance, and what its slots hold."""
    figure.box(x, 106, HOLDER, 214, look="faint hollow")
    own = range(instance, PROMPT, INSTANCES)
    across, down = SLOTS
    places = [
        (x + INSET + PITCH[0] * i, 118 + PITCH[1] * j)
        for j in range(down)
        for i in range(across)
    ]
    others = len(own)
    figure.cells(places[:others], *SLOT, "kv")
    for segment, (left, top) in zip(own, places):
        figure.text(left + SLOT[0] / 2, top + 16, str(segment), "small", "middle")
    free = len(places) - 1 - instance
    figure.cells(places[others:free], *SLOT, "faint")
    figure.cells(places[free:], *SLOT, "faint hollow dashed")
    said = f"instance {instance}: slots of a GPU"
    figure.text(x + HOLDER / 2, 186, said, "", "middle")


def numbers(instance) -> str:
    """Of the prompt's segments that live there."""
    return ", ".join(map(str, range(instance, PROMPT, INSTANCES)))


INSET = 14  # of what stands in an instance
CHIP = HOLDER - 2 * INSET  # width of that
SENT = 214  # y of the arrows
ANSWERED = 294


def travel(figure, holders):
    """A decode's row to all homes, and what comes back."""
    left, middle, right = (holder + INSET for holder in holders)
    figure.box(middle, 200, CHIP, 28, "query row of a decode", "query", "small")
    figure.box(middle, 280, CHIP, 28, "merge by LSE", "result")
    centre = middle + CHIP / 2
    figure.arrow([(centre, 228), (centre, 280)], "result")
    figure.text(centre + 10, 258, f"over {numbers(1)}", "small")
    for holder, instance in ((left, 0), (right, 2)):
        said = f"attention over\nsegments {numbers(instance)}"
        figure.box(holder, 200, CHIP, 108, said)
    meet(figure, middle, left + CHIP)
    meet(figure, middle + CHIP, right)


def meet(figure, here, there):
    """Between the instance that computes a row and one that holds what it reads."""
    figure.arrow([(here, SENT), (there, SENT)], "query")
    figure.arrow([(there, ANSWERED), (here, ANSWERED)], "result")
    gap = (here + there) / 2
    figure.text(gap, SENT - 8, "query row", "small query", "middle")
    figure.text(gap, ANSWERED - 8, "result", "small result", "middle")
    figure.text(gap, ANSWERED + 17, "O and LSE", "small result", "middle")


def compare_bytes(figure):
    """What travels beside what stays, to scale."""
    whole = RIGHT - MARGIN
    figure.text(MARGIN, 344, f"{OF}, to scale:", "small faint")
    said = f"a segment, KV of {C} tokens, stays where it lives: {SEGMENT:,} bytes"
    figure.text(MARGIN, 366, said, "small kv")
    figure.cells([(MARGIN, 373)], whole, 10, "kv")
    said = f"a row's query and result travel instead: {ROW:,} bytes, {EVEN_ROWS:.0f} times fewer"
    query = whole * QUERY / SEGMENT
    figure.cells([(MARGIN, 393)], query, 10, "query solid")
    figure.cells([(MARGIN + query, 393)], whole * RESULT / SEGMENT, 10, "result solid")
    figure.text(MARGIN + 16, 403, said, "small query")


# ── Q and KV must meet ───────────────────────────────────────────────────────────────────────────

MOST_ROWS = 256  # on the chart
CHART = 76, 206, 400, 130  # x, y, width, height


def draw_meet() -> Figure:
    figure = Figure(
        "Q and KV must meet; either can travel",
        "Left: a decode ships its one row to the instance that holds a segment, and the result "
        "comes back. Right: where a prompt has many rows, the segment's KV travels to them. Below: "
        f"bytes over rows. A row and its result are {ROW:,} bytes, a segment of {C} tokens "
        f"{SEGMENT:,}: from {int(EVEN_ROWS) + 1} rows on to pull it is fewer bytes.",
        386,
    )
    left, right = columns(2, 350)
    show_meeting(figure, left, "a decode ships its row")
    show_meeting(figure, right, "many rows of a prompt pull the KV")
    draw_shipping(figure, left)
    draw_pulling(figure, right)
    chart_bytes(figure)
    return figure


def draw_shipping(figure, x):
    figure.cells([(x + 22, 70)], 66, 7, "query")
    figure.arrow([(x + 94, 74), (x + 256, 74)], "query")
    figure.text(x + 175, 67, "row of Q", "small query", "middle")
    figure.arrow([(x + 256, 92), (x + 94, 92)], "result")
    figure.text(x + 175, 108, "O and LSE", "small result", "middle")
    said = f"{size(ROW)} travel in a layer, not {size(SEGMENT)}:\n{EVEN_ROWS:.0f} times fewer"
    figure.text(x, 148, said, "small")


def draw_pulling(figure, x):
    figure.cells([(x + 22, y) for y in range(54, 98, 6)], 66, 5, "query")
    figure.arrow([(x + 256, 82), (x + 94, 82)], "kv")
    figure.text(x + 175, 74, "rows of K and V", "small kv", "middle")
    said = f"{size(SEGMENT)} travel in a layer, not {size(C * ROW)} for {C} rows;\n"
    said += "they leave one layer ahead"
    figure.text(x, 148, said, "small")


def show_meeting(figure, x, said):
    """Two instances, one with queries and one with a segment."""
    figure.text(x, 24, said, "head")
    for left, whose in ((x, "the reader"), (x + 240, "the holder")):
        figure.box(left, 36, 110, 90, look="faint hollow")
        figure.text(left + 55, 118, whose, "small", "middle")
    figure.cells([(x + 262, y) for y in range(54, 98, 6)], 66, 5, "kv")


def chart_bytes(figure):
    """What travels over rows, either way."""
    x, y, width, height = CHART
    bottom = y + height
    highest = MOST_ROWS * ROW

    def place(rows, count):
        return x + width * rows / MOST_ROWS, bottom - height * count / highest

    figure.line([(x, y - 8), (x, bottom), (x + width + 8, bottom)], "faint")
    for rows in range(0, MOST_ROWS + 1, 64):
        figure.text(place(rows, 0)[0], bottom + 17, str(rows), "small", "middle")
    said = f"rows that read a segment of {C} tokens"
    figure.text(x + width / 2, bottom + 36, said, "small", "middle")
    for count, said in ((0, "0"), (SEGMENT, size(SEGMENT)), (highest, size(highest))):
        figure.text(x - 8, place(0, count)[1] + 4, said, "small", "end")
    even = place(EVEN_ROWS, SEGMENT)
    figure.line([even, (even[0], bottom)], "faint dashed")
    figure.line([place(0, 0), place(MOST_ROWS, highest)], "query")
    figure.line([place(0, SEGMENT), place(MOST_ROWS, SEGMENT)], "kv")
    beside = x + width + 12
    pulled_y = place(0, SEGMENT)[1]
    figure.text(beside, y + 4, "rows and results travel", "small query")
    figure.text(beside, pulled_y + 4, "the KV travels", "small kv")
    said = f"Even at {EVEN_ROWS:.0f} rows: one and its\nresult are as many bytes as\n"
    said += f"the KV of {ROW / LAKE.kv_bytes:.1f} tokens."
    figure.text(beside, pulled_y + 26, said, "small")
    figure.text(even[0] - 8, bottom - 8, "ship", "small query", "end")
    figure.text(even[0] + 8, bottom - 8, "pull", "small kv")


# ── what all want is read once ───────────────────────────────────────────────────────────────────

FEW = BLOCK // 4
ROWS_THERE = FEW, 2 * FEW, FEW  # of decodes, by the instance that computes them
BAR = 5.5  # from row to row
TREE = 414  # x


def draw_once() -> Figure:
    figure = Figure(
        "What all want is read once",
        f"Left: rows of {BLOCK} decodes, which {INSTANCES} instances compute, stand at the "
        "holder of a segment at the same moment, and it reads the segment once for all of them. "
        "Right: in a prefix tree there is a group of rows for each branching; a row's own part is "
        "merged with those of its groups.",
        306,
    )
    gather_rows(figure)
    show_groups(figure)
    return figure


def gather_rows(figure):
    """Rows of decodes at the holder of a segment."""
    said = f"{BLOCK} decodes meet a segment of instance {INSTANCES}"
    figure.text(MARGIN, 24, said, "head")
    top = 50
    height = BLOCK * BAR
    figure.box(196, top - 12, 184, height + 40, look="faint hollow")
    figure.text(236, top + height + 16, "rows of Q", "small query", "middle")
    figure.text(340, top + height + 16, "segment", "small kv", "middle")
    y = top
    for instance, rows in enumerate(ROWS_THERE):
        tall = rows * BAR
        said = f"instance {instance}\n{rows} rows"
        figure.box(MARGIN, y, 96, tall - 6, said, letters="small")
        bars = [(212, y + BAR * i) for i in range(rows)]
        figure.cells(bars, 48, BAR - 2, "query solid")
        figure.arrow([(MARGIN + 98, y + tall / 2 - 3), (208, y + tall / 2 - 3)], "query")
        y += tall
    stripes = [(316, top + 11 * i) for i in range(16)]
    figure.cells(stripes, 48, 9, "kv")
    middle = top + height / 2 - 1
    figure.arrow([(312, middle), (264, middle)], "kv")
    figure.text(288, middle - 9, "once", "small kv", "middle")
    said = f"{size(SEGMENT)} are read a layer, not {size(BLOCK * SEGMENT)}.\n"
    said += f"(A program takes {BLOCK} rows; more are several reads.)"
    figure.text(MARGIN, 282, said, "small")


class Node(NamedTuple):
    """Segments, and beside them the rows that read these."""

    x: float
    y: float
    name: str
    width: float
    rows: str
    rows_width: float

    @property
    def middle(self) -> float:
        return self.x + (self.width + 2 + self.rows_width) / 2


def show_groups(figure):
    """A prefix tree: which rows read a node together."""
    figure.text(TREE, 24, "a group for each branching of the tree", "head")
    root = Node(TREE + 58, 46, "system prompt", 116, "A B C D", 76)
    shared = Node(TREE, 122, "document", 80, "A B", 46)
    leaves = [
        Node(TREE + 84 * i, 198, "own", 44, row, 30) for i, row in enumerate("ABCD")
    ]
    for parent, children in ((root, [shared, *leaves[2:]]), (shared, leaves[:2])):
        for child in children:
            start = parent.middle, parent.y + 32
            figure.curve(start, (child.middle, child.y - 2), "faint")
    for node in (root, shared, *leaves):
        figure.box(node.x, node.y, node.width, 30, node.name, "kv", "small")
        beside = node.x + node.width + 2
        figure.box(beside, node.y, node.rows_width, 30, node.rows, "query", "small")
    said = "The result of row A is merged of three:\n"
    said += "its own part, that of A B, and that of A B C D."
    figure.text(TREE, 282, said, "small result")


# ── sequence parallelism is a split of rows ──────────────────────────────────────────────────────

PART = 182  # width of a part of the rows
PART_PITCH = 186
COMPUTES = 140  # width of an instance


def draw_split() -> Figure:
    figure = Figure(
        "Sequence parallelism is only a split of rows",
        f"The new rows of one prompt are cut into {INSTANCES} parts, which {INSTANCES} instances "
        "compute. Each puts its new KV into the pool, sends its queries there, and gets results, "
        "like any other rows. There is no ring; where it is fewer bytes, an instance also sends "
        "KV that it has just computed straight to the others.",
        332,
    )
    first = RIGHT - INSTANCES * PART_PITCH + PART_PITCH - PART
    figure.text(MARGIN, 24, "one prompt", "head")
    figure.box(MARGIN, 36, first - MARGIN - 4, 30, "cached", "kv")
    for part in range(INSTANCES):
        draw_part(figure, first + part * PART_PITCH, part)
    middle = (MARGIN + first - 4) / 2
    figure.arrow([(middle, 68), (middle, 234)], "kv")
    figure.text(middle + 8, 150, "is there\nalready", "small kv")
    said = "the pool: the prompt's old KV, striped; its new KV, layer by layer"
    figure.box(MARGIN, 236, RIGHT - MARGIN, 44, said, "kv")
    said = "No ring: a row meets in the pool all that it reads, as any other row does. Only where "
    said += "it is fewer bytes\ndoes an instance send KV that it has just computed straight to "
    said += "the others."
    figure.text(MARGIN, 304, said, "small")
    return figure


def draw_part(figure, x, part):
    """Rows, the instance that computes them, and what goes between it and the pool."""
    figure.box(x, 36, PART, 30, f"new rows, part {part}", "query")
    middle = x + PART / 2
    figure.arrow([(middle, 68), (middle, 104)], "query")
    left = middle - COMPUTES / 2
    figure.box(left, 106, COMPUTES, 52, f"instance {part}\ncomputes them")
    figure.arrow([(left + 8, 160), (left + 8, 234)], "kv")
    figure.text(left + 14, 202, "KV", "small kv")
    figure.arrow([(left + 52, 160), (left + 52, 234)], "query")
    figure.text(left + 58, 202, "Q", "small query")
    figure.arrow([(left + 88, 234), (left + 88, 160)], "result")
    figure.text(left + 94, 202, "O, LSE", "small result")
    if part < INSTANCES - 1:
        end = left + COMPUTES
        next_left = left + PART_PITCH
        figure.arrow([(end + 2, 132), (next_left - 2, 132)], "kv dashed")
        figure.text((end + next_left) / 2, 124, "KV", "small kv", "middle")


# ── a conventional instance is a lake of one ─────────────────────────────────────────────────────

FLEET = 4  # instances
PANEL = 216  # width
LAKES = [  # instances in each, policy, what that means
    (4, "tokenlake", "one lake of four instances:\nany row meets any KV"),
    (2, "lakes:2x2", "two lakes of two:\na query stays in its lake"),
    (1, "router", "four lakes of one, conventional:\nthey never communicate"),
]


def draw_lakes() -> Figure:
    figure = Figure(
        "A conventional instance is a lake of one",
        f"{FLEET} instances as one lake with one pool; as two lakes of two behind a router; as "
        "four lakes of one behind a router, each with a cache of its own, which never communicate.",
        222,
    )
    for x, (members, policy, said) in zip(columns(len(LAKES), PANEL), LAKES):
        figure.text(x + PANEL / 2, 192, said, "small", "middle")
        draw_fleet(figure, x, members, policy)
    return figure


def draw_fleet(figure, x, members, policy):
    """Instances in lakes of so many members each."""
    pitch = PANEL / FLEET
    middle = x + PANEL / 2
    figure.text(middle, 20, policy, "code", "middle")
    source = "requests" if members == FLEET else "router"
    figure.box(middle - 45, 32, 90, 28, source, letters="small")
    for first in range(0, FLEET, members):
        left = x + first * pitch + 2
        width = members * pitch - 4
        top = left + width / 2, 84
        figure.curve((middle, 62), top, "faint")
        figure.box(left, 86, width, 86, look="faint hollow")
        for instance in range(members):
            near = left + instance * pitch + 3
            figure.box(near, 94, pitch - 10, 32, str(first + instance), letters="small")
        said = "cache" if members == 1 else "pool"
        figure.box(left + 3, 134, width - 6, 30, said, "kv", "small")


# ── the control plane is deterministic ───────────────────────────────────────────────────────────

RANK = 190  # width
LANE = 736  # x of the way back
BAND = 712 - MARGIN  # width of what spans all ranks


def draw_agree() -> Figure:
    figure = Figure(
        "The control plane is deterministic",
        "From the same trace, the same clock and fit of rank 0 and the same sampled tokens, every "
        "rank plans the same for all. Ranks compare a digest of the plan and its tokens before the "
        "first exchange of data. At the end of an iteration sampled tokens, rank 0's clock "
        "and its fit cross; with them the next one is planned.",
        440,
    )
    figure.text(MARGIN, 24, "what every rank has", "head")
    said = (
        "the trace · sampled tokens · rank 0's clock · rank 0's fit of the time predictor"
    )
    figure.box(MARGIN, 36, BAND, 32, said)
    pitch = (BAND - RANK) / (INSTANCES - 1)
    for rank in range(INSTANCES):
        draw_rank(figure, MARGIN + rank * pitch, rank)
    between = MARGIN + (RANK + pitch) / 2  # the first two
    figure.text(between, 236, "if one differs, all stop", "small", "middle")
    figure.text(between + pitch, 236, "no data has crossed yet", "small", "middle")
    said = (
        "what the next plan needs crosses: sampled tokens · rank 0's clock · rank 0's fit"
    )
    figure.box(MARGIN, 364, BAND, 50, said, code="EndOfIteration.gather")
    figure.arrow([(BAND + 18, 389), (LANE, 389), (LANE, 52), (BAND + 18, 52)], "ink")
    figure.text(LANE, 432, "the next iteration", "small", "end")
    return figure


def draw_rank(figure, x, rank):
    """What it does in an iteration, and says to the next rank."""
    middle = x + RANK / 2
    for y, end in ((70, 94), (164, 184), (214, 250), (338, 362)):
        figure.arrow([(middle, y), (middle, end)], "ink")
    calls = "Scheduler.schedule\nTokenLake.gen_plans"
    figure.box(x, 96, RANK, 66, f"rank {rank} plans for all", code=calls)
    figure.box(x, 186, RANK, 26, "digest of plan and tokens", letters="small")
    calls = "TokenLake.put\nTokenLake.query"
    figure.box(x, 252, RANK, 84, "computes its own rows", code=calls)
    if rank < INSTANCES - 1:
        talk(figure, x + RANK, (BAND - INSTANCES * RANK) / (INSTANCES - 1))


def talk(figure, x, gap):
    """Between two ranks: they compare digests, then exchange data."""
    middle = x + gap / 2
    figure.text(middle, 204, "= ?", "head", "middle")
    near = x + 3
    far = x + gap - 3
    for y, look, said in ((276, "query", "Q"), (328, "kv", "KV")):
        figure.arrow([(near, y), (far, y)], look)
        figure.text(middle, y - 6, said, f"small {look}", "middle")
    figure.arrow([(far, 302), (near, 302)], "result")
    figure.text(middle, 296, "O, LSE", "small result", "middle")


# ── a request's life ─────────────────────────────────────────────────────────────────────────────

STEP_PITCH = 62
STRIP = 556  # x of the segments
SEGMENT_PITCH = 31
HITS = 3
NEW = 2  # segments that the rest of the prompt fills
REST = NEW + 1  # with its open tail


class Step(NamedTuple):
    title: str
    said: str
    calls: str  # who does it
    looks: list[str]  # of the request's segments
    word: str  # on these


STEPS = [
    Step(
        "It arrives",
        "when it is due, by rank 0's clock, and waits in the queue.",
        "Server._send_due, Scheduler.add",
        ["faint hollow"] * (HITS + REST),
        "only tokens",
    ),
    Step(
        "It is matched",
        "Chained hashes of its segments are looked up in the prefix tree.",
        "Balancer.match, PrefixTree.match",
        ["kv"] * HITS + ["faint hollow"] * REST,
        f"{HITS} hits",
    ),
    Step(
        "It is admitted",
        "if there is room. What it hits is pinned: nobody evicts it now.",
        "Scheduler._admit, Balancer.admit",
        ["kv solid"] * HITS + ["faint hollow"] * REST,
        "pinned",
    ),
    Step(
        "In each iteration slots are reserved",
        "for its next rows, at the instances where their segments will live.",
        "Scheduler._reserve, Balancer.reserve",
        ["kv solid"] * HITS + ["kv hollow dashed"] * REST,
        "slots reserved",
    ),
    Step(
        "Its rows are planned",
        "with all others': who computes them, and how they meet their KV.",
        "Engine._plan, TokenLake.gen_plans",
        ["kv solid"] * HITS + ["query"] * REST,
        "rows to compute",
    ),
    Step(
        "Its rows are computed",
        "by layers: KV is put, rows query the pool. The last gives a token.",
        "Engine._launch, TokenLake.put, TokenLake.query",
        ["kv solid"] * HITS + ["kv"] * REST,
        "KV written",
    ),
    Step(
        "It is committed",
        "Full segments are published: others hit them from now on.",
        "Scheduler.advance, Balancer.commit, PrefixTree.insert",
        ["kv solid"] * (HITS + NEW) + ["kv"],
        "published, open tail",
    ),
    Step(
        "It is finished",
        "Its segments are unpinned, and stay in the LRU until a slot is needed.",
        "Balancer.release, PrefixTree.unpin, Server._finish",
        ["kv"] * (HITS + NEW) + ["faint hollow dashed"],
        "in the LRU, slot freed",
    ),
]
LOOP = 4, 7  # these are repeated, by number


def draw_life() -> Figure:
    named = "; ".join(f"{number}. {step.title}" for number, step in enumerate(STEPS, 1))
    first, last = LOOP
    figure = Figure(
        "A request's life",
        f"{named}. Steps {first} to {last} are repeated in each iteration.",
        len(STEPS) * STEP_PITCH + 12,
    )
    for number, step in enumerate(STEPS, 1):
        draw_step(figure, number, step)
    start = middle_of_step(last)
    end = middle_of_step(first)
    figure.arrow([(46, start), (24, start), (24, end), (46, end)], "ink")
    return figure


def middle_of_step(number) -> float:
    """y of its number."""
    return STEP_PITCH * (number - 1) + 26


def draw_step(figure, number, step):
    """A line of the story, who does it, and what becomes of the request's segments."""
    y = middle_of_step(number)
    figure.box(48, y - 13, 26, 26, str(number), letters="head")
    if number < len(STEPS):
        figure.arrow([(61, y + 15), (61, y + STEP_PITCH - 15)], "faint")
    figure.text(90, y - 6, step.title, "head")
    figure.text(90, y + 12, step.said, "small")
    figure.text(90, y + 29, step.calls, "code faint")
    for look in dict.fromkeys(step.looks):
        places = [
            (STRIP + SEGMENT_PITCH * i, y - 14)
            for i, own in enumerate(step.looks)
            if own == look
        ]
        figure.cells(places, SEGMENT_PITCH - 4, 22, look)
    figure.text(STRIP, y + 25, step.word, "small faint")


# ── the program ──────────────────────────────────────────────────────────────────────────────────

FIGURES = {
    "pool": draw_pool,
    "meet": draw_meet,
    "once": draw_once,
    "split": draw_split,
    "lakes": draw_lakes,
    "agree": draw_agree,
    "life": draw_life,
}


def main(arguments: list[str]):
    parser = Parser(description="Draws the README's figures.")
    default = HERE / "figures"
    parser.add_argument(
        "--output", type=file_name, default=default, help="folder (bench/figures)"
    )
    folder = Path(parser.parse_args(arguments).output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in FIGURES.items():
            draw().write(folder / f"{name}.svg")
    except OSError as error:
        parser.refuse(
            f"--output {folder}: {error.strerror}; a folder that takes files is expected"
        )


if __name__ == "__main__":
    run_main(main)
