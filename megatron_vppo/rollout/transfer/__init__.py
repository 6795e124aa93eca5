"""The way of the weights from the trainer into vLLM: sender, receiver, and the buffers between them."""
