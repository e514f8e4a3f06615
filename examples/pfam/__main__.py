"""``python -m examples.pfam``."""

from examples.common.start import start

start("examples.pfam")
