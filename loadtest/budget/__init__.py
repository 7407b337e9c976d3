"""What holds a call's cost: machine instructions, and how many times nginx's they are. `python -m loadtest.budget`."""
