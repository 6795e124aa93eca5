"""vLLM in processes of its own: sampling, and the transfer of weights. The only room that imports vllm.

sampler.py is what the loop calls. engine.py is the client of one engine, child.py its process seen from outside, and
engine_process.py and worker.py run inside. records.py has what goes over the socket between them.

Engines on other machines will be another client next to engine.py, with a transfer of its own in `transfer/`.
"""
