"""Images: `datasets` by name and folder, `loader` for batches, `subset` for parts of a dataset."""
