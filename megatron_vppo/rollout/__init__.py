"""vLLM in processes of its own: sampling and weight transfer. The only layer that imports vllm."""
