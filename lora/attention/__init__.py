"""Low-rank attention, the gate that decides where it runs, and the norms behind that decision."""
