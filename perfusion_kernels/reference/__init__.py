"""The reference: every operator as a formula in plain torch, for any device, and in float64 too.

The other backends are tested against these functions. They import nothing but torch and each other,
look at no value, and each stands beside its derivatives.
"""
