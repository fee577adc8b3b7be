"""Device code of ddfast: Triton kernels (.py) beside the CUDA ones (.cu). Private: use ddfast.ops.

Installed as `ddfast_kernels`. A file holds the kernels of one op and the function that launches them on tensors that
ddfast.ops has checked; it imports nothing of ddfast.
"""
