"""Plain PyTorch in O(n + m) memory, on any device."""
