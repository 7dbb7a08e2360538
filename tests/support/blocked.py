"""Code for `python -c` that makes some packages impossible to import, as on a machine where they are not installed."""


def without(*packages: str) -> str:
    """A first line of code: importing any of `packages` afterwards raises ImportError."""
    return (
        "import sys; sys.meta_path.insert(0, type('Blocked', (), {'find_spec': staticmethod(lambda name, *_: "
        f"(_ for _ in ()).throw(ImportError(name)) if name.split('.')[0] in {packages!r} else None)}})())\n"
    )
