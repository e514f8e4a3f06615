"""``python -m examples.long_sequence``."""

from examples.common.start import start

start("examples.long_sequence")
