"""A small vision transformer on handwritten digits, with softmax and with Sinkhorn attention, side by side."""
