"""Weights under constraints that change a layer's outputs least: pure functions on matrices, blind to masks', tables' and scales' classes.

min_Ŵ  tr (W − Ŵ) H (W − Ŵ)ᵀ        H = E[x·xᵀ] over what the layer reads

positions.py   what a layer reads, as a matrix, at sampled places; H of it
values.py      which values a weight may take: any, a grid's, a table's
sweep.py       column after column, each error taken up by the columns not yet fixed
polish.py      what can still be moved by itself, under the same constraint
zeros.py       which weights go, and the best of those that stay
tables.py      the table itself, and the scale of each row
"""

from torchopt.solver.layer import Problem, aimed, error, fit_table, fix_zeros, round_to
from torchopt.solver.positions import means, moments, products
from torchopt.solver.values import Grid, Table, Values

__all__ = [
    "Grid",
    "Problem",
    "Table",
    "Values",
    "aimed",
    "error",
    "fit_table",
    "fix_zeros",
    "means",
    "moments",
    "products",
    "round_to",
]
