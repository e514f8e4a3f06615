"""``python -m examples.digits_vit``."""

from examples.common.start import start

start("examples.digits_vit")
