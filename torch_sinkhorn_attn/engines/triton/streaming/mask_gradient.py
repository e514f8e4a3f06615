"""The gradient of a float mask."""
def run(*a): raise NotImplementedError
