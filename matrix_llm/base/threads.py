"""How OpenMP threads wait for work. Set before torch is imported, because OpenMP reads it once, when torch loads it.

By default a waiting thread spins. With one other busy process on a two-core machine, spinning threads trained at 7 % of
their usual speed, passive ones at 62 %.
"""

import os


def wait_passively() -> None:
    """Set OMP_WAIT_POLICY to PASSIVE unless the user has set it. Call it before the first import of torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
