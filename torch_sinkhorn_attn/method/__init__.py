"""The mathematics, dense and without tiles: the definition, its adjoint and what is built on them."""
