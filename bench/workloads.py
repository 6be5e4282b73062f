"""Generated loads, written as traces: JSON lines, a request each.

    python bench/workloads.py loogle --rate 1 --num-requests 300 --seed 0 > t.jsonl

Arrivals are Poisson, `--rate` requests per second. What is shared is shared in whole blocks of 512
tokens, so a shared part is rounded up to blocks:

    loogle     a document (lognormal, mean 24k, σ 0.5, at least 4k) and a question of 50–300 tokens;
               24 documents are active, each for 4–12 questions; answers of 10–200
    scbench    sessions over a context (lognormal, mean 227k, σ 0.5, at least 20k) of 5 turns; a
               turn adds the answer and 30–200 tokens, 5 s after the answer; answers of 20–150
    sharegpt   a system prompt of 1,536 and a message (lognormal, μ 5.3, σ 1, at most 2,400);
               answers lognormal (μ 5.1, σ 0.8, at most 1,000)
    toolagent  one of three families' prefixes, 12 / 15 / 18 blocks for 48 / 38 / 14 % of requests,
               and an own part (lognormal, mean 2k, σ 0.8); answers of 50–400
    mixed      loogle, scbench and sharegpt, a third of the requests each

A later turn repeats the whole blocks of the one before; its last, started block counts as new.
"""

import argparse
import json
import math
import sys
from itertools import count, islice

import numpy as np

BLOCK = 512


def lognormal(rng, mean: float, sigma: float) -> int:
    return int(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma))


def turn(fresh, shared: list, own: int, answer: int) -> tuple:
    """A request of shared blocks and `own` tokens: its blocks, length and answer's length."""
    return shared + fresh(-(-own // BLOCK)), len(shared) * BLOCK + own, answer


# Each yields sessions, lists of turns.

def loogle(rng, fresh):
    documents = []
    while True:
        while len(documents) < 24:
            tokens = max(4000, lognormal(rng, 24_000, 0.5))
            documents.append([fresh(-(-tokens // BLOCK)), int(rng.integers(4, 13))])
        chosen = documents[rng.integers(24)]
        chosen[1] -= 1
        if not chosen[1]:
            documents.remove(chosen)
        yield [turn(fresh, chosen[0], int(rng.integers(50, 301)), int(rng.integers(10, 201)))]


def scbench(rng, fresh):
    while True:
        length, blocks, turns = max(20_000, lognormal(rng, 227_000, 0.5)), [], []
        for _ in range(5):
            length += int(rng.integers(30, 201))
            turns.append(turn(fresh, blocks, length - len(blocks) * BLOCK,
                              int(rng.integers(20, 151))))
            blocks = turns[-1][0][:length // BLOCK]
            length += turns[-1][2]
        yield turns


def sharegpt(rng, fresh):
    system = fresh(3)
    while True:
        yield [turn(fresh, system, min(2400, 1 + int(rng.lognormal(5.3, 1))),
                    min(1000, 1 + int(rng.lognormal(5.1, 0.8))))]


def toolagent(rng, fresh):
    families = [fresh(blocks) for blocks in (12, 15, 18)]
    while True:
        family = families[rng.choice(3, p=(0.48, 0.38, 0.14))]
        yield [turn(fresh, family, 1 + lognormal(rng, 2000, 0.8), int(rng.integers(50, 401)))]


def mixed(rng, fresh):
    kinds = [kind(rng, fresh) for kind in (loogle, scbench, sharegpt)]
    while True:  # a session of scbench is five requests
        yield next(kinds[rng.choice(3, p=(5 / 11, 1 / 11, 5 / 11))])


WORKLOADS = {kind.__name__: kind for kind in (loogle, scbench, sharegpt, toolagent, mixed)}


def generate(name: str, num_requests: int, rate: float, seed: int):
    """Lines of the trace, as dictionaries."""
    rng, ids = np.random.default_rng((seed, 7)), count()
    fresh = lambda blocks: list(islice(ids, blocks))
    sessions, at, left = WORKLOADS[name](rng, fresh), 0.0, num_requests
    for number in count():
        gap, turns = rng.exponential(1000 / rate), next(sessions)[:left]
        at += gap * len(turns)
        for blocks, length, answer in turns:
            line = dict(timestamp=round(at, 1), input_length=length, output_length=answer,
                        hash_ids=blocks)
            yield line | (dict(session_id=number, think_ms=5000) if len(turns) > 1 else {})
        left -= len(turns)
        if not left:
            return


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write a generated load as a trace.")
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second (default 1)")
    parser.add_argument("--num-requests", type=int, default=300, help="default 300")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 < options.rate < 1e6 or options.num_requests < 1 or options.seed < 0:
        parser.error("--rate and --num-requests: positive numbers are expected; --seed: from 0")
    for line in generate(options.name, options.num_requests, options.rate, options.seed):
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
