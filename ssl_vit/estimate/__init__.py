"""Before a run: FLOPs, memory, hours, disk, and a timed trial."""
