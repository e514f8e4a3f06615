"""Whether a plan exists that is positive on its support: decided exactly."""
