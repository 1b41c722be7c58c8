"""Read, check and resolve recipe files."""
