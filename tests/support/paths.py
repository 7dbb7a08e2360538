"""Where things are, for tests that start a script or read real data."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
SHARED = ROOT.parent / "shared"  # real data that some tests use when it is there
