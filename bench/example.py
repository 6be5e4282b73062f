"""Two requests that begin alike, served by hand: the calls of a lake, and of its balancer.

The README shows it, from the imports on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from balancer import Request
from model import Llama, LlamaConfig, random_weights
from tokenlake import TokenLake

model = Llama(LlamaConfig(), random_weights(LlamaConfig(), 0, torch.float32, "cpu"))
lake = TokenLake([0], model.config)  # one instance: a degree of parallelism (DoP) of 1
balancer, tree = lake.balancer, lake.get_prefix_tree()
for id, prompt in enumerate([[*range(32), 41, 42, 43, 44, 45], [*range(32), 51, 52, 53]]):
    request = Request(id, prompt, max_tokens=len(prompt) + 6)  # prompt and answer
    load = lake.get_cache_load([request], tree)
    print(f"request {id}: share of time for the cache: {load:.2f} (§6.1)")
    balancer.admit(request, balancer.match(request))  # the second hits 2 segments
    print(f"  {request.done} of {request.num_prompt} prompt tokens are in the pool")
    while len(request.tokens) < request.max_tokens:  # the prompt, then a token at a time
        batch = balancer.reserve(request, request.remaining)
        query_plan, transfer_plan, [group] = lake.gen_plans([batch], [1], tree)  # DoP 1
        q_buf = lake.init_query(batch, group, query_plan)  # group: instance of each run
        kv_buf = lake.init_transfer(batch, transfer_plan)

        def attend(layer, q, kv):
            kv_buf.write(layer, kv)
            lake.put(kv_buf)
            q_buf.write(layer, q)
            return lake.query(q_buf)

        inputs = torch.tensor(request.tokens[request.done :])
        positions = torch.arange(request.done, len(request.tokens))
        logits = model.forward(inputs, positions, attend, wanted=[-1])
        balancer.commit(request, request.remaining)
        request.tokens.append(int(logits.argmax()))
        balancer.extend_ids(request)
    balancer.release(request)
    alone = model.forward_alone(request.tokens[:-1]).argmax(-1).tolist()
    print("  answer", request.tokens[-6:], "without a cache", alone[-6:])
print(f"segments in the pool: {len(tree.segments)}")
