"""`python -m torch_sinkhorn_attn.aot`."""

import sys

from torch_sinkhorn_attn.aot.cli import main

if __name__ == "__main__":
    sys.exit(main())
