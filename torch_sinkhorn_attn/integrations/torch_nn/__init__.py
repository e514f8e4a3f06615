"""torch.nn.MultiheadAttention: its masks, its nested tensors, and its replacement in a model."""
