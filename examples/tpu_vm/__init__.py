"""Train the aligner of examples/pfam on a TPU VM, over all its chips."""
