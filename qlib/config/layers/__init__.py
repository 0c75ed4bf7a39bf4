"""Settings of each layer for post-training quantization: YAML and flags, resolved by regular expressions."""
