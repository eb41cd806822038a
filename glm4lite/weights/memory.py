"""How much memory this machine can still give, and sizes as people read them."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def available() -> int | None:
    """Bytes that can be allocated without pushing others out, swap included; None where the system does not tell.

    Only Linux tells it in a file; elsewhere nothing is refused up front.
    """
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    kibibytes = [int(fields[key].split()[0]) for key in ("MemAvailable", "SwapFree") if key in fields]
    return sum(kibibytes) * 1024 if kibibytes else None


def readable(count: int) -> str:
    """A size in bytes, for a message: "1.2 GiB", "340 KiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
