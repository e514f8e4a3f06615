"""``python -m examples.tpu_vm``."""

from examples.common.start import start

start("examples.tpu_vm")
