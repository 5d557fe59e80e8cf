"""Devices, processes, stop signals, and checks that protect a run."""
