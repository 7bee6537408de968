"""The reference: every operator as a formula in plain torch, for any device, and in float64 too.

The other backends are tested against these functions. They import only torch and each other, read no values on
the host, and each file has the operator and its derivatives.
"""
