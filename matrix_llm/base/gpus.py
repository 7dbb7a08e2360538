"""Memory of the GPUs that --dry_run can plan for."""

GIB = 2**30

# What the driver reports as total, in GiB, rounded down: a card sold as 80 GB has 79.1 GiB (H100 SXM) or less.
GPUS: dict[str, float] = {
    "t4-16gb": 14.5,
    "rtx3090-24gb": 23.6,
    "rtx4090-24gb": 23.5,
    "rtx5090-32gb": 31.3,
    "v100-32gb": 31.7,
    "a100-40gb": 39.3,
    "l40s-48gb": 44.3,
    "a100-80gb": 79.1,
    "h100-80gb": 79.1,
    "h200-141gb": 139.8,
    "b200-180gb": 178.3,
}

RESERVED = 0.08  # left free for the CUDA context, the communication library, and fragmentation in the allocator


def usable(name: str) -> float:
    """Bytes of the named GPU that tensors can take.

    >>> round(usable("h100-80gb") / GIB, 1)
    72.8
    """
    return GPUS[name] * (1 - RESERVED) * GIB
