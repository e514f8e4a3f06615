"""What the benchmarks share. Nothing here is run by itself."""
