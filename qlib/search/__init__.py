"""What is found by trying: sensitivity of each layer, bits under a budget, ranges that lower the loss."""
