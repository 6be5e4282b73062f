"""Do plans stay as they are? A few hundred seeded scenes, and the digest of all that is planned in
each.

    python bench/golden_plans.py            # compares with bench/golden_plans.json
    python bench/golden_plans.py --record   # writes it: only in a commit that says why a plan
    changed

A scene is a lake of 1 to 8 instances without tensors: scheduler and balancer as they are, requests
with shared prefixes and repeated prompts, a policy, a placement, a size of segment, slots that run
out or not, all drawn by the scene's seed. Its digest covers, iteration by iteration, who computes
which run, what is read where, what travels, the loads, and what lies in which row of every slab.

A slab here holds for each row the identity of a token: its number stands for the token and all
before it. So while a scene runs, every planned read is checked: each row reads each position up to
its own exactly once, and finds there what was written for it.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

FILE = Path(__file__).resolve().with_suffix(".json")
sys.path[:0] = [str(FILE.parent.parent), str(FILE.parent)]

import scheduler  # noqa: E402
from balancer import Request  # noqa: E402
from model import LlamaConfig  # noqa: E402
from options import Parser, run_main  # noqa: E402
from pool import (  # noqa: E402
    HERE,
    LATE,
    PULLED,
    PUT,
    REPLICA,
    SIBLING,
    TO_SIBLING,
    LakeConfig,
    Moves,
)
from provenance import describe_machine  # noqa: E402
from scheduler import Scheduler  # noqa: E402
from tokenlake import TokenLake  # noqa: E402

NUM_SCENES = 320
ITERATIONS = 60  # of a scene, at most
EMPTY = -1  # a slab row that was never written


def draw_prompt(rng, stems: list[list[int]], earlier: list[list[int]]) -> list[int]:
    """A prompt behind one of a few stems, or one that was there before, to its last token."""
    if earlier and rng.random() < 0.25:
        return list(earlier[rng.integers(len(earlier))])
    stem = stems[min(rng.geometric(0.5), len(stems)) - 1]
    own = rng.integers(40, size=rng.integers(0 if stem else 1, 30)).tolist()
    return stem + own


def draw_requests(rng) -> list[Request]:
    stems = [rng.integers(40, size=rng.integers(0, 50)).tolist() for _ in range(4)]
    prompts: list[list[int]] = []
    requests = []
    for number in range(int(rng.integers(3, 22))):
        prompt = draw_prompt(rng, stems, prompts) or [7]
        prompts.append(prompt)
        answer = int(rng.integers(1, 12))
        salt = "b" if rng.random() < 0.1 else ""
        requests.append(Request(number, prompt, len(prompt) + answer, salt))
    return requests


def draw_scheduler(rng, longest: int) -> Scheduler:
    """A scheduler over a lake that holds the longest request at least."""
    N = int(rng.integers(1, 9))
    C = int(rng.choice([1, 2, 4, 8]))
    least = -(-(-(-longest // C)) // N)
    policies = ["even", "even", "dp"]
    policies += [f"pd:{p}x{N - p}" for p in (1, N // 2, N - 1) if 0 < p < N]
    config = LakeConfig(
        segment_tokens=C,
        slots=least + int(rng.choice([0, 2, 10, 100])),
        placement=str(rng.choice(["stripe", "hash"])),
        replicate_factor=float(rng.choice([0, 3, 50])),
        pull_tokens=int(rng.choice([0, 20, 10_000])),
        chunk_tokens=int(rng.choice([2, 7, 16, 40])),
        max_batch=int(rng.choice([2, 8, 32])),
    )
    shape = LlamaConfig(num_kv_heads=int(rng.choice([1, 4, 8])))
    lake = TokenLake(list(range(N)), shape, config)
    lake.exchange_bytes = int(rng.choice([0, 3_000_000]))
    slo_ms = rng.choice([None, 1e-6, 1e-2])
    return Scheduler(lake, (), str(rng.choice(policies)), slo_ms)


def identities(request: Request) -> np.ndarray:
    """[tokens] a number for each token and all before it, under the request's salt."""
    numbers = []
    number = len(request.salt)
    for token in request.tokens:
        number = (number * 1_000_003 + token + 1) % (2**61 - 1)
        numbers.append(number)
    return np.array(numbers, np.int64)


def rows_of(table) -> list[tuple]:
    """A table's rows as tuples of numbers."""
    return list(zip(*(column.tolist() for column in table)))


