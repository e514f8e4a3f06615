"""The ops and their derivatives: the only place where problems become flat lists of tensors."""
