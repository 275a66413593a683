"""One self-contained page about a run, or several compared: `python -m vae_dist.report`."""
