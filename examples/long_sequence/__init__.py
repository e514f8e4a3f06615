"""A genome-like sequence longer than a device, its encoder trained with the sequence over several processes."""
