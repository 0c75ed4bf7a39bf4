"""Quantization-aware training: which tensors get which quantizer, and the graph in which they train."""