def planned(plan, transfer) -> dict:
    """What is hashed of the plans, whatever they are made of."""
    runs = plan.run_table
    first_columns = runs.request_id, runs.position, runs.rows
    return dict(
        runs=rows_of((*first_columns, runs.instance, runs.home, runs.first_row)),
        ships=plan.ships.astype(int).tolist(),
        moves=rows_of(transfer.moves),
        pulls=rows_of(plan.old.pulls),
        writes=rows_of(transfer.writes),
        reads=plan.reads.tolist(),
        load=plan.load.tolist(),
    )


def reads_of_runs(plan, instance) -> list[tuple]:
    """(run, place, first row, length, position) of all that the runs that are computed at an
    instance, or come to it, read there: of its share's spans, a run reads what begins before its
    end."""
    runs = plan.run_table
    comes = (runs.instance == instance) | plan.ships[:, instance]
    spans = plan.spans_read_at(instance)
    run, span = np.nonzero(
        comes[:, None]
        & (runs.share[:, None] == spans.share)
        & (spans.position < (runs.position + runs.rows)[:, None])
    )
    order = np.lexsort((spans.position[span], run))
    columns = (column[span][order] for column in spans[1:])
    return rows_of((run[order], *columns))


class Slabs:
    """What lies in the rows of all slabs: [N, rows] identities."""
    def __init__(self, lake: TokenLake):
        config = lake.config
        N = len(lake.instances)
        num_rows = config.slots * config.segment_tokens + config.staging(N)
        self.rows = np.full((N, num_rows), EMPTY, np.int64)

    def taken(self, moves: Moves) -> list[np.ndarray]:
        """What each move takes with it."""
        return [
            self.rows[source, row : row + length].copy()
            for source, row, length in rows_of(
                (moves.source, moves.source_row, moves.rows)
            )
        ]

    def received(self, moves: Moves) -> list[np.ndarray]:
        """The receive buffer of each instance: by source, one's in the order of the moves."""
        buffers = [np.zeros(0, np.int64) for _ in self.rows]
        values = self.taken(moves)
        for i in np.argsort(moves.source, kind="stable").tolist():
            target = moves.target[i]
            buffers[target] = np.concatenate((buffers[target], values[i]))
        return buffers

    def write(self, plan, transfer, tokens: dict):
        """New KV, where it is computed: `put`."""
        computed = [np.zeros(0, np.int64) for _ in self.rows]
        for run, instance in zip(plan.runs, plan.run_table.instance.tolist()):
            new = tokens[run.request.id][run.position : run.position + run.rows]
            computed[instance] = np.concatenate((computed[instance], new))
        for instance, first, row, length in rows_of(transfer.writes):
            new = computed[instance][first : first + length]
            self.rows[instance, row : row + length] = new

    def land(self, moves: Moves):
        """What moves brought lies in the slabs."""
        places = zip(moves.target.tolist(), moves.target_row.tolist())
        for (target, row), values in zip(places, self.taken(moves)):
            if row >= 0:
                self.rows[target, row : row + len(values)] = values

    def iterate(self, plan, transfer, tokens: dict):
        """An iteration: writes, moves, and the check of every read."""
        self.write(plan, transfer, tokens)
        before = self.rows.copy()
        pulled = self.received(plan.old.pulls)
        siblings = self.received(transfer.moves)
        self.land(transfer.moves)
        kv_of_place = {HERE: before, LATE: self.rows, PULLED: pulled, SIBLING: siblings}
        seen = [Counter() for _ in plan.runs]
        for instance in range(len(self.rows)):
            for run, place, row, length, position in reads_of_runs(plan, instance):
                values = kv_of_place[place][instance][row : row + length].tolist()
                assert len(values) == length, "a read beyond the end"
                seen[run].update(enumerate(values, position))
        for run, reads in zip(plan.runs, seen):
            last = run.position + run.rows
            expected = dict.fromkeys(enumerate(tokens[run.request.id][:last].tolist()), 1)
            assert {key: n for key, n in reads.items() if key[0] < last} == expected


