"""EAGLE-3 speculative decoding for Llama 4 on hand-written Triton kernels."""

__version__ = "0.1.0"
