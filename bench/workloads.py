"""Generated loads, written as traces: JSON lines, a request each.

    python bench/workloads.py loogle --rate 1 --num-requests 300 --seed 0 > t.jsonl

Arrivals are Poisson at `--rate` per second. What is shared is shared in whole blocks of 512 tokens,
so a shared part is rounded up to blocks:

    loogle     a document (lognormal, mean 24k, σ 0.5, at least 4k) and a question of 50–300 tokens;
               24 documents are active, each for 4–12 questions; answers of 10–200
    sharegpt   a system prompt of 1,536 and a message (lognormal, μ 5.3, σ 1, at most 2,400);
               answers lognormal (μ 5.1, σ 0.8, at most 1,000)
    toolagent  one of three families' prefixes, 12 / 15 / 18 blocks for 48 / 38 / 14 % of requests,
               and an own part (lognormal, mean 2k, σ 0.8); answers of 50–400
"""

import argparse
import json
import math
import sys
from itertools import count

import numpy as np

BLOCK = 512


def loogle(rng, fresh):
    documents = []
    while True:
        while len(documents) < 24:
            tokens = max(4000, rng.lognormal(math.log(24_000) - 0.125, 0.5))
            documents.append([fresh(-(-int(tokens) // BLOCK)), int(rng.integers(4, 13))])
        chosen = documents[rng.integers(24)]
        chosen[1] -= 1
        if not chosen[1]:
            documents.remove(chosen)
        yield chosen[0], int(rng.integers(50, 301)), int(rng.integers(10, 201))


def sharegpt(rng, fresh):
    system = fresh(3)
    while True:
        yield (system, min(2400, 1 + int(rng.lognormal(5.3, 1))),
               min(1000, 1 + int(rng.lognormal(5.1, 0.8))))


def toolagent(rng, fresh):
    families = [fresh(blocks) for blocks in (12, 15, 18)]
    while True:
        own = 1 + int(rng.lognormal(math.log(2000) - 0.32, 0.8))
        yield families[rng.choice(3, p=(0.48, 0.38, 0.14))], own, int(rng.integers(50, 401))


WORKLOADS = {"loogle": loogle, "sharegpt": sharegpt, "toolagent": toolagent}


def generate(name: str, num_requests: int, rate: float, seed: int):
    """Lines of the trace, as dictionaries."""
    rng, ids, at = np.random.default_rng((seed, 7)), count(), 0.0
    requests = WORKLOADS[name](rng, lambda blocks: [next(ids) for _ in range(blocks)])
    for _ in range(num_requests):
        at += rng.exponential(1000 / rate)
        shared, own, answer = next(requests)
        blocks = shared + [next(ids) for _ in range(-(-own // BLOCK))]
        yield dict(timestamp=round(at, 1), input_length=len(shared) * BLOCK + own,
                   output_length=answer, hash_ids=blocks)


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
