"""What the pool is compared with: N lakes of one, and a router in front (§7.1).

A fleet is some lakes, a scheduler for each, and the decision who serves a request:

    Fleet           one lake over all instances, nothing to route: TokenLake itself
    Router          cache-aware routing as SGLang's launcher sets it up: the instance that was sent
                    the longest prefix, unless in-flight requests are far apart
    Disaggregated   PD disaggregation with Mooncake's conductor: the prefill instance with the least
                    estimated TTFT, prefixes copied to it where that pays, KV streamed to the least
                    loaded decode instance, which keeps what it received

Lakes, balancers, schedulers and engines are the project's own. Whoever executes a fleet (the
simulator, or compare.py on real ranks) calls `arrive` for every request and `advance` after every
iteration of a lake, carries out the transfers they return, and says `landed` for each.
"""

import re
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer import Request  # noqa: E402
from tokenlake import NEVER, LakeConfig, Scheduler, TokenLake  # noqa: E402


@dataclass
class Transfer:
    """KV of the tokens [start, stop) of a request on its way between two lakes of one."""
    source: int
    target: int
    leaving: Request  # holds the KV at the source until it has landed
    arriving: Request  # has slots for it at the target
    start: int
    stop: int
    streamed: int  # of these tokens, those that did not travel behind the prefill
    after: object  # called when it has landed

    def spans(self, C: int) -> np.ndarray:
        """[3, n] first slab row at the source and at the target, and rows: by segments."""
        at = np.unique([self.start, *range(-(-self.start // C) * C, self.stop, C)])
        rows = [table[at // C] * C + at % C for table in (self.leaving.table, self.arriving.table)]
        return np.stack((*rows, np.diff(at, append=self.stop)))


class Fleet:
    """Lakes, a scheduler for each, and as long as there is one lake nothing to route."""
    in_order = False  # of arrival, as conventional engines serve; else by Scheduler.urgency

    def __init__(self, lakes: list[TokenLake], make=Scheduler):
        self.lakes, self.schedulers = lakes, [make(lake) for lake in lakes]

    def serve_in_order(self):
        self.in_order = True
        for scheduler in self.schedulers:
            scheduler.urgency = lambda request, done: request.order or 0

    def fits(self, request: Request) -> bool:
        """Whether the smallest lake can hold it at all, when it is empty."""
        balancer = self.lakes[0].balancer
        room = len(self.lakes[0].instances) * balancer.slots
        return balancer.num_segments(request.max_tokens - 1) <= room

    def arrive(self, request: Request) -> list[Transfer]:
        """Gives a request to a lake's scheduler, now or when what it returns has landed."""
        self.schedulers[0].add(request)
        return []

    def advance(self, lake: int) -> list[Transfer]:
        """What an iteration of a lake sets in motion."""
        return []

    def landed(self, transfer: Transfer):
        """The KV is there: the target publishes it, the source lets go."""
        here, there = (self.lakes[i].balancer for i in (transfer.source, transfer.target))
        there.commit(transfer.arriving, transfer.stop - transfer.start)
        here.release(transfer.leaving)
        transfer.after()

    @property
    def cached_tokens(self) -> dict[int, int]:
        """By request id: hits at its first admission, where its prompt is computed."""
        out = {}
        for scheduler in reversed(self.schedulers):  # prefill instances come first, and decide
            out |= scheduler.cached_tokens
        return out


class Router(Fleet):
    """Cache-aware routing. Its tree of an instance is what it sent there, LRU by tokens; whether
    the instance still holds it, it does not know."""
    CACHE_THRESHOLD, BALANCE_ABS, BALANCE_REL, MAX_TREE = 0.3, 64, 1.5, 2**26

    def __init__(self, lakes, make=Scheduler):
        super().__init__(lakes, make)
        self.trees: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in lakes]

    def choose(self, request: Request) -> int:
        C, trees = self.lakes[0].config.segment_tokens, self.trees
        flying = [len(s.waiting) + len(s.running) for s in self.schedulers]
        if (max(flying) - min(flying) > self.BALANCE_ABS
                and max(flying) > self.BALANCE_REL * min(flying)):
            return flying.index(min(flying))
        matched = [next((i for i, id in enumerate(request.ids) if id not in tree),
                        len(request.ids)) for tree in trees]
        if max(matched) * C > self.CACHE_THRESHOLD * len(request.tokens):
            return matched.index(max(matched))
        return min(range(len(trees)), key=lambda i: len(trees[i]))

    def arrive(self, request):
        self.lakes[0].balancer.extend_ids(request)
        chosen = self.choose(request)
        tree = self.trees[chosen]
        for id in reversed(request.ids):  # a prefix is younger than what follows it
            tree[id] = None
            tree.move_to_end(id)
        while len(tree) * self.lakes[0].config.segment_tokens > self.MAX_TREE:
            tree.popitem(last=False)
        self.schedulers[chosen].add(request)
        return []


class Prefill(Scheduler):
    """Parks a request at its first token, its KV pinned until a decode instance has it."""
    def __init__(self, lake):
        super().__init__(lake)
        self.parked: list[Request] = []

    def update(self, query_plan, tokens):
        ended = super().update(query_plan, tokens)
        self.parked += [r for r in self.running if len(r.tokens) > r.num_prompt]
        self.running = [r for r in self.running if len(r.tokens) == r.num_prompt]
        return ended


class Disaggregated(Fleet):
    """The first `prefills` lakes compute prompts, the others decode. In its favour, links are never
    shared, and what streams behind a prefill takes no time but for the last layer's."""
    BALANCING = 1.25  # a prefix elsewhere that is so many times as long is copied
    bandwidth = 300e9  # B/s of a link, as the conductor reckons

    def __init__(self, lakes, prefills: int):
        super().__init__(lakes, Scheduler)
        self.schedulers[:prefills] = map(Prefill, lakes[:prefills])
        self.prefills = prefills
        self.flying: list[list[Request]] = [[] for _ in lakes]  # on their way to each

    def estimate(self, lake: int, new: int, prefix: int) -> float:
        """Seconds of a prefill, by the time model of that instance's scheduler."""
        a, b, c, _ = self.schedulers[lake].model.coefficients
        chunks = -(-new // self.lakes[lake].config.chunk_tokens)
        return (a * chunks + new * (b + c * (prefix + new / 2))) / 1e12

    def queue(self, lake: int, new: int) -> float:
        """Seconds until a prefill instance turns to a prompt with `new` rows."""
        scheduler = self.schedulers[lake]
        new = NEVER if self.in_order else new  # without order, the shortest goes first
        todo = [(len(r.tokens), r.done) for r in scheduler.running]
        todo += [(len(r.tokens), scheduler.balancer.match(r) * scheduler.balancer.segment_tokens)
                 for r in scheduler.waiting]
        return sum(self.estimate(lake, n - done, done) for n, done in todo if n - done <= new)

    def choose(self, request: Request) -> tuple[int, int]:
        """The prefill instance with the least estimated TTFT, and the one that its prefix is
        copied from: itself, where what it has is about as long as any."""
        C, n = self.lakes[0].config.segment_tokens, len(request.tokens)
        row_bytes = self.lakes[0].model.num_layers * self.lakes[0].kv_bytes
        prefix = [min(C * lake.balancer.match(request), n - 1)
                  for lake in self.lakes[:self.prefills]]
        best, times = max(range(self.prefills), key=lambda i: prefix[i]), []
        for lake, here in enumerate(prefix):
            source = lake if prefix[best] <= self.BALANCING * here else best
            moved = (prefix[source] - here) * row_bytes / self.bandwidth
            new = n - prefix[source]
            times.append((self.queue(lake, new) + moved + self.estimate(lake, new, n - new),
                          lake, source))
        return min(times)[1:]

    def arrive(self, request):
        chosen, source = self.choose(request)
        add = lambda: self.schedulers[chosen].add(request)
        if chosen != source:
            C, holder = self.lakes[source].config.segment_tokens, self.lakes[source].balancer
            matched = holder.match(request)
            leaving, arriving = (Request(-1, request.tokens[:matched * C], matched * C)
                                 for _ in range(2))
            for part in (leaving, arriving):
                part.salt, part.ids = request.salt, request.ids[:matched]
            after = lambda: (self.lakes[chosen].balancer.release(arriving), add())
            if transfer := self._transfer(source, chosen, leaving, arriving, matched * C, after):
                holder.admit(leaving, matched)
                return [transfer]
        add()
        return []

    def _transfer(self, source, target, leaving, arriving, stop, after):
        """Slots at the target for what it lacks of the first `stop` tokens; None if it is full."""
        scheduler = self.schedulers[target]
        balancer, matched = scheduler.balancer, scheduler.balancer.match(arriving)
        promised = sum(balancer.num_segments(r.max_tokens - 1) - r.num_slots
                       for r in scheduler.running + self.flying[target])
        promised += balancer.num_segments(arriving.max_tokens - 1) - balancer.num_segments(
            len(arriving.tokens))
        if not balancer.fits(arriving, matched, promised):
            return None
        balancer.admit(arriving, matched)
        start = arriving.done
        if balancer.reserve(arriving, stop - start, [0], [0], stop) is None:
            balancer.release(arriving)
            return None
        return Transfer(source, target, leaving, arriving, start, stop, stop - start, after)

    def advance(self, lake):
        """Parked requests go on, the oldest first, as long as a decode instance has room."""
        out = []
        waiting = [(r, i) for i in range(self.prefills) for r in self.schedulers[i].parked]
        for request, source in sorted(waiting, key=lambda at: at[0].id):
            there = {i: self.schedulers[i].running + self.flying[i]
                     for i in range(self.prefills, len(self.lakes))}
            target = min(there, key=lambda i: sum(len(r.tokens) for r in there[i]))
            n, scheduler, arriving = request.num_prompt, self.schedulers[target], replace(request)
            arriving.num_prompt, arriving.ids = n, list(request.ids)
            arriving.segments, arriving.num_slots, arriving.done = [], 0, 0
            arriving.order = None  # that is the other scheduler's

            def decode(scheduler=scheduler, request=arriving, target=target):
                self.flying[target].remove(request)
                scheduler.running.append(request)
            if len(there[target]) >= scheduler.lake.config.max_batch:
                break
            transfer = self._transfer(source, target, request, arriving, n, decode)
            if transfer is None:
                break
            if source == lake:  # it streamed, layer by layer, behind its prefill
                chunk = min(self.lakes[source].config.chunk_tokens, n - transfer.start)
                transfer.streamed = -(-chunk // self.lakes[source].model.num_layers)
            self.schedulers[source].parked.remove(request)
            self.flying[target].append(arriving)
            out.append(transfer)
        return out


# Variants of TokenLake, for ablations: what differs from its defaults.
VARIANTS = {"tokenlake": {}, "hash": dict(placement="hash"), "unreplicated":
            dict(replicate_factor=0.0), "ship": dict(pull_tokens=0)}


def make_fleet(policy: str, N: int, model, config: LakeConfig, slo=None, cluster=None,
               **options) -> Fleet:
    """A fleet of N instances: `tokenlake`, one of its variants (or a scheduler of its own, such as
    `tokenlake:pd:1x3`), `router`, or `pd:PxD`; all serve by urgency, with `:fcfs` behind the name
    in order of arrival. config is that of one instance."""
    if policy.endswith(":fcfs"):
        fleet = make_fleet(policy[:-5], N, model, config, slo, cluster, **options)
        fleet.serve_in_order()
        return fleet
    kind, _, own = policy.partition("tokenlake:")
    counts = re.fullmatch(r"pd:(\d+)x(\d+)", own or kind)
    counts = [int(n) for n in counts.groups()] if counts else []
    if counts and (0 in counts or sum(counts) != N):
        raise ValueError(f"{policy}: P + D = {N} instances, one at least of each, are expected")
    if not counts and policy not in ("router", *VARIANTS) and own not in ("auto", "even", "dp"):
        raise ValueError(f"{policy}: no such policy; {', '.join(VARIANTS)}, tokenlake:SCHEDULER, "
                         "router and pd:PxD are there, and each with :fcfs behind it")
    scheduler = lambda lake: Scheduler(lake, (), own or "auto", slo)
    if policy in VARIANTS or policy.startswith("tokenlake:"):
        config = replace(config, max_batch=N * config.max_batch, **VARIANTS.get(policy, {}))
        lake = TokenLake(list(range(N)), model, config, cluster, **options)
        return Fleet([lake], scheduler)
    lakes = [TokenLake([i], model, config, cluster, **options) for i in range(N)]
    if policy == "router":
        return Router(lakes, scheduler)
    return Disaggregated(lakes, counts[0])
