"""``python -m examples.pfam``."""

from examples.start import start

start("examples.pfam")
