"""How OpenMP threads wait for work, decided before torch is imported.

Threads that spin while they wait fall to a tenth of their speed beside any other busy process; passive ones lose a third.
"""

import os


def wait_passively() -> None:
    """Default OMP_WAIT_POLICY to PASSIVE. A value that is already set stays. Call it before the first import of torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
