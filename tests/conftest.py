"""What holds for all tests: how torch waits, how Triton runs, how many tests run at a time."""

import gc
import os
import signal

import pytest

# Before torch is imported: as in the command line, its threads sleep between their loops and leave the cores to others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():  # before anything imports Triton (bitsandbytes does): its interpreter runs kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # another worker has the other processor; what they start has its own threads
    torch.set_num_threads(1)


# Run in the background, a shell's programs ignore these, and so would all that the tests start and then interrupt.
for name in ("SIGINT", "SIGQUIT", "SIGHUP"):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


gc.disable()  # until all tests are known: what is imported and collected stays


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.collect()
    gc.freeze()  # torch, Gradio and seven thousand tests: no later collection walks through them
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries tell of what they think was leaked


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two tests of the whole suite run at a time, as many wait for a process; a choice of tests runs one by one."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0
