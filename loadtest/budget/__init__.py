"""What holds a call's cost: machine instructions, and the CPU time beside nginx's. `python -m loadtest.budget`."""
