"""`python -m torch_sinkhorn_attn.engines`: which engines there are, and why one is missing."""

from torch_sinkhorn_attn.engines import ENGINES, REFERENCE

if __name__ == "__main__":
    for name, engine in ENGINES.items():
        print(f"{name:10} {engine.status()}")
    print(f"{REFERENCE:10} the dense definition, any device")
