"""``python -m examples.digits_vit``."""

from examples.start import start

start("examples.digits_vit")
