"""`python -m torch_sinkhorn_attn.engines`: which engines there are, and why one is missing."""

import argparse

from torch_sinkhorn_attn.engines import ENGINES, REFERENCE

if __name__ == "__main__":
    name = "python -m torch_sinkhorn_attn.engines"
    argparse.ArgumentParser(prog=name, description="Which engines there are, and why one is missing.").parse_args()
    for name, engine in ENGINES.items():
        print(f"{name:10} {engine.status()}")
    print(f"{REFERENCE:10} the dense definition, any device")
