"""What is shown of runs: HTML reports, and how far a command is."""
