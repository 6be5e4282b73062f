"""One iteration as a fixed case (see conformance.py): all tables of its plan, and what its
attention gives on each instance.

The plan is `gen_plans`'s, of a lake in the state that the case has. Its attention is carried out as
the ranks do it, with their kernels, but in one process: `Slabs` of golden_plans.py moves KV. What
is expected of it is a plain softmax over all that a row's request has up to it, which knows nothing
of plans.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

PARENT = Path(__file__).resolve().parent
sys.path[:0] = [str(PARENT.parent), str(PARENT)]

from balancer import Request, Run  # noqa: E402
from conformance_attention import (  # noqa: E402
    BOUND,
    attend,
    attention_tolerance,
    tensor,
)
from conformance_cases import (  # noqa: E402
    Case,
    Draws,
    Kind,
    Recorded,
    balancer_of,
    pool_of,
    request_of,
    state_of,
)
from golden_plans import Slabs, identities  # noqa: E402
from kernels import merge, partial_attention  # noqa: E402
from model import LlamaConfig  # noqa: E402
from pool import (  # noqa: E402
    HERE,
    LATE,
    MOVE_KINDS,
    PULLED,
    SIBLING,
    LakeConfig,
    runs_reading,
    work_of,
)
from scheduler import Scheduler  # noqa: E402
from tokenlake import TokenLake  # noqa: E402
from work import CPU_LANES, AtOnce, select, starts  # noqa: E402

PLACES = {HERE: "here", LATE: "late", PULLED: "pulled", SIBLING: "sibling"}


# ── the answer ───────────────────────────────────────────────────────────────────────────────────


def answer_iteration(given: dict) -> dict:
    """One iteration (§5): all tables of its plan, then what its attention gives, by instance. The
    order of rows in a table is part of it, as numbers count them.

    Steps. If there is any run, copies are made (see replication; they can be read from the next
    iteration on). Batches are cut into parts, and shares are listed. Replicas are chosen (below).
    What is pulled is decided (see ship_or_pull), then which instance computes which part (see
    dispatch; one cheapest matching is all there is here). Replicas at hand are taken. KV that is
    then with the instance that computes its share is not pulled. Fresh KV is placed (see siblings).
    Last, the pool's loads take what was planned.

    Parts and shares. A batch of DoP k is cut into k parts, numbered through all batches: with R
    rows in it, a run falls into part floor(k · rows of the batch before it / R). All rows that a
    part has of one request are a *share*; shares stand by part, then request. All its rows read the
    request's *old* tokens: `done`, or one more if the run puts nothing. And each run reads *fresh*
    KV: what runs of its request up to itself put. It is a prompt's if its first run is no `decode`.

    Replicas. The reads of segments that have several (copies of this iteration counted, though they
    cannot be read), by share, then segment, make bundles: those of one segment, in this order, are
    cut into max(1, floor(their rows / ridge)) bundles; a read before which r of the n rows stand
    falls into bundle floor(r · bundles / n). Bundles stand by the slot of the segment's first
    replica, then by number. A bundle costs C · max(its rows, ridge), and chooses (see choice) by
    the pool's load and by what segments with one slot add to it, as if nothing was pulled. At hand:
    a read whose share's instance has a replica takes that, if any read has chosen it, or if the
    shares there that could take it have `ridge` rows.

    Rows. Runs stand by instance, request, position; the rows of an instance are those of its runs
    in this order, and so are its q, kv and o. Slot s has slab rows from (s mod S) · C on, at
    instance floor(s / S). A run that puts KV writes it there, if it is computed there, else behind
    the slots, to staging: from slab row S·C on, run after run. What moves bring to an instance lies
    in its receive buffer: by source, those of one source in the order of the table.

    Fresh KV meets its reader: if both runs are at one instance, there, `here`; if it was sent to
    the reader's share, at the reader, `sibling`; else at its home, `here` if it was computed there
    and else `late`. A run's rows ship to all instances where its share reads old KV that is not
    pulled, or where it meets fresh KV that is no sibling's, but for its own.

    Loads, in rows · tokens, where n rows weigh max(n, ridge), or 0 for none: of a segment that only
    one request reads, its old tokens · the weight of that request's rows (of all shares that do not
    pull it); of one of its `shared` first segments, and of one with several replicas, C · the
    weight of all rows that read that slot and do not pull it; of what is pulled, its tokens · the
    weight of the share's rows, at the share's instance; of each pair of `fresh`, rows · rows, where
    they meet.

    - input: `pool`; `requests`; `batches`, [[run]] with `request`, `position`, `rows`, `slot`,
      `puts`, `decode`; `dops`; `query_bytes`, a row's q, o and lse, and `kv_bytes`, a token's KV,
      in one layer; `exchange_bytes`; `ridge`; `pull_tokens`; `staging` (slab rows); `draws`
      ([first, other] if anything is chosen); `scale`; by instance `slab` [S·C + staging, 2, Hkv, D]
      before the iteration (NaN: never written), and of the rows that it computes `q` [T, H, D] and
      `kv` [T, 2, Hkv, D]
    - output: `groups`, of each batch the instance of each run
      - `runs`, a table: `request_id`, `position`, `rows`, `slot`, `puts`, `decode`, `home` (the
        slot's instance), `share`, `instance`, `first_row` (among the rows of its instance)
      - `old_tokens` of each share; `segment_reads`, a table of all old KV that is read: `share`,
        `segment`, `slot`; `replicas`, those of them with several replicas
      - `pulls`, a table of moves, and `pulled`, the `share`, `segment` and `receive_row` of each;
        by share, then segment
      - `fresh`, a table of pairs, by request, `reader` and `writer` in order of position:
        `instance` where they meet, `place`, `first_row` there, of slab or receive buffer
      - `ships` [runs][N]; `writes`, a table of the runs that put: `instance`, `first_row`, the
        `slab_row` that is written, `rows`
      - `moves`, a table: `kind`, `source`, `source_row`, `target`, `target_row` (-1: they stay in
        the receive buffer), `rows`; first fresh KV to siblings (`sibling`, by share, then writer),
        then new KV to its home (`put`, by run), then copies (`replica`)
      - `spans`, of each instance a table of what is read there: `share`, `place`, `first_row`,
        `length`, `position`; old KV by share and segment, then fresh KV by share and writer, once
        for a share. Places: `here`, in the slab before moves land, `late`, once they have;
        `pulled` and `sibling`, in the receive buffers of `pulls` and of `moves`
      - `reads` [N], old tokens that each instance gives to readers, those of a request's first
        share; `load` [N]; `tokens_read` [N], the same with each token once in place of a weight;
        `load_after` [N], the pool's: load before - ceil(load before / 8) + `load`
      - `o`, by instance [T, H, D]: attention of each row over all of its request up to itself
    """
    lake = lake_of_iteration(given)
    requests = {
        entry["id"]: request_of(lake.balancer, entry) for entry in given["requests"]
    }
    batches = [[run_of(run, requests) for run in batch] for batch in given["batches"]]
    lake.balancer._rng = Recorded(given["draws"])
    plan, transfer, groups = lake.gen_plans(
        batches, given["dops"], lake.get_prefix_tree()
    )
    return dict(
        groups=groups,
        **plan_tables(plan, transfer),
        load_after=lake.balancer.load.tolist(),
        o=attention_of_plan(given, lake, plan, transfer),
    )


def lake_of_iteration(given: dict) -> TokenLake:
    """A lake in the state that the case has."""
    pool = given["pool"]
    config = LakeConfig(
        segment_tokens=pool["segment_tokens"],
        slots=pool["slots"],
        pull_tokens=given["pull_tokens"],
    )
    lake = TokenLake(list(range(pool["instances"])), LlamaConfig(), config)
    lake.balancer = balancer_of(pool)
    lake.query_bytes = given["query_bytes"]
    lake.kv_bytes = given["kv_bytes"]
    lake.exchange_bytes = given["exchange_bytes"]
    lake.ridge = given["ridge"]
    return lake


def run_of(given: dict, requests: dict[int, Request]) -> Run:
    request = requests[given["request"]]
    where = given["position"], given["rows"]
    # What the balancer proposes has done its part once there are batches.
    return Run(request, *where, 0, given["slot"], given["puts"], given["decode"])


def columns_of(table) -> dict:
    """Columns by name; words in place of numbers for kinds and places."""
    columns = {name: values.tolist() for name, values in table._asdict().items()}
    if "kind" in columns:
        columns["kind"] = [MOVE_KINDS[kind] for kind in columns["kind"]]
    if "place" in columns:
        columns["place"] = [PLACES[place] for place in columns["place"]]
    return columns


def plan_tables(plan, transfer) -> dict:
    """All tables of a plan."""
    N = plan.sizes[0]
    return dict(
        runs=columns_of(plan.run_table),
        old_tokens=plan.old.tokens.tolist(),
        segment_reads=columns_of(plan.segment_reads),
        replicas=columns_of(plan.old.replicas),
        pulled=columns_of(plan.old.pulled),
        pulls=columns_of(plan.old.pulls),
        fresh=columns_of(plan.fresh),
        ships=plan.ships.astype(int).tolist(),
        writes=columns_of(transfer.writes),
        moves=columns_of(transfer.moves),
        spans=[columns_of(plan.spans_read_at(instance)) for instance in range(N)],
        reads=plan.reads.tolist(),
        load=plan.load.tolist(),
        tokens_read=plan.tokens_read.tolist(),
    )


def attention_of_plan(given, lake, plan, transfer) -> list[torch.Tensor]:
    """What the instances do with KV, in one process: rows of KV have numbers, first those of all
    slabs, then the new ones; the plan moves these."""
    q = torch.cat(given["q"])
    bank = torch.cat((*given["slab"], *given["kv"]))
    slab_rows = len(given["slab"][0])
    slabs = Slabs(lake)
    N = len(slabs.rows)
    slabs.rows = np.arange(N * slab_rows).reshape(N, slab_rows)
    slabs.write(plan, transfer, new_rows(plan, N * slab_rows))
    here = slabs.rows.copy()
    siblings = slabs.received(transfer.moves)
    pulled = slabs.received(plan.old.pulls)
    slabs.land(transfer.moves)
    numbers = {HERE: here, LATE: slabs.rows, PULLED: pulled, SIBLING: siblings}
    runs = plan.run_table._replace(first_row=starts(plan.run_table.rows))
    parts = []
    for instance in range(N):
        spans = plan.spans_read_at(instance)
        for place in np.unique(spans.place).tolist():
            there = select(spans, spans.place == place)
            kv = bank[torch.from_numpy(numbers[place][instance])]
            work = work_of(runs_reading(runs, there), there, heads_of(q, bank))
            parts.append(partial_attention(q, kv, work, given["scale"]))
    rows = torch.arange(len(q))
    table = torch.stack([rows + i * len(q) for i in range(len(parts))], 1)
    o, _ = merge(*map(torch.cat, zip(*parts)), table)
    return list(o.split([len(its) for its in given["q"]]))


def new_rows(plan, first: int) -> dict[int, np.ndarray]:
    """By request, the number of each of its positions that is computed: they count from `first`,
    run after run."""
    numbers = {}
    for run, begin in zip(plan.runs, starts(plan.run_table.rows).tolist()):
        its = numbers.setdefault(run.request.id, np.full(len(run.request.tokens), -1))
        its[run.position : run.position + run.rows] = first + begin + np.arange(run.rows)
    return numbers


def heads_of(q, bank):
    """What `work_of` asks of a pool."""
    return SimpleNamespace(
        num_heads=q.shape[1],
        num_kv_heads=bank.shape[2],
        kv=bank,
        resident=AtOnce(),
        read_once=True,
        max_lanes=CPU_LANES,
    )


def expect_iteration(given: dict) -> dict:
    """The plan as it is, and a softmax for each row."""
    answer = answer_iteration(given)
    read = keys_of_rows(given, answer["runs"])
    q = torch.cat(given["q"])
    o = [attend(row, kv, given["scale"])[0].float() for row, kv in zip(q, read)]
    return answer | dict(o=list(torch.stack(o).split([len(its) for its in given["q"]])))


def keys_of_rows(given: dict, runs: dict) -> list[torch.Tensor]:
    """Of each row, in the plan's order: all KV of its request up to itself, [tokens, 2, Hkv, D]. It
    lies where the request's table says, or is new."""
    S = given["pool"]["slots"]
    C = given["pool"]["segment_tokens"]
    kv_at = {}  # by request and position
    for request in given["requests"]:
        for position in range(max(request["done"], request["published"] * C)):
            instance, slot = divmod(request["table"][position // C], S)
            row = slot * C + position % C
            kv_at[request["id"], position] = given["slab"][instance][row]
    columns = zip(runs["request_id"], runs["position"], runs["rows"])
    rows = [(id, first + i) for id, first, count in columns for i in range(count)]
    for row, new in zip(rows, torch.cat(given["kv"])):
        kv_at.setdefault(row, new)
    return [torch.stack([kv_at[id, i] for i in range(last + 1)]) for id, last in rows]


# ── scenes, of which an iteration is recorded ────────────────────────────────────────────────────

SHAPE = LlamaConfig(num_heads=4, num_kv_heads=2, head_dim=8)
NEVER = -1  # what golden_plans has for a slab row that was never written


def draw_requests(draws: Draws, count: int) -> list[Request]:
    """Requests behind three stems, or that ask again what was asked before; every other prompt is
    cut to full segments."""
    stems = [draws.below(40, length) for length in (20, 9, 0)]
    prompts: list[list[int]] = []
    requests = []
    for id in range(count):
        kind, stem, own, answer = draws.below(60, 4)
        prompt = stems[stem % 5 % 3] + draws.below(40, 4 + own % 13)
        prompt = prompt[: len(prompt) // 4 * 4] if own % 2 else prompt
        if prompts and kind < 12:
            prompt = prompts[kind % len(prompts)]
        prompts.append(prompt)
        requests.append(Request(id, list(prompt), len(prompt) + 1 + answer % 6))
    return requests


class Scene:
    """A lake at work: requests come, all that is sampled is made up, and what lies in each row of
    the slabs is known."""
    def __init__(self, requests, config: LakeConfig, instances: int, policy="even"):
        self.lake = TokenLake(list(range(instances)), SHAPE, config)
        self.lake.balancer._rng = self.draws = Draws(0)
        self.scheduler = Scheduler(self.lake, policy=policy)
        self.coming = list(requests)
        self.slabs = Slabs(self.lake)
        self.known: set[int] = set()  # identities of all tokens so far

    def schedule(self, arrivals: int):
        """Batches and DoPs of the next iteration; so many requests come before it."""
        for request in self.coming[:arrivals]:
            self.scheduler.add(request)
        self.coming = self.coming[arrivals:]
        return self.scheduler.schedule()

    def iterate(self, batches, dops):
        """→ query plan."""
        lake = self.lake
        plan, transfer, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
        tokens = {run.request.id: identities(run.request) for run in plan.runs}
        self.slabs.iterate(plan, transfer, tokens)
        self.known.update(number for its in tokens.values() for number in its.tolist())
        sampling = (run.request for run in plan.runs if run.samples)
        sampled = {
            request.id: (7 * request.id + len(request.tokens)) % 40
            for request in sampling
        }
        self.scheduler.update(plan, sampled)
        return plan

    def input_of(self, batches, dops) -> dict:
        """The next iteration as a case has it, but for its tensors."""
        lake = self.lake
        requests = {run.request.id: run.request for batch in batches for run in batch}
        return dict(
            pool=pool_of(lake.balancer, lake.config.replicate_factor),
            requests=[state_of(requests[id]) for id in sorted(requests)],
            batches=[[listed_run(run) for run in batch] for batch in batches],
            dops=dops,
            query_bytes=lake.query_bytes,
            kv_bytes=lake.kv_bytes,
            exchange_bytes=lake.exchange_bytes,
            ridge=lake.ridge,
            pull_tokens=lake.config.pull_tokens,
            staging=lake.config.staging(len(lake.instances)),
            scale=SHAPE.head_dim**-0.5,
        )


def listed_run(run: Run) -> dict:
    return dict(
        request=run.request.id,
        position=run.position,
        rows=run.rows,
        slot=run.slot,
        puts=run.puts,
        decode=run.decode,
    )


def record(scene: Scene, arrivals: list[int]) -> dict:
    """Runs a scene, with so many arrivals before each iteration, and gives the input of the last
    one."""
    *before, last = arrivals
    for count in before:
        scene.iterate(*scene.schedule(count))
    batches, dops = scene.schedule(last)
    given = scene.input_of(batches, dops)
    rows = scene.slabs.rows.copy()
    scene.draws.drawn = []
    plan = scene.iterate(batches, dops)
    return given | dict(draws=scene.draws.drawn) | draw_tensors(scene, rows, plan)


def draw_tensors(scene: Scene, rows: np.ndarray, plan) -> dict:
    """KV of what lay in the rows of the slabs, and of new rows, and queries. A token has the same
    KV wherever it lies."""
    draws = Draws(11)
    known = np.array([NEVER, *sorted(scene.known)])
    bank = draws.uniform(len(known), 2, SHAPE.num_kv_heads, SHAPE.head_dim)
    bank[0] = np.nan
    new = np.concatenate(
        [
            identities(run.request)[run.position : run.position + run.rows]
            for run in plan.runs
        ]
    )
    kv = tensor(bank[np.searchsorted(known, new)])
    q = tensor(draws.uniform(len(new), SHAPE.num_heads, SHAPE.head_dim) * 4)
    table = plan.run_table
    counts = np.bincount(table.instance, table.rows, len(rows)).astype(int).tolist()
    return dict(
        slab=[tensor(bank[its]) for its in np.searchsorted(known, rows)],
        q=list(q.split(counts)),
        kv=list(kv.split(counts)),
    )


def iteration_case(name, shows, scene: Scene, arrivals: list[int]) -> Case:
    given = record(scene, arrivals)
    kv = torch.cat((*given["slab"], *given["kv"]))
    kv = kv[~kv.isnan().flatten(1).any(1)]
    most_parts = len(PLACES) * len(given["slab"])  # of a row
    o, _ = attention_tolerance(torch.cat(given["q"]), kv, given["scale"], most_parts)
    tables = "groups runs old_tokens segment_reads replicas pulls pulled fresh ships writes moves "
    tables += "spans reads load tokens_read load_after"
    compare = dict.fromkeys(tables.split(), "exactly") | dict(o=dict(within=o))
    return Case(name, shows, given, compare, BOUND)


def scene_of_docstring() -> Scene:
    """The one of tokenlake.py: three requests on two instances."""
    config = LakeConfig(4, 10, replicate_factor=0.0, chunk_tokens=8, max_batch=4)
    prompt = list(range(10, 20))
    requests = [
        Request(0, prompt[:], 14),
        Request(1, prompt[:4] + [1, 2, 3, 4, 5], 12),
        Request(2, prompt[:8], 10),
    ]
    return Scene(requests, config, 2)


def busy_scene(instances: int, seed: int, policy="even") -> Scene:
    """In which KV moves for little."""
    config = LakeConfig(4, 20, pull_tokens=24, chunk_tokens=8, max_batch=6)
    scene = Scene(draw_requests(Draws(seed), 16), config, instances, policy)
    scene.lake.exchange_bytes = 0
    scene.lake.ridge = 2
    return scene


def iteration_cases() -> list[Case]:
    """Seeds and iterations were searched for what comes up in them."""
    return [
        iteration_case(
            "the plan of the docstring",
            "tokenlake.py's example, on two instances: a decode ships to what lies elsewhere, the "
            "last row of a prompt and of a fully cached one to their first segment. No KV moves.",
            scene_of_docstring(),
            [1, 2],
        ),
        iteration_case(
            "all at once",
            "Three instances: decodes that ship, a prompt that pulls KV, a fully cached prompt, "
            "new KV that is put elsewhere, a sibling that gets fresh KV, a copy, and replicas.",
            busy_scene(3, 71),
            [2, 1, 1],
        ),
        iteration_case(
            "two batches",
            "Three instances, decodes on one, prompts on two of them: a request is cut into parts "
            "within a batch; rows go to the home of fresh KV, and read it when it has been put "
            "there; a replica is at hand for as many rows as pay.",
            busy_scene(3, 31, "dp"),
            [2, 1, 1, 1],
        ),
        iteration_case(
            "two instances",
            "A copy, a sibling, a pull, a fully cached prompt, and decodes that ship.",
            busy_scene(2, 30),
            [2, 1, 1],
        ),
    ]


KINDS = dict(iteration=Kind(iteration_cases, answer_iteration, expect_iteration))


if __name__ == "__main__":
    print(__doc__)
