"""Softmax attention of a trained nn.TransformerEncoder swapped for optimal-transport attention, and back."""