class Scene:
    """A lake at work: requests come, an iteration is planned, all that it samples is made up."""
    def __init__(self, seed: int):
        self.rng = np.random.default_rng((seed, 19))
        self.coming = draw_requests(self.rng)
        longest = max(request.max_tokens for request in self.coming)
        self.scheduler = draw_scheduler(self.rng, longest)
        self.few_rows = int(self.rng.choice([1, 128]))
        self.lake = self.scheduler.lake

    def plans(self):
        """Yields (DoPs, query plan, transfer plan, groups) until all is served."""
        scheduler = self.scheduler
        for _ in range(ITERATIONS):
            while self.coming and self.rng.random() < 0.7:
                scheduler.add(self.coming.pop(0))
            batches, dops = scheduler.schedule()
            tree = self.lake.get_prefix_tree()
            plan, transfer, groups = self.lake.gen_plans(batches, dops, tree)
            yield dops, plan, transfer, groups
            sampled = {}
            for run in plan.runs:
                if run.samples:
                    id = run.request.id
                    sampled[id] = (7 * id + len(run.request.tokens)) % 40
            scheduler.update(plan, sampled)
            if not (self.coming or scheduler.waiting or scheduler.running):
                return


def run_scene(seed: int) -> tuple[str, Counter]:
    """The digest of a scene, and what came up in it."""
    scene = Scene(seed)
    balancer = scene.lake.balancer
    slabs = Slabs(scene.lake)
    counts = Counter()
    digest = hashlib.blake2b(digest_size=8)
    scheduler.FEW_ROWS = scene.few_rows
    for dops, plan, transfer, groups in scene.plans():
        tokens = {run.request.id: identities(run.request) for run in plan.runs}
        slabs.iterate(plan, transfer, tokens)
        state = balancer.load.tolist(), balancer.free, list(balancer.tree.segments)
        tables = planned(plan, transfer)
        instances = range(balancer.num_instances)
        reads = [reads_of_runs(plan, instance) for instance in instances]
        digest.update(repr((groups, dops, tables, reads, state)).encode())
        digest.update(slabs.rows.tobytes())
        kinds = Counter(kind for kind, *_ in tables["moves"])
        counts.update(
            plans=bool(plan.runs),
            siblings=kinds[TO_SIBLING],
            puts=kinds[PUT],
            replicas=kinds[REPLICA],
            pulls=len(tables["pulls"]),
            ships=int(plan.ships.sum()),
            cached_prompts=sum(not run.puts for run in plan.runs),
        )
    preemptions = scene.scheduler.counters["preemptions"]
    counts.update(preemptions=preemptions, evictions=balancer.evictions)
    return digest.hexdigest(), counts


def busy_plans(seeds, enough: int):
    """The first plans of these scenes with moves of several kinds, pulls, and replicas that are
    read. Yields (query plan, transfer plan)."""
    for seed in seeds:
        for _, plan, transfer, _ in Scene(seed).plans():
            kinds = np.unique(transfer.moves.kind)
            pulls = len(plan.old.pulls.kind)
            if enough and len(kinds) > 1 and pulls and len(plan.old.replicas.slot):
                enough -= 1
                yield plan, transfer


def scenes(seeds) -> tuple[list[str], Counter]:
    """Digests of scenes, and what came up in all of them."""
    few = scheduler.FEW_ROWS
    digests = []
    total = Counter()
    try:
        for seed in seeds:
            digest, counts = run_scene(seed)
            digests.append(digest)
            total += counts
    finally:
        scheduler.FEW_ROWS = few
    return digests, total


def main(arguments: list[str]) -> int:
    parser = Parser(description="Compare plans with recorded ones.")
    parser.add_argument("--record", action="store_true", help=f"write {FILE.name}")
    options = parser.parse_args(arguments)
    print(
        f"Do plans stay as they are? {NUM_SCENES} seeded scenes on 1 to 8 instances without "
        f"tensors, up to {ITERATIONS} iterations each;\nevery planned read is checked, and the "
        f"digest of each scene is {'written to' if options.record else 'compared with'} "
        f"{FILE.name}. Run on {describe_machine()}.\n",
        flush=True,
    )
    digests, counts = scenes(range(NUM_SCENES))
    print(f"{'what came up':<16} {'times':>8}")
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):<16} {count:>8,}")
    if options.record:
        FILE.write_text(json.dumps(digests, indent=0) + "\n")
        return 0
    recorded = json.loads(FILE.read_text())
    changed = [seed for seed, digest in enumerate(digests) if digest != recorded[seed]]
    print(
        f"{len(changed)} of {NUM_SCENES} scenes are planned otherwise"
        + (f", the first is {changed[0]}" if changed else "")
    )
    return int(bool(changed))


if __name__ == "__main__":
    run_main(main)
