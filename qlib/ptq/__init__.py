"""Post-training quantization: a graph, its statistics and settings become the plan of every layer."""
