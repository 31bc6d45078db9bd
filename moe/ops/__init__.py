"""Token permutation and grouped matrix products, each with a plain reference twin."""
