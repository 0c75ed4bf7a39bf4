"""One training quantizer a file: its class registers itself in `TRAINING_QUANTIZERS` under its name in YAML."""
