"""Holds what the launchers of a job that shrinks and grows tell each other: start it where nothing of the job is lost.

python launch/rendezvous.py [PORT]          (29400)
A launcher would hold it otherwise, on the host that --rdzv-endpoint names, and the job could not outlive that host.
"""

import signal
import sys

from torch.distributed import TCPStore

store = TCPStore("0.0.0.0", int(sys.argv[1]) if len(sys.argv) > 1 else 29400, is_master=True, wait_for_workers=False)
print(f"the rendezvous is open at port {store.port}", flush=True)
signal.pause()
