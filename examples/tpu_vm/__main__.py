"""``python -m examples.tpu_vm``."""

from examples.start import start

start("examples.tpu_vm")
