"""leanstep."""
