"""How much memory this machine can still give."""

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
