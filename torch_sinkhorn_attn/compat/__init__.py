"""What torch asks of the package: its releases, lazy names, the registration of ops, programs being recorded."""
