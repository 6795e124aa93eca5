"""The transfer of weights from the trainer into vLLM: sender, receiver, and the buffers between them.

weight_sender.py runs in the trainer and weight_receiver.py in vLLM's workers. They share memory of the host
(shared_buffer.py) or of a GPU (device_buffer.py). vllm_layout.py knows which tensors vLLM makes of the weights sent.
"""
