"""``python -m examples.replace_in_encoder``."""

from examples.common.start import start

start("examples.replace_in_encoder")
