"""What `certify` and `residual_history` are made of: how near to balance the plan is, how fast it gets there, and what
would bring it there."""
