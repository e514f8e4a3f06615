"""``python -m examples.replace_in_encoder``."""

from examples.start import start

start("examples.replace_in_encoder")
